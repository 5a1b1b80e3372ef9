"""What counts as a change since an earlier measurement."""

import copy
import json
from typing import Any

import pytest

from mnist_dist.errors import RequestError
from mnist_dist.speed.changes import check_format, compare, list_times
from tests.unit.speed.samples import make_summary


@pytest.fixture
def summary() -> dict[str, Any]:
    """As it is read from a file."""
    return json.loads(json.dumps(make_summary(2)))  # type: ignore[no-any-return]


def test_a_measurement_against_itself_has_not_changed(summary: dict[str, Any]) -> None:
    comparison = compare(summary, summary)
    assert comparison.changed == comparison.obstacles == comparison.versions == []
    assert comparison.only_before == comparison.only_now == []
    assert comparison.unchanged == list(list_times(summary))
    assert len(comparison.unchanged) == len(summary["steps"]) + len(summary["exchanges"])


def scale(row: dict[str, Any], factor: float) -> None:
    for key in ("median", "q1", "q3"):
        row[key] *= factor


def test_what_changed_beyond_the_quartiles_is_named(summary: dict[str, Any]) -> None:
    before = copy.deepcopy(summary)
    scale(before["steps"][0]["step_s"], 0.5)
    scale(before["exchanges"][0]["exchange_s"], 3)
    scale(before["steps"][1]["step_s"], 1.001)  # within the noise, which is 1 %
    names = [change.name for change in compare(before, summary).changed]
    case, exchange = summary["steps"][0], summary["exchanges"][0]
    assert names == [
        f"step, {case['model']}, batch {case['batch_size']}, 1 rank x 2 threads",
        f"exchange of {exchange['bytes']:,} bytes, 2 ranks x 1 thread",
    ]
    slower, faster = map(str, compare(before, summary).changed)
    assert slower.endswith("2.00 x slower")
    assert faster.endswith("3.00 x faster")


def test_figures_of_one_measurement_only_are_not_compared(summary: dict[str, Any]) -> None:
    before = copy.deepcopy(summary)
    del summary["steps"][0], before["exchanges"][0]
    comparison = compare(before, summary)
    assert [name.split(",")[0] for name in comparison.only_before] == ["step"]
    assert [name.split(" of")[0] for name in comparison.only_now] == ["exchange"]
    assert len(comparison.unchanged) == len(summary["steps"]) + len(before["exchanges"])


@pytest.mark.parametrize(
    ("place", "key", "words"), [("hardware", "cores", "machine: cores"), ("request", "ema", "request: ema")]
)
def test_another_machine_or_request_is_not_compared(place: str, key: str, words: str, summary: dict[str, Any]) -> None:
    before = copy.deepcopy(summary)
    before[place][key] = 0.75
    comparison = compare(before, summary)
    assert comparison.obstacles == [f"{words} was 0.75 and is {summary[place][key]}"]
    assert comparison.changed == comparison.unchanged == []


def test_other_versions_are_what_one_compares(summary: dict[str, Any]) -> None:
    before = copy.deepcopy(summary)
    before["versions"]["torch"] = "1.0"
    comparison = compare(before, summary)
    assert comparison.versions == [f"version: torch was 1.0 and is {summary['versions']['torch']}"]
    assert comparison.unchanged


@pytest.mark.parametrize("damage", ["nothing", "a list", "format", "steps", "no number", "no time"])
def test_a_file_of_another_kind_is_refused(damage: str, summary: dict[str, Any]) -> None:
    content: Any = summary
    if damage == "nothing":
        content = {}
    elif damage == "a list":
        content = []
    elif damage == "format":
        summary["format"] = 99
    elif damage == "steps":
        del summary["steps"]
    else:
        summary["steps"][0]["step_s"]["median"] = "fast" if damage == "no number" else 0.0
    with pytest.raises(RequestError, match=r"--against before\.json "):
        check_format(content, "before.json")
    assert check_format(make_summary(1), "before.json")
