"""Trains a recipe with several seeds and tells mean and spread.

python -m benchmarks.accuracy configs/cnn.yaml --seeds 0 1 2 3 4 [--json FILE] [key=value ...]
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
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--json", default="", metavar="FILE")
    options = parser.parse_intermixed_args()
    rows = []
    print(f"{options.recipe} {' '.join(options.overrides)}\n{processor_name()}")
    for seed in options.seeds:
        done = train([options.recipe, f"seed={seed}", *options.overrides])
        last = {e["split"]: 100 * e["accuracy"] for e in done["evaluations"]}
        rows.append({"seed": seed, "seconds": done["seconds"], "precision": done["precision"], **last})
        show(rows[-1])
    summary = {}
    for key in (key for key in rows[0] if key not in ("seed", "precision")):
        values = [float(row[key]) for row in rows]
        spread = statistics.stdev(values) if len(values) > 1 else 0.0
        summary[key] = {"mean": statistics.mean(values), "stdev": spread, "min": min(values), "max": max(values)}
        print(f"{key}: mean {statistics.mean(values):.3f}, stdev {spread:.3f}, {min(values):.2f} to {max(values):.2f}")
    write(options.json, {"rows": rows, "summary": summary})


if __name__ == "__main__":
    main()
