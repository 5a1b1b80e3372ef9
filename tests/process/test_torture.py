"""A tenth of the kill campaign (tests/torture.py)."""

from pathlib import Path

import pytest

from tests.torture import campaign


@pytest.mark.parametrize(("num_runs", "world_size"), [(20, 1), (5, 2)])
def test_a_run_that_is_killed_anywhere_ends_as_if_it_had_not_been(
    num_runs: int, world_size: int, tmp_path: Path
) -> None:
    assert sum(campaign(tmp_path, num_runs, world_size, seed=1).values()) >= num_runs
