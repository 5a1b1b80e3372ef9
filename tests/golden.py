"""The golden loss curves: the first 100 losses of each tutorial recipe on one CPU rank in full precision.

    python -m tests.golden      writes tests/golden/RECIPE.txt anew

They are on drawn digits, so that they can be checked anywhere. A change that claims to change nothing shows identical
losses on the same machine; another CPU sums in another order, which the test's tolerance allows for.
"""

import tempfile
from pathlib import Path

from tests.conftest import REPOSITORY, losses, make_data, run_ranks

RECIPES = ("tutorial-mlp", "tutorial-cnn")
NUM_STEPS = 100
TOLERANCE = 2e-3  # in nats; two orders of summation are up to 1e-3 apart after 100 steps of the CNN


def curve(recipe: str, folder: Path) -> list[float]:
    """The first losses of a recipe, trained in a real process."""
    data_dir = make_data(folder / "data", num_train=4000)
    what = ["dataset=synthetic", f"data_dir={data_dir}", f"max_steps={NUM_STEPS}", "evaluate_train=false"]
    arguments = [REPOSITORY / "configs" / f"{recipe}.yaml", *what, "log_every_steps=1", "threads=1", "run_dir=run"]
    result = run_ranks(arguments, folder)
    assert result.code == 0, result.output
    return losses(folder / "run")


def path(recipe: str) -> Path:
    """Where a recipe's golden losses are."""
    return Path(__file__).parent / "golden" / f"{recipe}.txt"


def main() -> None:
    """Write them all."""
    for recipe in RECIPES:
        with tempfile.TemporaryDirectory() as folder:
            values = curve(recipe, Path(folder))
        path(recipe).write_text("".join(f"{loss!r}\n" for loss in values))
        print(path(recipe))


if __name__ == "__main__":
    main()
