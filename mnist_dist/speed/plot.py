"""The picture of a measurement: images a second, efficiency, where a step goes, bandwidth of the exchange."""

import io
import logging
from collections.abc import Sequence
from typing import Any

logging.getLogger("matplotlib").setLevel(logging.ERROR)  # a home that cannot be written is no matter for a warning
# ruff: noqa: E402
import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from mnist_dist.speed.measure import PARTS

COLOURS = {"mlp": "tab:blue", "cnn": "tab:orange"}
PART_COLOURS = dict(zip(PARTS, ("tab:gray", "tab:blue", "tab:cyan", "tab:red", "tab:green"), strict=True))
LINES = ("-", "--", ":", "-.")  # of batch sizes
MARKERS = ("o", "s", "^", "D")


def draw_png(summary: dict[str, Any]) -> bytes:
    """The picture as a PNG file."""
    with mpl.rc_context():
        mpl.rcdefaults()  # whatever a matplotlibrc says
        mpl.rcParams.update({"font.size": 9, "axes.grid": True, "grid.color": "0.9", "axes.axisbelow": True})
        file = io.BytesIO()
        draw_figure(summary).savefig(file, format="png", dpi=120)
        return file.getvalue()


def draw_figure(summary: dict[str, Any]) -> Figure:
    """Four panels. Bars of error are the quartiles."""
    bars = len(summary["steps"])
    figure = Figure(figsize=(12, 7.5 + 0.16 * bars), layout="constrained")
    grid = figure.add_gridspec(2, 3, height_ratios=(5.5, 2 + 0.16 * bars))
    left, middle, right = (figure.add_subplot(grid[0, column]) for column in range(3))
    _draw_images(left, summary)
    _draw_efficiency(middle, summary)
    _draw_bandwidth(right, summary)
    _draw_parts(figure.add_subplot(grid[1, :]), summary)
    hardware, versions = summary["hardware"], summary["versions"]
    where = ", ".join([*hardware["processor_names"], *hardware["devices"]])
    figure.suptitle(f"{where}; torch {versions.get('torch')}, {summary['request']['precision']}", parse_math=False)
    return figure


def _plot(axes: Axes, x: Sequence[float], spreads: list[dict[str, Any]], scale: float, **style: Any) -> None:
    """A curve of medians with their quartiles."""
    medians = [scale * one["median"] for one in spreads]
    low = [scale * (one["median"] - one["q1"]) for one in spreads]
    high = [scale * (one["q3"] - one["median"]) for one in spreads]
    axes.errorbar(x, medians, yerr=(low, high), capsize=2, markersize=4, linewidth=1.2, **style)


def _style(summary: dict[str, Any], model: str, batch: int) -> dict[str, Any]:
    """Colour of the network, line and marker of the batch size."""
    number = summary["plan"]["batch_sizes"][model].index(batch)
    return {
        "color": COLOURS[model],
        "linestyle": LINES[number % len(LINES)],
        "marker": MARKERS[number % len(MARKERS)],
    }


def _name_ranks(axes: Axes, summary: dict[str, Any]) -> None:
    sizes = summary["plan"]["world_sizes"]
    axes.set_xscale("log", base=2)
    axes.set_xticks(sizes, [str(size) for size in sizes])
    axes.set_xlim(sizes[0] / 1.2, sizes[-1] * 1.2)
    threads = summary["plan"]["threads"]
    axes.set_xlabel(f"ranks, {threads} thread{'s' * (threads > 1)} each")
    axes.xaxis.set_minor_formatter(NullFormatter())


def _add_legend(axes: Axes) -> None:
    """Below the axes, so that it covers no curve."""
    axes.legend(fontsize=7, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.14), frameon=False)


def _draw_images(axes: Axes, summary: dict[str, Any]) -> None:
    threads = summary["plan"]["threads"]
    for model, sizes in summary["plan"]["batch_sizes"].items():
        for size in sizes:
            place = (model, size, threads)
            rows = [r for r in summary["steps"] if (r["model"], r["batch_size"], r["threads"]) == place]
            style = _style(summary, model, size)
            label = f"{model}, {size} in all"
            _plot(axes, [r["ranks"] for r in rows], [r["images_per_s"] for r in rows], 1, label=label, **style)
    _name_ranks(axes, summary)
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set(title="images/s, global batch fixed")
    _add_legend(axes)


def _draw_efficiency(axes: Axes, summary: dict[str, Any]) -> None:
    for kind, batch in (("strong", "batch_size"), ("weak", "batch_size_a_rank")):
        for model, sizes in summary["plan"]["batch_sizes"].items():
            for size in sizes:
                rows = [r for r in summary[kind] if (r["model"], r[batch]) == (model, size)]
                style = _style(summary, model, size) | ({"markerfacecolor": "white"} if kind == "weak" else {})
                whole = {"median": 1.0, "q1": 1.0, "q3": 1.0}
                label = f"{model}, {size} {'in all' if kind == 'strong' else 'a rank'}"
                spreads = [whole, *(r["efficiency"] for r in rows)]
                if rows:
                    _plot(axes, [1, *(r["ranks"] for r in rows)], spreads, 100, label=label, **style)
    _name_ranks(axes, summary)
    axes.set_ylim(bottom=0)
    axes.set(title="efficiency against one rank, %")
    if axes.get_legend_handles_labels()[0]:
        _add_legend(axes)
    else:
        axes.text(0.5, 0.5, "one rank only", transform=axes.transAxes, ha="center")


def _draw_bandwidth(axes: Axes, summary: dict[str, Any]) -> None:
    axes.set(title="bus bandwidth of the exchange, GB/s", xlabel="vector, MB")
    for number, ranks in enumerate(summary["plan"]["world_sizes"][1:]):
        rows = sorted((r for r in summary["exchanges"] if r["ranks"] == ranks), key=lambda row: row["bytes"])
        spreads = [r["bus_bytes_per_s"] for r in rows]
        marker = MARKERS[number % len(MARKERS)]
        _plot(axes, [r["bytes"] / 1e6 for r in rows], spreads, 1e-9, label=f"{ranks} ranks", marker=marker)
    if summary["exchanges"]:
        axes.set_xscale("log")
        sizes = sorted({r["bytes"] / 1e6 for r in summary["exchanges"]})
        axes.set_xticks(sizes, [f"{size:.2g}" for size in sizes])
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_ylim(bottom=0)
        axes.legend(fontsize=7)
    else:
        axes.text(0.5, 0.5, "one rank exchanges nothing", transform=axes.transAxes, ha="center")


def _draw_parts(axes: Axes, summary: dict[str, Any]) -> None:
    """Shares of the parts in their sum, a bar for each case."""
    rows = summary["steps"]
    names = [f"{r['model']} {r['batch_size']}, {r['ranks']} x {r['threads']}" for r in rows]
    left = [0.0] * len(rows)
    for part in PARTS:
        sums = [sum(r["parts_s"][one]["median"] for one in PARTS) for r in rows]
        shares = [100 * r["parts_s"][part]["median"] / total for r, total in zip(rows, sums, strict=True)]
        axes.barh(range(len(rows)), shares, left=left, color=PART_COLOURS[part], label=part, height=0.8)
        left = [a + b for a, b in zip(left, shares, strict=True)]
    for place, row in enumerate(rows):
        axes.annotate(f" {1e3 * row['parts_sum_s']['median']:.3g} ms", (100, place), va="center", fontsize=7)
    axes.set_yticks(range(len(rows)), names, fontsize=7)
    axes.invert_yaxis()
    axes.set_xlim(0, 106)
    axes.grid(visible=False, axis="y")
    axes.set(title="where a step goes, % (network, global batch, ranks x threads; the sum of the parts on the right)")
    axes.legend(ncols=len(PARTS), loc="upper center", bbox_to_anchor=(0.5, -0.06), frameon=False)
