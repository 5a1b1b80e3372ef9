"""Watches the ranks, so that one that dies or hangs is named, once, and takes the others with it.

Without this, the ranks that are left get an unreadable error from a collective (gloo), or wait in it for ever (NCCL).
Each rank has a thread that says over the job's store, once a second, that its process lives and what its main thread
last did. Rank 0's thread reads them all and is the judge; the others watch rank 0. After a verdict every process ends
with exit code 1, whatever its main thread is stuck in: no cleaning up can be trusted then, and whole checkpoints are
all that a restart needs.
"""

import contextlib
import faulthandler
import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable
from enum import IntEnum
from pathlib import Path
from typing import NamedTuple, NoReturn

from torch.distributed import Store

HEARTBEAT_S = 1.0
SILENT_S = 20.0  # without a heartbeat for so long, a rank is taken for lost
SILENT_AFTER_ERROR_S = 4.0  # the same where a collective has failed already, so that somebody must be
PAUSE_S = 3.0  # a heartbeat that is late by more means that this process itself was suspended
EXIT_S = 3.0  # how long the judge waits for the others to hear the verdict
MAX_NAMED = 16  # ranks

_LOST = "does not answer: its process was killed or stopped, or its machine is lost"


class Phase(IntEnum):
    """What a rank does in a step, in the order in which it does it: who hangs is who is furthest behind."""

    STARTING = 0
    COMPUTING = 1
    EXCHANGING = 2
    UPDATING = 3
    MEETING = 4
    EVALUATING = 5
    SAVING = 6
    WAITING = 7
    LEFT = 8


_WORDS = {
    Phase.STARTING: "starting",
    Phase.COMPUTING: "computing",
    Phase.EXCHANGING: "exchanging gradients",
    Phase.UPDATING: "updating the weights",
    Phase.MEETING: "exchanging losses",
    Phase.EVALUATING: "evaluating",
    Phase.SAVING: "saving the checkpoint",
    Phase.WAITING: "waiting for the checkpoint",
    Phase.LEFT: "done",
}


class Heartbeat(NamedTuple):
    """What a rank says about itself."""

    number: int
    step: int
    phase: int
    age_s: float  # since when it does this
    error: str  # what was raised in its main thread
    is_bug: bool  # False: the error is a collective's, so another rank's fault or the network's


class Verdict(NamedTuple):
    """What is wrong, for scripts and for a person."""

    cause: str  # rank_lost, rank_hangs or rank_failed
    sentence: str


class Watchdog:
    """One rank's watch over the others."""

    def __init__(self, store: Store, rank: int, hosts: list[str], timeout_s: float, *, hosted_by_rank_0: bool) -> None:
        """`store` is a connection of the watchdog's own: a store serves one caller at a time."""
        self.store, self.rank, self.hosts, self.timeout_s = store, rank, hosts, timeout_s
        self.hosted_by_rank_0 = hosted_by_rank_0
        self.on_verdict: Callable[[Verdict], None] = lambda _: None  # on rank 0: keep it in the run's record
        self.stack_file: Path | None = None  # for what this rank's threads do, where ranks hang
        self._paused_s = 0.0  # in which this process was suspended, and did not see the others
        self._doing, self._since_s = (0, Phase.STARTING), self._clock_s()
        self._error, self._is_bug = "", False
        self._number = 0
        self._seen: dict[int, tuple[int, float]] = {}  # rank: its latest heartbeat's number and when it was first seen
        self._answered_s = 0.0  # when the store last did
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)
        self._send_heartbeat()

    def start(self) -> None:
        """Watch from now on, once every rank has come here."""
        self._answered_s = self._clock_s()
        self._thread.start()
        threading.Thread(target=self._guard, name="watchdog's clock", daemon=True).start()

    def keys(self) -> list[str]:
        """Where the ranks that this one watches leave their heartbeats in the store."""
        return [f"heartbeat/{rank}" for rank in (range(1, len(self.hosts)) if self.rank == 0 else [0])]

    def at(self, phase: Phase, step: int | None = None) -> None:
        """Note what this rank's main thread does now, and at which step if that is another. Costs next to nothing."""
        step = self._doing[0] if step is None else step
        self._doing, self._since_s = (step, phase), self._clock_s()

    def leave(self) -> None:
        """Stop watching and being watched: the run is over for this rank."""
        self._over.set()
        self._thread.join()
        self.at(Phase.LEFT)
        with contextlib.suppress(RuntimeError):  # rank 0 and its store have left already
            self._send_heartbeat()

    def fail(self, error: Exception) -> NoReturn:
        """Something was raised that is not for a user: wait for the verdict, and end this process with it."""
        self._is_bug = not _is_lost_connection(error)
        if self._is_bug:
            traceback.print_exception(error)
        self._error = f"{type(error).__name__}: {error}".splitlines()[0]
        self._thread.join(3 * SILENT_AFTER_ERROR_S)
        if self.hosted_by_rank_0:  # the thread is still alive, so it waits for the store, which never answers
            self._speak(f"{self._names([0])} {_LOST}")
        os._exit(1)

    def _clock_s(self) -> float:
        """Seconds in which this process could run. Ranks that were all suspended for a while are not late."""
        return time.monotonic() - self._paused_s

    def _run(self) -> None:
        try:
            began_s = time.monotonic()
            while not self._over.wait(HEARTBEAT_S):
                is_late = time.monotonic() - began_s > HEARTBEAT_S + PAUSE_S
                began_s = time.monotonic()
                if is_late:
                    continue  # suspended, perhaps: the other thread puts the clock right
                self._watch()
                self._answered_s = self._clock_s()
        except RuntimeError:  # the store is gone
            if self.hosted_by_rank_0 and self.rank > 0 and not self._over.wait(EXIT_S):
                self._speak(f"{self._names([0])} {_LOST}")
                os._exit(1)

    def _guard(self) -> None:
        """Notice a pause, and a store that is gone, for which the other thread may wait for ever."""
        last_s = time.monotonic()
        while not self._over.wait(HEARTBEAT_S):
            late_s = time.monotonic() - last_s - HEARTBEAT_S
            if late_s > PAUSE_S:
                self._paused_s += late_s
            last_s = time.monotonic()
            if self.rank > 0 and self._clock_s() - self._answered_s > min(SILENT_S, self.timeout_s):
                self._speak(f"{self._names([0]) if self.hosted_by_rank_0 else 'the store of the launcher'} {_LOST}")
                os._exit(1)

    def _watch(self) -> None:
        began_s = time.monotonic()
        own = self._send_heartbeat()
        if self.store.check(["verdict"]):
            verdict = Verdict(*json.loads(self.store.get("verdict")))
            self.store.add("heard", 1)
            self._leave_stack(verdict)
            os._exit(1)
        latest = zip(self.keys(), self.store.multi_get(self.keys()), strict=True)
        others = {int(key.rpartition("/")[2]): Heartbeat(*json.loads(data)) for key, data in latest}
        if time.monotonic() - began_s > PAUSE_S:
            return  # suspended in here, perhaps: what was read may be old
        if found := self._judge(others, own):
            self._end(found)

    def _send_heartbeat(self) -> Heartbeat:
        self._number += 1
        age_s = self._clock_s() - self._since_s
        heartbeat = Heartbeat(self._number, *self._doing, age_s, self._error, self._is_bug)
        self.store.set(f"heartbeat/{self.rank}", json.dumps(heartbeat))
        return heartbeat

    def _judge(self, others: dict[int, Heartbeat], own: Heartbeat) -> Verdict | None:
        """What is wrong, if anything is."""
        now_s = self._clock_s()
        for rank, heartbeat in others.items():
            if self._seen.get(rank, (0, 0.0))[0] != heartbeat.number:
                self._seen[rank] = (heartbeat.number, now_s)
        latest = {self.rank: own, **others}

        for rank, heartbeat in (latest if self.rank == 0 else others).items():
            if heartbeat.is_bug:
                return Verdict("rank_failed", f"{self._names([rank])} failed: {heartbeat.error}")
        error = next((heartbeat.error for heartbeat in latest.values() if heartbeat.error), "")
        limit_s = SILENT_AFTER_ERROR_S if error else min(SILENT_S, self.timeout_s)
        silent = [r for r, h in others.items() if h.phase != Phase.LEFT and now_s - self._seen[r][1] > limit_s]
        if silent:
            return Verdict("rank_lost", f"{self._names(silent)} {_LOST}; {_last_words(latest, silent)}")
        waited_s = min(heartbeat.age_s for heartbeat in latest.values())
        if error and waited_s > 2 * SILENT_AFTER_ERROR_S:
            words = _last_words(latest, list(latest))
            return Verdict("rank_lost", f"the ranks lost touch with each other ({error}); {words}")
        if self.rank == 0 and waited_s > self.timeout_s:
            behind = min((heartbeat.step, heartbeat.phase) for heartbeat in latest.values())
            late = [rank for rank, heartbeat in latest.items() if (heartbeat.step, heartbeat.phase) == behind]
            who = "all ranks wait for each other" if len(late) == len(latest) else f"{self._names(late)} hangs"
            words = _last_words(latest, list(latest))
            return Verdict("rank_hangs", f"{who}, and nothing has moved for timeout_s={self.timeout_s:g} s; {words}")
        return None

    def _names(self, ranks: list[int]) -> str:
        names = [f"rank {rank} on {self.hosts[rank]}" for rank in ranks[:MAX_NAMED]]
        return ", ".join(names) + (f" and {len(ranks) - MAX_NAMED} more" if len(ranks) > MAX_NAMED else "")

    def _end(self, verdict: Verdict) -> NoReturn:
        """Tell everybody, and end this process."""
        self._speak(verdict.sentence)
        if self.rank == 0:
            self.on_verdict(verdict)
            self.store.set("verdict", json.dumps(verdict))
            self._leave_stack(verdict)
            deadline_s = time.monotonic() + EXIT_S  # the store may be this process's own: let the others read it
            while self.store.add("heard", 0) < len(self.hosts) - 1 and time.monotonic() < deadline_s:
                time.sleep(0.05)
        os._exit(1)

    def _leave_stack(self, verdict: Verdict) -> None:
        """Where ranks hang, each leaves what its threads were doing."""
        if verdict.cause == "rank_hangs" and self.stack_file:
            with contextlib.suppress(OSError), self.stack_file.open("w") as file:
                faulthandler.dump_traceback(file)

    def _speak(self, sentence: str) -> None:
        if self.rank <= 1:  # where it is rank 0 that is lost, rank 1 says so
            print(f"mnist-dist: {sentence}", file=sys.stderr, flush=True)


def _last_words(latest: dict[int, Heartbeat], ranks: list[int]) -> str:
    """What these ranks last did."""
    lines = [
        f"rank {r} was {_WORDS[Phase(latest[r].phase)]}, step {latest[r].step}, for {latest[r].age_s:.0f} s"
        for r in ranks[:MAX_NAMED]
    ]
    return ", ".join(lines)


def _is_lost_connection(error: Exception) -> bool:
    """Whether this is what a collective raises when another rank has gone: gloo and the store have no type for it."""
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(
        word in text for word in ("connection", "gloo", "nccl", "timed out", "timeout", "peer", "broken pipe", "socket")
    )
