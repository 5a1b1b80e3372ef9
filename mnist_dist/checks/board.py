"""Where the ranks of a check leave values for each other, each within a deadline, so that no rank waits for ever."""

import json
import time
from typing import Any

from torch.distributed import Store

POLL_S = 0.01
SLACK_S = 3.0  # that the others wait for rank 0 longer than it waits for them


class RankZeroLostError(Exception):
    """Rank 0, which collects, does not answer."""


class Board:
    """Values in the job's store."""

    def __init__(self, store: Store | None, rank: int, size: int) -> None:
        """`store` is None for a lone rank."""
        self.store, self.rank, self.size = store, rank, size
        self.silent: dict[int, str] = {}  # rank: the first gathering to which it did not come

    def collect(self, name: str, value: Any, timeout_s: float) -> list[Any]:
        """Leave a value; on rank 0 every rank's value, None for one that did not come in time. Collective.

        A rank that once did not come is not waited for again. Raises RankZeroLostError.
        """
        if self.store is None:
            return [json.loads(json.dumps(value))]
        try:
            self.store.set(f"{name}/{self.rank}", json.dumps(value))
            if self.rank:
                return []
            awaited = [rank for rank in range(self.size) if rank not in self.silent]
            self._await([f"{name}/{rank}" for rank in awaited], timeout_s)
            came = {rank for rank in awaited if self.store.check([f"{name}/{rank}"])}
            self.silent |= {rank: name for rank in awaited if rank not in came}
            return [json.loads(self.store.get(f"{name}/{r}")) if r in came else None for r in range(self.size)]
        except RuntimeError:  # the store is gone, and rank 0 with it
            raise RankZeroLostError from None

    def gather(self, name: str, value: Any, timeout_s: float) -> list[Any]:
        """The same, on every rank. Collective. Raises RankZeroLostError."""
        values = self.collect(name, value, timeout_s)
        if self.store is None:
            return values
        if self.rank == 0:
            self.show(f"{name}/all", [values, self.silent])
        values, silent = self.read(f"{name}/all", timeout_s + SLACK_S)
        self.silent = {int(rank): where for rank, where in silent.items()}
        return list(values)

    def show(self, name: str, value: Any) -> None:
        """Leave something for all ranks, on rank 0."""
        if self.store:
            self.store.set(name, json.dumps(value))

    def read(self, name: str, timeout_s: float) -> Any:
        """What rank 0 left. Raises RankZeroLostError where it did not come in time."""
        try:
            self._await([name], timeout_s)
            if self.store and self.store.check([name]):
                return json.loads(self.store.get(name))
        except RuntimeError:  # the store is gone
            pass
        raise RankZeroLostError

    def leave(self, wait_s: float) -> None:
        """Say that this rank has read all; rank 0 waits for the others, whose store may be its own."""
        if self.store is None:
            return
        try:
            self.store.add("left", 1)
            deadline_s = time.monotonic() + wait_s
            while self.store.add("left", 0) < self.size - len(self.silent) and time.monotonic() < deadline_s:
                time.sleep(POLL_S)
        except RuntimeError:  # rank 0 has left
            return

    def _await(self, keys: list[str], timeout_s: float) -> None:
        deadline_s = time.monotonic() + timeout_s
        while self.store and not self.store.check(keys) and time.monotonic() < deadline_s:
            time.sleep(POLL_S)
