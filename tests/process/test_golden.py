"""The tutorials' recipes still have the losses that they had."""

from pathlib import Path

import pytest

from tests.golden import NUM_STEPS, RECIPES, TOLERANCE, curve, path


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_losses_are_the_golden_ones(recipe: str, tmp_path: Path) -> None:
    golden = [float(line) for line in path(recipe).read_text().split()]
    now = curve(recipe, tmp_path)
    assert len(now) == len(golden) == NUM_STEPS
    assert now[:10] == pytest.approx(golden[:10], abs=1e-4)
    assert now == pytest.approx(golden, abs=TOLERANCE)
