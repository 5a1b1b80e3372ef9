"""Trains a recipe with one rank and with several, and compares curve and accuracy.

python -m benchmarks.rank_accuracy configs/cnn.yaml [--ranks 1 2] [--json FILE] [key=value ...]
"""

import argparse
import statistics

from benchmarks.common import show, train, write
from mnist_dist.distributed.device import processor_name


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("recipe")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--json", default="", metavar="FILE")
    options = parser.parse_intermixed_args()
    print(f"{options.recipe} {' '.join(options.overrides)}\n{processor_name()}")
    rows = []
    first: list[float] = []
    for ranks in options.ranks:
        done = train([options.recipe, "log_every_steps=1", *options.overrides], ranks=ranks)
        curve = [record["loss"] for record in done["steps"]]
        first = first or curve
        apart = [abs(a - b) for a, b in zip(curve, first, strict=True)]
        rows.append(
            {
                "ranks": ranks,
                "seconds": done["seconds"],
                "test": 100 * done["accuracy"],
                "apart_first_20_steps": max(apart[:20]),
                "apart_median": statistics.median(apart),
                "apart_most": max(apart),
            }
        )
        show(rows[-1])
    write(options.json, {"rows": rows})


if __name__ == "__main__":
    main()
