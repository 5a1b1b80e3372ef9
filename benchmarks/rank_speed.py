"""Training images/s of two ranks with one thread each beside one rank with two threads, at the same global batch.

    python -m benchmarks.rank_speed [--rounds 3] [--json FILE] [CASE ...]        a CASE is MODEL:BATCH

Each round trains every case both ways for some seconds, in turn; the ratio is that of the medians.
"""

import argparse
import statistics

from benchmarks.common import train, write
from mnist_dist.distributed.device import processor_name

CASES = ["cnn:256", "mlp:2048", "mlp:64"]
EPOCHS = {"cnn": 1, "mlp": 3}


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("cases", nargs="*", default=CASES, metavar="CASE")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", default="", metavar="FILE")
    options = parser.parse_args()
    print(processor_name())
    rows = []
    for case in options.cases:
        model, _, batch = case.partition(":")
        arguments = [f"model={model}", f"batch_size={batch}", f"epochs={EPOCHS[model]}", "precision=no"]
        rates: dict[int, list[float]] = {1: [], 2: []}
        for _ in range(options.rounds):
            for ranks, found in rates.items():
                done = train([*arguments, f"threads={2 // ranks}"], ranks)
                found.append(EPOCHS[model] * done["images"] / done["seconds"])
        one, two = (statistics.median(found) for found in rates.values())
        shown = "  ".join(f"{ranks} x {2 // ranks}: {', '.join(f'{r:,.0f}' for r in rates[ranks])}" for ranks in rates)
        print(f"{model}, global batch {batch}: ratio {two / one:.2f}   images/s, ranks x threads: {shown}", flush=True)
        rows.append({"model": model, "batch_size": int(batch), "images_per_s": rates, "ratio": two / one})
    write(options.json, {"rows": rows})


if __name__ == "__main__":
    main()
