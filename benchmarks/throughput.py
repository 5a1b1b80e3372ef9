"""Training images/s of the job beside other ways of training the same network, in alternating runs.

    python -m benchmarks.throughput [--models mlp cnn] [--precisions no bf16] [--against tutorial bare ...]
                                    [--rounds 3] [--json FILE]

Each round runs every contender once, each in a process of its own, one epoch at the tutorial's batch size; the ratio is
that of the medians. A contender that is not installed is left out, and said so.
"""

import argparse
import json
import statistics
import sys

from benchmarks.common import REPOSITORY, data_dir, run, train, write
from benchmarks.loops import LOOPS
from mnist_dist.distributed.device import processor_name

ONLY_FP32 = ("tutorial", "example", "keras_torch", "keras_jax")


def other(loop: str, model: str, precision: str) -> tuple[float, int] | None:
    """Seconds of an epoch and peak memory of another way, or None where it does not run."""
    command = [sys.executable, "-m", "benchmarks.loops", loop, model, precision, data_dir()]
    ended = run(command)
    if ended.code:
        print(f"{loop} does not run: {(ended.errors.strip().splitlines() or ['no message'])[-1]}", file=sys.stderr)
        return None
    return json.loads(ended.output.splitlines()[-1])["seconds"], ended.peak_bytes


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", nargs="+", default=["mlp", "cnn"], choices=["mlp", "cnn"])
    parser.add_argument("--precisions", nargs="+", default=["no", "bf16"], choices=["no", "bf16"])
    parser.add_argument("--against", nargs="+", default=["tutorial", "bare", "bare_tuned"], choices=sorted(LOOPS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", default="", metavar="FILE")
    options = parser.parse_args()
    rows = []
    print(processor_name())
    print(f"{'model':>5} {'way':>14} {'precision':>9} {'median s':>9} {'images/s':>9} {'peak MB':>8}  all")
    for model in options.models:
        loops = [(loop, p) for loop in options.against for p in (["no"] if loop in ONLY_FP32 else options.precisions)]
        found: dict[tuple[str, str], list[tuple[float, int]]] = {}
        for _ in range(options.rounds):
            for precision in options.precisions:
                recipe = str(REPOSITORY / f"configs/tutorial-{model}.yaml")
                done = train([recipe, "epochs=1", "evaluate_train=false", f"precision={precision}"])
                found.setdefault(("ours", precision), []).append((done["seconds"], done["peak_bytes"]))
            for loop, precision in list(loops):
                if (measured := other(loop, model, precision)) is None:
                    loops.remove((loop, precision))
                else:
                    found.setdefault((loop, precision), []).append(measured)
        for (loop, precision), values in found.items():
            seconds = [value[0] for value in values]
            median, peak = statistics.median(seconds), statistics.median(value[1] for value in values)
            rows.append({"model": model, "way": loop, "precision": precision, "seconds": seconds, "peak_bytes": peak})
            runs = " ".join(f"{s:.2f}" for s in seconds)
            line = f"{model:>5} {loop:>14} {precision:>9} {median:>9.2f} {60_000 / median:>9,.0f} {peak / 1e6:>8.0f}"
            print(f"{line}  {runs}", flush=True)
        for precision in options.precisions:
            ours = statistics.median(value[0] for value in found["ours", precision])
            for (loop, its), values in found.items():
                if loop != "ours" and (its == precision or loop in ONLY_FP32):
                    ratio = statistics.median(value[0] for value in values) / ours
                    print(f"{model} {precision}: {ratio:.2f} times the images/s of {loop}")
    write(options.json, {"rows": rows})


if __name__ == "__main__":
    main()
