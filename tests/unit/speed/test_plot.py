"""The picture and the tables have the figures in them."""

import io
import json
from typing import Any

import pytest
from matplotlib.axes import Axes
from PIL import Image
from rich.console import Console

from mnist_dist.speed.plot import draw_figure, draw_png
from mnist_dist.speed.tables import print_summary
from tests.unit.speed.samples import make_summary


def curves(axes: Axes) -> dict[str, list[float]]:
    """The values of each curve, by its label."""
    return {str(box.get_label()): list(box.lines[0].get_ydata()) for box in axes.containers}  # type: ignore[union-attr]


def test_each_panel_has_its_medians() -> None:
    summary = make_summary(4)
    images, efficiency, bandwidth, parts = draw_figure(summary).axes
    rows = [r for r in summary["steps"] if (r["model"], r["batch_size"], r["threads"]) == ("cnn", 256, 1)]
    assert curves(images)["cnn, 256 in all"] == [row["images_per_s"]["median"] for row in rows]
    strong = [r["efficiency"]["median"] for r in summary["strong"] if (r["model"], r["batch_size"]) == ("mlp", 512)]
    assert curves(efficiency)["mlp, 512 in all"] == pytest.approx([100, *(100 * e for e in strong)])
    weak = [r["efficiency"]["median"] for r in summary["weak"] if (r["model"], r["batch_size_a_rank"]) == ("mlp", 512)]
    assert curves(efficiency)["mlp, 512 a rank"] == pytest.approx([100, *(100 * e for e in weak)])
    rates = [r["bus_bytes_per_s"]["median"] / 1e9 for r in summary["exchanges"] if r["ranks"] == 4]
    assert curves(bandwidth)["4 ranks"] == pytest.approx(rates)
    assert len(parts.patches) == 5 * len(summary["steps"])


@pytest.mark.parametrize("world_size", [1, 2, 8])
def test_the_picture_is_a_png_of_some_size(world_size: int) -> None:
    data = draw_png(make_summary(world_size))
    with Image.open(io.BytesIO(data)) as image:
        image.load()
        assert image.format == "PNG"
        assert image.width > 1000
        assert len(image.convert("RGB").getcolors(1 << 20) or []) > 50


def printed(summary: dict[str, Any]) -> list[str]:
    console = Console(file=io.StringIO(), width=80, highlight=False)
    print_summary(console, json.loads(json.dumps(summary)))
    return console.file.getvalue().splitlines()  # type: ignore[attr-defined, no-any-return]


def test_the_tables_fit_into_80_columns_with_every_figure() -> None:
    summary = make_summary(8)
    lines = printed(summary)
    assert max(map(len, lines)) <= 80
    assert "…" not in "".join(lines)
    row = summary["steps"][0]
    begin = [row["model"], str(row["batch_size"]), str(row["ranks"]), "x", str(row["threads"])]
    cells = next(line.split() for line in lines if line.split()[:5] == begin)
    assert cells[5:7] == [f"{row['images_per_s']['median']:,.0f}", f"{1e3 * row['step_s']['median']:.2f}"]
    assert cells[8:] == ["20", "20", "20", "20", "20", "110"]


def test_one_rank_has_no_scaling_and_exchanges_nothing() -> None:
    lines = printed(make_summary(1))
    assert not any("scaling" in line or "GB/s" in line for line in lines)
    assert "world sizes measured: 1" in " ".join(" ".join(lines).split())
