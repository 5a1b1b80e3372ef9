"""Seconds of training to a mean test accuracy, beside the CNN tutorial's own ten epochs.

    python -m benchmarks.time_to_accuracy [--seeds 10] [--json FILE] [RECIPE ...]

Trains each recipe with seeds 0 to N-1. After each of the first ten seeds comes one epoch of the tutorial as written,
so that both see the same machine; the ten epochs are summed. The recipes were tuned with `validation=5000`.
"""

import argparse
import statistics
import sys

from benchmarks.common import show, train, write
from benchmarks.throughput import other
from mnist_dist.distributed.device import processor_name

RECIPES = ["configs/cnn-fast.yaml", "configs/cnn.yaml"]
TUTORIAL_EPOCHS = 10


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("recipes", nargs="*", default=RECIPES, metavar="RECIPE")
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--json", default="", metavar="FILE")
    options = parser.parse_args()
    print(processor_name())
    rows: list[dict[str, float | str]] = []
    epochs: list[float] = []
    for seed in range(options.seeds):
        for recipe in options.recipes:
            done = train([recipe, f"seed={seed}"])
            rows.append({"recipe": recipe, "seed": seed, "seconds": done["seconds"], "test": 100 * done["accuracy"]})
            show(rows[-1])
        if seed < TUTORIAL_EPOCHS:
            measured = other("tutorial", "cnn", "no")
            if measured is None:
                sys.exit("time_to_accuracy: the tutorial's loop, which the seconds are compared with, does not run")
            epochs.append(measured[0])
            show({"tutorial's epoch": seed, "seconds": epochs[-1]})
    tutorial_s = TUTORIAL_EPOCHS * statistics.mean(epochs)
    print(f"the CNN tutorial as written, {TUTORIAL_EPOCHS} epochs: {tutorial_s:.1f} s")
    for recipe in options.recipes:
        seconds, test = ([float(row[key]) for row in rows if row["recipe"] == recipe] for key in ("seconds", "test"))
        mean, spread = statistics.mean(test), statistics.stdev(test)
        mean_s = statistics.mean(seconds)
        print(f"{recipe}: {mean:.3f} % (standard deviation {spread:.3f}, {min(test):.2f} to {max(test):.2f})")
        print(
            f"    in {mean_s:.2f} s ({min(seconds):.2f} to {max(seconds):.2f}), {tutorial_s / mean_s:.1f} times sooner"
        )
    write(options.json, {"rows": rows, "tutorial_epochs_s": epochs})


if __name__ == "__main__":
    main()
