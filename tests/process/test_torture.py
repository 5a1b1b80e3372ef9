"""A tenth of the kill campaign (tests/torture.py)."""

from pathlib import Path

import pytest

from tests.torture import KINDS, campaign


@pytest.mark.parametrize(("num_runs", "kind"), [(16, "one rank"), (4, "two ranks"), (5, "bit_exact")])
def test_a_run_that_is_killed_anywhere_ends_as_if_it_had_not_been(num_runs: int, kind: str, tmp_path: Path) -> None:
    assert sum(campaign(tmp_path, num_runs, KINDS[kind], seed=1).values()) >= num_runs
