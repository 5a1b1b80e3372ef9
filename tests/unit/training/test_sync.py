"""What one rank agrees on with itself: a window of steps, and whether to stop or save."""

import itertools
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from mnist_dist.data.sampler import Batch
from mnist_dist.distributed.world import Member, World
from mnist_dist.run import stop
from mnist_dist.training import sync as module
from mnist_dist.training.sync import MAX_STEPS, SYNC_S, Sync


class Clock:
    """What the time is, as the test says."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now_s = 100.0
        monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: self.now_s))


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


STEPS_PER_EPOCH = MAX_STEPS + 2


def make_sync(folder: Path, checkpoint_every_s: float = 0) -> Sync:
    accelerator = SimpleNamespace(process_index=0, num_processes=1, device=torch.device("cpu"))
    world = World(accelerator, [Member("a", (0,), False, "cpu", "x")], "fp32", [], watchdog=None)  # type: ignore[arg-type]
    return Sync(world, torch.ones(STEPS_PER_EPOCH), folder / "STOP", checkpoint_every_s)


def add(sync: Sync, loss_sum: float = 1.0, num_images: int = 1) -> None:
    """Do a step, the next one of an epoch."""
    row = (sync.last_row + 1) % STEPS_PER_EPOCH
    sync.loss_sums[row] = loss_sum
    nothing = torch.empty(0)
    sync.add(Batch(row, 0, row, False, num_images, nothing, nothing, None))


def test_a_window_holds_the_steps_since_the_last_sync(clock: Clock, tmp_path: Path) -> None:
    sync = make_sync(tmp_path)
    sync.begin_window()
    assert not sync.is_due()
    for loss, count in ((8.0, 4), (6.0, 4), (1.0, 2)):
        add(sync, loss, count)
        assert sync.is_due()  # the first sync comes after one step
    clock.now_s += 2
    window = sync.run(13, "")
    assert (window.first_step, window.losses) == (10, [2.0, 1.5, 0.5])
    assert (window.loss_sum, window.num_images, window.seconds) == (15.0, 10, 2.0)
    assert (window.stop, window.save) == (False, False)
    clock.now_s += 100  # an evaluation, say
    sync.begin_window()
    add(sync, 3.0, 4)
    clock.now_s += 1
    window = sync.run(14, "")
    assert (window.first_step, window.losses, window.seconds) == (13, [0.75], 1.0)


@pytest.mark.parametrize(
    ("step_s", "steps"), [(0.01, int(SYNC_S / 0.01)), (0.2, 2), (5.0, 1), (1e-9, MAX_STEPS), (0.0, MAX_STEPS)]
)
def test_the_next_sync_is_about_half_a_second_away(step_s: float, steps: int, clock: Clock, tmp_path: Path) -> None:
    sync = make_sync(tmp_path)
    add(sync)
    clock.now_s = sync.began_s + step_s
    sync.run(1, "")
    assert abs(sync.steps_to_next - steps) <= 1
    counted = next(n for n in itertools.count(1) if add(sync) or sync.is_due())
    assert counted == sync.steps_to_next


def test_a_stop_file_a_failure_and_a_signal_are_reasons_to_stop(
    clock: Clock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sync = make_sync(tmp_path)

    def ask(failure: str = "") -> tuple[bool, str]:
        add(sync)
        clock.now_s += 1
        return sync.run(1, failure).stop, sync.stop_reason

    assert ask() == (False, "")
    assert ask("metrics.jsonl could not be written") == (True, "metrics.jsonl could not be written")
    assert ask() == (False, "")
    (tmp_path / "STOP").touch()
    assert ask() == (True, "STOP")
    monkeypatch.setattr(stop, "_received", ["SIGTERM"])
    assert ask() == (True, "SIGTERM")


def test_a_checkpoint_is_due_so_long_after_the_last(clock: Clock, tmp_path: Path) -> None:
    sync, never = make_sync(tmp_path, checkpoint_every_s=10), make_sync(tmp_path, checkpoint_every_s=0)

    def is_due(sync: Sync) -> bool:
        add(sync)
        return sync.run(1, "").save

    due = []
    for _ in range(25):
        clock.now_s += 1
        due.append(is_due(sync))
        if due[-1]:
            sync.note_save()
        assert not is_due(never)
    assert [second for second, is_one in enumerate(due, 1) if is_one] == [10, 20]
