"""Watches the ranks, so that one that dies or hangs is named, once, and takes the others with it.

Without this, the ranks that are left get an unreadable error from a collective (gloo), or wait in it for ever (NCCL).
Each rank has a thread that says over the job's store, once a second, that its process lives and what its main thread
last did. Rank 0's thread reads them all and is the judge; the others watch rank 0. After a verdict every process ends
with exit code 1, whatever its main thread is stuck in: no cleaning up can be trusted then, and whole checkpoints are
all that a restart needs.
"""

import contextlib
import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable
from enum import IntEnum
from typing import NamedTuple, NoReturn

from torch.distributed import Store

BEAT_S = 1.0
SILENT_S = 20.0  # without a beat for so long, a rank is taken for lost
SILENT_AFTER_ERROR_S = 4.0  # the same where a collective has failed already, so that somebody must be
EXIT_S = 3.0  # how long the judge waits for the others to hear the verdict
MAX_NAMED = 16  # ranks

_LOST = "does not answer: its process was killed or stopped, or its machine is lost"


class Phase(IntEnum):
    """What a rank does in a step, in the order in which it does it: who hangs is who is furthest behind."""

    STARTING = 0
    COMPUTING = 1
    EXCHANGING = 2
    MEETING = 3
    EVALUATING = 4
    SAVING = 5
    WAITING = 6
    LEFT = 7


_WORDS = {
    Phase.STARTING: "starting",
    Phase.COMPUTING: "computing",
    Phase.EXCHANGING: "exchanging gradients",
    Phase.MEETING: "exchanging losses",
    Phase.EVALUATING: "evaluating",
    Phase.SAVING: "saving the checkpoint",
    Phase.WAITING: "waiting for the checkpoint",
    Phase.LEFT: "done",
}


class Beat(NamedTuple):
    """What a rank says about itself."""

    number: int
    step: int
    phase: int
    age_s: float  # since when it does this
    error: str  # what was raised in its main thread
    is_bug: bool  # False: the error is a collective's, so another rank's fault or the network's


class Watch:
    """One rank's watch over the others."""

    def __init__(self, store: Store, rank: int, hosts: list[str], timeout_s: float, *, hosted_by_rank_0: bool) -> None:
        """`store` is a connection of this watch's own: a store serves one caller at a time."""
        self.store, self.rank, self.hosts, self.timeout_s = store, rank, hosts, timeout_s
        self.hosted_by_rank_0 = hosted_by_rank_0
        self.on_verdict: Callable[[str], None] = lambda _: None  # on rank 0: keep it in the run's record
        self._doing, self._since_s = (0, Phase.STARTING), time.monotonic()
        self._error, self._is_bug = "", False
        self._number = 0
        self._seen: dict[int, tuple[int, float]] = {}  # rank: its latest beat's number and when it was first seen
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
        self._say_beat()

    def start(self) -> None:
        """Watch from now on, once every rank has come here."""
        self._thread.start()

    def at(self, phase: Phase, step: int | None = None) -> None:
        """Note what this rank's main thread does now, and at which step if that is another. Costs next to nothing."""
        step = self._doing[0] if step is None else step
        self._doing, self._since_s = (step, phase), time.monotonic()

    def leave(self) -> None:
        """Stop watching and being watched: the run is over for this rank."""
        self._over.set()
        self._thread.join()
        self.at(Phase.LEFT)
        with contextlib.suppress(RuntimeError):  # rank 0 and its store have left already
            self._say_beat()

    def fail(self, error: Exception) -> NoReturn:
        """Something was raised that is not for a user: wait for the verdict, and end this process with it."""
        self._is_bug = not _is_lost_connection(error)
        if self._is_bug:
            traceback.print_exception(error)
        self._error = f"{type(error).__name__}: {error}".splitlines()[0]
        self._thread.join(3 * SILENT_AFTER_ERROR_S)
        if self.hosted_by_rank_0:  # the thread is still alive, so it waits for the store, which never answers
            self._speak(f"rank 0 on {self.hosts[0]} {_LOST}")
        os._exit(1)

    def _run(self) -> None:
        watched = list(range(1, len(self.hosts))) if self.rank == 0 else [0]
        try:
            while not self._over.wait(BEAT_S):
                own = self._say_beat()
                if self.store.check(["verdict"]):
                    self.store.add("heard", 1)
                    os._exit(1)
                beats = self.store.multi_get([f"beat/{rank}" for rank in watched])
                if verdict := self._judge(
                    {rank: Beat(*json.loads(b)) for rank, b in zip(watched, beats, strict=True)}, own
                ):
                    self._end(verdict)
        except RuntimeError:  # the store is gone
            if self.hosted_by_rank_0 and self.rank > 0 and not self._over.wait(EXIT_S):
                self._speak(f"rank 0 on {self.hosts[0]} {_LOST}")
                os._exit(1)

    def _say_beat(self) -> Beat:
        self._number += 1
        beat = Beat(self._number, *self._doing, time.monotonic() - self._since_s, self._error, self._is_bug)
        self.store.set(f"beat/{self.rank}", json.dumps(beat))
        return beat

    def _judge(self, others: dict[int, Beat], own: Beat) -> str:
        """What is wrong, in a sentence, or the empty string."""
        now = time.monotonic()
        for rank, beat in others.items():
            if self._seen.get(rank, (0, 0.0))[0] != beat.number:
                self._seen[rank] = (beat.number, now)
        beats = {self.rank: own, **others}

        for rank, beat in beats.items():
            if beat.is_bug:
                return f"rank {rank} on {self.hosts[rank]} failed: {beat.error}"
        error = next((beat.error for beat in beats.values() if beat.error), "")
        limit_s = SILENT_AFTER_ERROR_S if error else min(SILENT_S, self.timeout_s)
        silent = [r for r, b in others.items() if b.phase != Phase.LEFT and now - self._seen[r][1] > limit_s]
        if silent:
            return f"{self._names(silent)} {_LOST}; {_last_words(beats, silent)}"
        waited_s = min(beat.age_s for beat in beats.values())
        if error and waited_s > 2 * SILENT_AFTER_ERROR_S:
            return f"the ranks lost touch with each other ({error}); {_last_words(beats, list(beats))}"
        if self.rank == 0 and waited_s > self.timeout_s:
            behind = min((beat.step, beat.phase) for beat in beats.values())
            late = [rank for rank, beat in beats.items() if (beat.step, beat.phase) == behind]
            who = "all ranks wait for each other" if len(late) == len(beats) else f"{self._names(late)} hangs"
            return f"{who}, and nothing has moved for timeout_s={self.timeout_s:g} s; {_last_words(beats, list(beats))}"
        return ""

    def _names(self, ranks: list[int]) -> str:
        names = [f"rank {rank} on {self.hosts[rank]}" for rank in ranks[:MAX_NAMED]]
        return ", ".join(names) + (f" and {len(ranks) - MAX_NAMED} more" if len(ranks) > MAX_NAMED else "")

    def _end(self, verdict: str) -> NoReturn:
        """Tell everybody, and end this process."""
        self._speak(verdict)
        if self.rank == 0:
            self.on_verdict(verdict)
            self.store.set("verdict", verdict)
            deadline_s = time.monotonic() + EXIT_S  # the store may be this process's own: let the others read it
            while self.store.add("heard", 0) < len(self.hosts) - 1 and time.monotonic() < deadline_s:
                time.sleep(0.05)
        os._exit(1)

    def _speak(self, verdict: str) -> None:
        if self.rank <= 1:  # where it is rank 0 that is lost, rank 1 says so
            print(f"mnist-dist: {verdict}", file=sys.stderr, flush=True)


def _last_words(beats: dict[int, Beat], ranks: list[int]) -> str:
    """What these ranks last did."""
    lines = [
        f"rank {r} was {_WORDS[Phase(beats[r].phase)]}, step {beats[r].step}, for {beats[r].age_s:.0f} s"
        for r in ranks[:MAX_NAMED]
    ]
    return ", ".join(lines)


def _is_lost_connection(error: Exception) -> bool:
    """Whether this is what a collective raises when another rank has gone: gloo and the store have no type for it."""
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(
        word in text for word in ("connection", "gloo", "nccl", "timed out", "timeout", "peer", "broken pipe", "socket")
    )
