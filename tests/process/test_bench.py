"""`bench`: real ranks measure every figure, and compare it with an earlier file's."""

import dataclasses
import json
import os
import signal
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from mnist_dist.config.schema import Config
from mnist_dist.models import build_model, num_parameters
from mnist_dist.speed.plan import Plan
from tests.conftest import Result, become, free_port, rank_environment, start_verb, wait_for, wait_ranks
from tests.processes import processes_of

PARTS = {"data", "forward", "backward", "exchange", "optimizer"}
VECTOR = 1 << 16  # bytes


def become_small(arguments: list[str], folder: Path, log: Path, environment: dict[str, str]) -> None:
    """Be a rank of a short measurement, on a machine with two cores."""
    from mnist_dist.commands import bench

    plan_for = bench.plan_for

    def plan_little(config: Config, world: Any) -> Plan:
        plan = plan_for(config, world)
        return dataclasses.replace(plan, num_rounds=3, repetition_s=1e-3, exchange_bytes=[VECTOR])

    bench.plan_for = plan_little
    bench.usable_cores = lambda: (0, 1)
    become(arguments, folder, log, environment)


def become_long(arguments: list[str], folder: Path, log: Path, environment: dict[str, str]) -> None:
    """Be a rank of a measurement that takes long, on a machine with two cores."""
    from mnist_dist.commands import bench
    from mnist_dist.run import stop

    stop.install()  # as the entry does
    tempfile.tempdir = str(folder / "temporary")
    bench.usable_cores = lambda: (0, 1)
    become(arguments, folder, log, environment)


def bench(folder: Path, launched: int, *arguments: str) -> Result:
    """Run `bench`, started alone or, by a launcher, on so many ranks."""
    log, port = folder / "output.txt", free_port()
    log.unlink(missing_ok=True)
    places = [rank_environment(rank, launched, port) for rank in range(launched)] or [{}]
    ranks = [start_verb(["bench", *arguments], log, become_small, **place) for place in places]
    return wait_ranks(ranks, log)


def check_spread(row: dict[str, Any]) -> None:
    assert len(row["values"]) == 3
    assert row["q1"] <= row["median"] <= row["q3"]


def check_summary(summary: dict[str, Any], world_sizes: Sequence[int], models: Sequence[str], batch: int) -> None:
    """Every figure is there, and is one."""
    assert summary["plan"]["world_sizes"] == list(world_sizes)
    assert summary["plan"]["batch_sizes"] == {model: [batch] for model in models}
    cases = {(row["model"], row["batch_size"], row["ranks"]) for row in summary["steps"]}
    assert cases == {(m, b, n) for m in models for n in world_sizes for b in (batch, batch * n)}
    for row in summary["steps"]:
        assert row["parts_s"].keys() == PARTS
        spreads = [row["step_s"], row["images_per_s"], row["parts_sum_s"], row["parts_by_step"]]
        for spread in (*spreads, *row["parts_s"].values()):
            check_spread(spread)
            assert min(spread["values"]) > 0
        assert row["step_s"]["values"][0] * row["images_per_s"]["values"][0] == pytest.approx(row["batch_size"])
        assert row["is_cuda_graph"] is False
    several = [(model, ranks) for model in models for ranks in world_sizes[1:]]
    assert [(row["model"], row["ranks"]) for row in summary["strong"]] == several
    assert [(row["model"], row["ranks"]) for row in summary["weak"]] == several
    for row in summary["strong"]:
        for name in ("speed_up", "efficiency", "serial_fraction"):
            check_spread(row[name])
    networks = sorted(4 * num_parameters(build_model(model, 0)) for model in models)
    vectors = [(ranks, size) for ranks in world_sizes[1:] for size in sorted([VECTOR, *networks])]
    assert [(row["ranks"], row["bytes"]) for row in summary["exchanges"]] == vectors
    assert all(row["bus_bytes_per_s"]["median"] > 0 for row in summary["exchanges"])
    assert summary["versions"].keys() >= {"torch", "python", "commit"}
    assert summary["hardware"].keys() >= {"processors", "cores", "devices", "hosts"}


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())  # type: ignore[no-any-return]


def scale_times(summary: dict[str, Any], path: Path, q1: float, median: float, q3: float) -> None:
    """Write a measurement whose times are others."""
    for row in (*(r["step_s"] for r in summary["steps"]), *(r["exchange_s"] for r in summary["exchanges"])):
        row |= {"q1": q1 * row["q1"], "median": median * row["median"], "q3": q3 * row["q3"]}
    path.write_text(json.dumps(summary))


def test_started_alone_it_starts_the_other_rank_and_writes_every_figure(tmp_path: Path) -> None:
    result = bench(tmp_path, 0, "batch_size=8", "--output", "now.json")
    assert result.code == 0, result.output
    summary = read(tmp_path / "now.json")
    check_summary(summary, [1, 2], ["mlp", "cnn"], 8)
    with Image.open(tmp_path / "now.png") as image:
        image.load()
        assert (image.format, image.width > 1000) == ("PNG", True)
    assert {path.name for path in tmp_path.iterdir()} == {"now.json", "now.png", "output.txt"}
    assert "world sizes measured: 1, 2" in result.output
    for row in summary["steps"]:
        assert f"{row['images_per_s']['median']:,.0f}" in result.output
    assert "\x1b" not in result.output
    assert "\r" not in result.output


@pytest.mark.parametrize(("launched", "world_sizes"), [(1, [1]), (2, [1, 2]), (4, [1, 2, 4])])
def test_a_launchers_ranks_are_the_largest_world(launched: int, world_sizes: list[int], tmp_path: Path) -> None:
    exact = [f"bit_exact={launched}"] if launched == 4 else []
    result = bench(tmp_path, launched, "mlp", "batch_size=8", "--json", *exact)
    assert result.code == 0, result.output
    lines = [line for line in result.output.splitlines() if line.startswith("{")]
    assert len(lines) == 1
    check_summary(json.loads(lines[0]), world_sizes, ["mlp"], 8)
    assert [path.name for path in tmp_path.iterdir()] == ["output.txt"]


def test_against_an_earlier_file_it_names_what_changed(tmp_path: Path) -> None:
    request = ["mlp", "batch_size=8"]
    assert bench(tmp_path, 2, *request, "--output", "first.json").code == 0
    first = read(tmp_path / "first.json")
    scale_times(read(tmp_path / "first.json"), tmp_path / "wide.json", 1e-6, 1, 1e6)
    result = bench(tmp_path, 2, *request, "--against", "wide.json")
    num_times = len(first["steps"]) + len(first["exchanges"])
    assert f"{num_times} medians of steps and exchanges compared, 0 changed beyond the quartiles" in result.output

    scale_times(read(tmp_path / "first.json"), tmp_path / "slow.json", 1e6, 1e6, 1e6)
    result = bench(tmp_path, 2, *request, "--against", "slow.json", "--output", "second.json")
    assert f"compared, {num_times} changed beyond the quartiles" in result.output
    assert result.output.count(" x faster") == num_times
    changed = read(tmp_path / "second.json")["against"]["changed"]
    threads = first["plan"]["threads"]
    assert f"step, mlp, batch 8, 1 rank x {threads} thread" in {change["name"].rstrip("s") for change in changed}

    result = bench(tmp_path, 2, *request, "clip_grad_norm=1", "--against", "first.json")
    assert "not the same request: clip_grad_norm was 0.0 and is 1.0" in result.output
    assert "so nothing was compared" in result.output


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--output", "nowhere/now.json"], "--output nowhere/now.json: there is no folder nowhere"),
        (["--output", "now.txt"], "--output now.txt must end in .json; the plot is written beside it, as .png"),
        (["--output", "folder.json"], "folder.json is a folder, not a file"),
        (["--against", "missing.json"], "--against missing.json cannot be read: No such file or directory"),
        (["--against", "text.json"], "--against text.json is no JSON"),
        (["--against", "other.json"], "--against other.json is not a file that this version's bench wrote"),
        (["model=rnn"], "model=rnn is not one of mlp, cnn"),
        (["--quick"], "there is no option --quick"),
        (["precision=fp16"], "precision=fp16 needs a GPU"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
@pytest.mark.parametrize("launched", [0, 2])
def test_a_wrong_request_is_one_sentence_and_nothing_is_written(
    launched: int, arguments: list[str], sentence: str, tmp_path: Path
) -> None:
    (tmp_path / "text.json").write_text("images/s")
    (tmp_path / "other.json").write_text("{}")
    (tmp_path / "folder.json").mkdir()
    before = sorted(tmp_path.iterdir())
    result = bench(tmp_path, launched, *arguments)
    lines = [line for line in result.output.splitlines() if ": waiting for rank" not in line]
    assert len(lines) == 1, result.output
    assert lines[0].startswith("mnist-dist: ")
    assert sentence in lines[0]
    assert result.code == 2
    assert sorted(tmp_path.iterdir()) == sorted([*before, tmp_path / "output.txt"])


@pytest.mark.parametrize("when", ["the ranks start", "they measure"])
def test_a_signal_ends_all_ranks_at_once(when: str, tmp_path: Path) -> None:
    log, temporary = tmp_path / "output.txt", tmp_path / "temporary"
    temporary.mkdir()
    process = start_verb(["bench", "--output", "now.json"], log, become_long, TMPDIR=str(temporary))
    wait_for(lambda: len(processes_of(tmp_path)) == 2)
    if when == "they measure":
        wait_for(lambda: "bench: " in log.read_text())
    assert process.pid
    os.kill(process.pid, signal.SIGTERM)
    result = wait_ranks([process], log, timeout_s=60)
    lines = [line for line in result.output.splitlines() if not line.startswith("bench: ")]
    doing = "measuring" if when == "they measure" else "waiting for the other ranks"
    assert [line for line in lines if ": waiting for rank" not in line] == [
        f"mnist-dist: stopped by SIGTERM while {doing}; nothing is lost, start it again"
    ]
    assert result.code == 3
    assert processes_of(tmp_path) == []
    assert sorted(tmp_path.iterdir()) == [log, temporary]
    assert list(temporary.iterdir()) == []


def test_a_rank_that_dies_is_named(tmp_path: Path) -> None:
    log, temporary = tmp_path / "output.txt", tmp_path / "temporary"
    temporary.mkdir()
    process = start_verb(["bench"], log, become_long, TMPDIR=str(temporary))
    wait_for(lambda: len(processes_of(tmp_path)) == 2)
    (other,) = set(processes_of(tmp_path)) - {process.pid}
    os.kill(other, signal.SIGKILL)  # before the ranks have met
    result = wait_ranks([process], log, timeout_s=120)
    assert "mnist-dist: rank 1, a process that this one started, ended with exit code -9" in result.output
    assert result.code == 1
    assert processes_of(tmp_path) == []
    assert list(temporary.iterdir()) == []
