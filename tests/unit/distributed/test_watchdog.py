"""The watchdog's judgement, on a clock and heartbeats that the tests set. Real processes are in tests/process."""

import contextlib
import json
import os
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch.distributed as dist

from mnist_dist.distributed import watchdog as module
from mnist_dist.distributed.watchdog import (
    MAX_NAMED,
    PAUSE_S,
    SILENT_AFTER_ERROR_S,
    SILENT_S,
    Heartbeat,
    Phase,
    Verdict,
    Watchdog,
)

HOSTS = ["a", "b", "c"]
LOST = "does not answer: its process was killed or stopped, or its machine is lost"


class EndedError(Exception):
    """In place of the end of the process."""


class Job:
    """One rank's watchdog, and what the tests say of the clock and of the other ranks."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now_s = 1000.0
        monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: self.now_s))
        self.store = dist.HashStore()
        self.numbers = {rank: 0 for rank in range(len(HOSTS))}

    def watchdog(self, rank: int = 0, timeout_s: float = 300.0, hosts: Sequence[str] = HOSTS) -> Watchdog:
        for other in range(len(hosts)):
            if other != rank:
                self.beat(other)
        return Watchdog(self.store, rank, list(hosts), timeout_s, hosted_by_rank_0=True)

    def beat(
        self,
        rank: int,
        step: int = 0,
        phase: Phase = Phase.COMPUTING,
        age_s: float = 0,
        error: str = "",
        is_bug: bool = False,
    ) -> None:
        """A rank that is not this one says something new."""
        self.numbers[rank] = self.numbers.get(rank, 0) + 1
        heartbeat = Heartbeat(self.numbers[rank], step, phase, age_s, error, is_bug)
        self.store.set(f"heartbeat/{rank}", json.dumps(heartbeat))

    def run(
        self, watchdog: Watchdog, seconds: Sequence[float], each: Callable[[], None] = lambda: None
    ) -> Verdict | None:
        """Let the watchdog's threads look once after each of these spans of time, the one with the clock first.

        Returns the verdict, if one comes.
        """
        verdicts: list[Verdict] = []
        spans, is_over = list(seconds), False
        turn, turned = threading.Semaphore(0), threading.Semaphore(0)

        def wait(_: float) -> bool:
            nonlocal is_over
            if threading.current_thread() is guard:
                turned.release()
                turn.acquire()
                return is_over
            if not spans:
                return True
            self.now_s += spans.pop(0)
            each()
            turn.release()
            turned.acquire()
            return False

        def end(verdict: Verdict) -> None:
            verdicts.append(verdict)
            raise EndedError

        watchdog._over = SimpleNamespace(wait=wait)  # type: ignore[assignment]
        watchdog._end = end  # type: ignore[method-assign, assignment]
        watchdog._answered_s = watchdog._clock_s()
        guard = threading.Thread(target=watchdog._guard)
        guard.start()
        turned.acquire()
        try:
            watchdog._run()
        except EndedError:
            return verdicts[0]
        finally:
            is_over = True
            turn.release()
            guard.join()
        return None

    def beat_all(self) -> None:
        """All other ranks of three say something new."""
        self.beat(1)
        self.beat(2)


@pytest.fixture
def job(monkeypatch: pytest.MonkeyPatch) -> Job:
    return Job(monkeypatch)


def test_ranks_that_say_something_new_are_well(job: Job) -> None:
    watchdog = job.watchdog()
    assert job.run(watchdog, [1.0] * 100, job.beat_all) is None


def test_a_rank_that_falls_silent_is_lost(job: Job) -> None:
    watchdog = job.watchdog()
    assert job.run(watchdog, [1.0] * int(SILENT_S), lambda: job.beat(1)) is None
    verdict = job.run(watchdog, [1.0] * 3, lambda: job.beat(1))
    assert verdict
    assert verdict.cause == "rank_lost"
    assert verdict.sentence == f"rank 2 on c {LOST}; rank 2 was computing, step 0, for 0 s"


def test_the_other_ranks_watch_rank_0(job: Job) -> None:
    watchdog = job.watchdog(rank=1)
    assert job.run(watchdog, [1.0] * 100, lambda: job.beat(0)) is None  # rank 2 is rank 0's concern
    verdict = job.run(watchdog, [1.0] * 30)
    assert verdict
    assert verdict.sentence.startswith(f"rank 0 on a {LOST}; ")


def test_a_rank_that_has_left_may_be_silent(job: Job) -> None:
    watchdog = job.watchdog()
    job.beat(2, phase=Phase.LEFT)
    assert job.run(watchdog, [1.0] * 100, lambda: job.beat(1)) is None


def test_a_rank_with_a_bug_does_not_judge_itself(job: Job) -> None:
    watchdog = job.watchdog(rank=1)
    watchdog._error, watchdog._is_bug = "ZeroDivisionError: division by zero", True
    assert job.run(watchdog, [1.0] * 5, lambda: job.beat(0)) is None  # rank 0 says it


@pytest.mark.parametrize(("rank", "hosted_by_rank_0"), [(1, True), (1, False), (2, True), (0, True)])
def test_a_store_that_does_not_answer_is_noticed_by_the_clock(
    rank: int,
    hosted_by_rank_0: bool,
    job: Job,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    watchdog = Watchdog(job.store, rank, HOSTS, 300, hosted_by_rank_0=hosted_by_rank_0)
    watchdog._answered_s = watchdog._clock_s()
    codes: list[int] = []

    def end(code: int) -> None:
        codes.append(code)
        raise EndedError

    monkeypatch.setattr(os, "_exit", end)
    spans = [1.0] * 10 + [3600.0] + [1.0] * 20  # a pause is not time in which it did not answer

    def wait(_: float) -> bool:
        if not spans:
            return True
        job.now_s += spans.pop(0)
        return False

    watchdog._over = SimpleNamespace(wait=wait)  # type: ignore[assignment]
    with contextlib.suppress(EndedError):
        watchdog._guard()
    if rank == 0:  # whose own store it is, or who has others to look after
        assert codes == []
        return
    assert codes == [1]
    assert len(spans) == 31 - (SILENT_S + 1)  # the pause counts as one second
    who = "rank 0 on a" if hosted_by_rank_0 else "the store of the launcher"
    assert capsys.readouterr().err == (f"mnist-dist: {who} {LOST}\n" if rank == 1 else "")


@pytest.mark.parametrize("pause_s", [SILENT_S + 1, 3600.0, 1e7])
def test_a_pause_of_this_process_is_not_the_silence_of_the_others(pause_s: float, job: Job) -> None:
    """As where a job is suspended: the clock jumps, and the others have said nothing new yet."""
    watchdog = job.watchdog()
    assert job.run(watchdog, [1.0] * 5, job.beat_all) is None
    assert job.run(watchdog, [pause_s, 1.0, 1.0]) is None
    assert job.run(watchdog, [1.0] * 50, job.beat_all) is None
    assert job.run(watchdog, [pause_s], lambda: None) is None  # and a second one
    verdict = job.run(watchdog, [1.0] * 30, lambda: job.beat(1))  # who does not come back is lost all the same
    assert verdict
    assert verdict.sentence.startswith(f"rank 2 on c {LOST}; ")


@pytest.mark.parametrize("pause_s", [3600.0, 1e7])
def test_a_pause_is_not_time_in_which_nothing_moves(pause_s: float, job: Job) -> None:
    watchdog = job.watchdog(timeout_s=10)
    watchdog.at(Phase.EXCHANGING, 5)

    def beat_all() -> None:
        for rank in (1, 2):
            job.beat(rank, step=5, age_s=1e9)  # theirs does not count as long as this rank's own is short

    assert job.run(watchdog, [1.0, pause_s, 1.0, 1.0], beat_all) is None


def test_a_heartbeat_that_is_a_little_late_is_no_pause(job: Job) -> None:
    watchdog = job.watchdog()
    verdict = job.run(watchdog, [1 + PAUSE_S] * 10, lambda: job.beat(1))
    assert verdict
    assert verdict.cause == "rank_lost"


@pytest.mark.parametrize(
    ("mine", "others", "who"),
    [
        ((5, Phase.EXCHANGING), [(5, Phase.COMPUTING), (5, Phase.EXCHANGING)], "rank 1 on b hangs"),
        ((5, Phase.COMPUTING), [(5, Phase.EXCHANGING), (5, Phase.EXCHANGING)], "rank 0 on a hangs"),
        ((7, Phase.COMPUTING), [(7, Phase.COMPUTING), (6, Phase.MEETING)], "rank 2 on c hangs"),
        ((5, Phase.WAITING), [(5, Phase.EXCHANGING), (5, Phase.EXCHANGING)], "rank 1 on b, rank 2 on c hangs"),
        ((5, Phase.EXCHANGING), [(5, Phase.EXCHANGING)] * 2, "all ranks wait for each other"),
    ],
)
def test_the_rank_that_is_furthest_behind_hangs(
    mine: tuple[int, Phase], others: list[tuple[int, Phase]], who: str, job: Job
) -> None:
    watchdog = job.watchdog(timeout_s=10)
    watchdog.at(mine[1], mine[0])
    began_s = job.now_s

    def beat_all() -> None:
        for rank, (step, phase) in enumerate(others, 1):
            job.beat(rank, step, phase, age_s=job.now_s - began_s)

    assert job.run(watchdog, [1.0] * 10, beat_all) is None
    verdict = job.run(watchdog, [1.0], beat_all)
    assert verdict
    assert verdict.cause == "rank_hangs"
    assert verdict.sentence.startswith(f"{who}, and nothing has moved for timeout_s=10 s; rank 0 was ")
    assert f"step {mine[0]}, for 11 s, rank 1 was " in verdict.sentence


def test_nothing_hangs_as_long_as_one_rank_moves(job: Job) -> None:
    watchdog = job.watchdog(timeout_s=10)

    def beat_all() -> None:
        job.beat(1, age_s=1000)
        job.beat(2, age_s=9)

    assert job.run(watchdog, [1.0] * 100, beat_all) is None


def test_a_rank_with_a_bug_has_failed_at_once(job: Job) -> None:
    watchdog = job.watchdog()
    job.beat(1, error="RuntimeError: connection closed by peer")
    job.beat(2, error="ZeroDivisionError: division by zero", is_bug=True)
    verdict = job.run(watchdog, [1.0])
    assert verdict == Verdict("rank_failed", "rank 2 on c failed: ZeroDivisionError: division by zero")


def test_after_a_broken_collective_the_silent_rank_is_found_sooner(job: Job) -> None:
    watchdog = job.watchdog()

    def beat() -> None:
        job.beat(1, error="RuntimeError: connection closed by peer")

    assert job.run(watchdog, [1.0] * int(SILENT_AFTER_ERROR_S), beat) is None
    verdict = job.run(watchdog, [1.0] * 2, beat)
    assert verdict
    assert verdict.sentence.startswith(f"rank 2 on c {LOST}; ")


def test_ranks_that_all_live_and_cannot_reach_each_other_have_lost_touch(job: Job) -> None:
    watchdog = job.watchdog()
    began_s = job.now_s

    def beat_all() -> None:
        for rank in (1, 2):
            job.beat(rank, age_s=job.now_s - began_s, error="RuntimeError: connection reset")

    verdict = job.run(watchdog, [1.0] * 20, beat_all)
    assert verdict
    assert verdict.cause == "rank_lost"
    assert verdict.sentence.startswith("the ranks lost touch with each other (RuntimeError: connection reset); ")
    assert job.now_s - began_s == pytest.approx(2 * SILENT_AFTER_ERROR_S + 1)


def test_so_many_are_named_and_the_others_counted(job: Job) -> None:
    hosts = [f"n{number}" for number in range(MAX_NAMED + 6)]
    watchdog = job.watchdog(hosts=hosts)
    verdict = job.run(watchdog, [1.0] * 30)
    assert verdict
    names = ", ".join(f"rank {rank} on n{rank}" for rank in range(1, MAX_NAMED + 1))
    assert verdict.sentence.startswith(f"{names} and 5 more {LOST}; ")


def test_who_leaves_says_so(job: Job) -> None:
    watchdog = Watchdog(job.store, 1, HOSTS, 300, hosted_by_rank_0=True)
    job.beat(0)
    watchdog.start()
    watchdog.at(Phase.SAVING, 7)
    watchdog.leave()
    last = Heartbeat(*json.loads(job.store.get("heartbeat/1")))
    assert (last.step, last.phase, last.error) == (7, Phase.LEFT, "")


@pytest.mark.parametrize(("cause", "is_left"), [("rank_hangs", True), ("rank_lost", False)])
def test_where_ranks_hang_each_leaves_its_stack(cause: str, is_left: bool, job: Job, tmp_path: Path) -> None:
    watchdog = job.watchdog()
    watchdog.stack_file = tmp_path / "stack"
    watchdog._leave_stack(Verdict(cause, "a sentence"))
    assert watchdog.stack_file.exists() is is_left
    if is_left:
        assert "in test_where_ranks_hang_each_leaves_its_stack" in watchdog.stack_file.read_text()


@pytest.mark.parametrize(
    ("error", "is_lost"),
    [
        (RuntimeError("[gloo] Connection closed by peer [127.0.0.1]:1"), True),
        (RuntimeError("NCCL communicator was aborted"), True),
        (RuntimeError("Broken pipe"), True),
        (RuntimeError("shape mismatch"), False),
        (ValueError("connection"), False),
    ],
)
def test_a_broken_connection_is_told_from_a_bug(error: Exception, is_lost: bool) -> None:
    assert module._is_lost_connection(error) is is_lost
