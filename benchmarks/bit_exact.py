"""What bit_exact costs: training images/s with it beside the ordinary exchange, in alternating runs.

    python -m benchmarks.bit_exact [--models mlp cnn] [--steps 300] [--rounds 3] [--json FILE]

Every rank has one thread. With as many shards as ranks only the way to sum differs; on one rank, the shards run one
after another.
"""

import argparse
import statistics

from benchmarks.common import train, write
from mnist_dist.distributed.device import processor_name

CASES = [(1, 0), (1, 1), (1, 2), (1, 4), (1, 8), (2, 0), (2, 2), (4, 0), (4, 4)]  # ranks, bit_exact


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", nargs="+", default=["mlp", "cnn"], choices=["mlp", "cnn"])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", default="", metavar="FILE")
    options = parser.parse_args()
    print(processor_name())
    rows = []
    for model in options.models:
        arguments = [f"model={model}", f"max_steps={options.steps}", "precision=fp32", "threads=1"]
        seconds: dict[tuple[int, int], list[float]] = {case: [] for case in CASES}
        for _ in range(options.rounds):
            for (ranks, shards), measured in seconds.items():
                measured.append(train([*arguments, f"bit_exact={shards}"], ranks)["seconds"] / options.steps)
        for (ranks, shards), measured in seconds.items():
            step_s = statistics.median(measured)
            ratio = step_s / statistics.median(seconds[ranks, 0])
            shown = ", ".join(f"{1e3 * s:.2f}" for s in measured)
            print(f"{model}, {ranks} ranks, bit_exact={shards}: {1e3 * step_s:.2f} ms, {ratio:.2f} times  ({shown})")
            rows.append({"model": model, "ranks": ranks, "bit_exact": shards, "seconds": measured, "ratio": ratio})
    write(options.json, {"rows": rows})


if __name__ == "__main__":
    main()
