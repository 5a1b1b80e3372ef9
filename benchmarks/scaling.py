"""What a step costs at a world size: measured here, fitted, checked on a world size that the fit has not seen, and
carried over to clusters of GPUs.

    python -m benchmarks.scaling [--rounds 3] [--json FILE] [--plot FILE]

The model, in seconds, for a global batch of B images on W ranks that exchange n bytes of gradients:

    T(W) = f * max(1, W/C) + c * B/min(W, C) + alpha * log2(W) + beta * n * 2(W-1)/W

f is what a step costs a rank whatever its share, c what an image costs, C how many cores the ranks share (each has one
thread): on a cluster with a GPU a rank, C = W. The network's f and c are fitted to one rank, alpha and beta to two, and
the prediction for four is checked. Relative errors are minimised: a step of the MLP counts as much as one of the CNN.
"""

import argparse
import math
import statistics
from typing import Any, NamedTuple

import matplotlib as mpl
import numpy as np

from benchmarks.arithmetic import FLOP_PER_IMAGE
from benchmarks.common import train, write
from mnist_dist.distributed.device import processor_name, usable_cores
from mnist_dist.models import build_model, num_parameters

BATCHES = {"mlp": (64, 512, 4096), "cnn": (64, 256, 1024)}
STEPS = {64: 400, 256: 120, 512: 200, 1024: 40, 4096: 60}
WORLD_SIZES = (1, 2, 4)
BYTES = {model: 4 * num_parameters(build_model(model, 0)) for model in BATCHES}  # fp32 gradients

GPUS = tuple(2**k for k in range(3, 13))  # 8 to 4096
GPUS_PER_NODE = 8
GPU_BATCHES = (512, 4096, 32768)
# Assumed, not measured: a step replayed as one CUDA graph costs 0.1 ms whatever its share, and an image costs its
# operations at 30 % of the H100's 67 TFLOP/s (fp32, NVIDIA's data sheet).
GPU_FIXED_S = 1e-4
GPU_FLOP_PER_S = 0.3 * 67e12
# What NCCL itself reckons with when it chooses an algorithm (NVIDIA/nccl, src/graph/tuning.cc, tree with LL128).
NCCL_BASE_S, NCCL_NVLINK_S, NCCL_NETWORK_S = 14e-6, 1.2e-6, 8.5e-6
# NVIDIA's data sheets: NVLink of an H100 900 GB/s both ways; NDR InfiniBand 400 Gb/s, one adapter a GPU.
NVLINK_BYTES_PER_S, INFINIBAND_BYTES_PER_S = 450e9, 50e9


class Fit(NamedTuple):
    """The constants of the model."""

    fixed_s: dict[str, float]  # f
    image_s: dict[str, float]  # c
    alpha_s: float
    beta_s: float  # a byte


def predict(fit: Fit, model: str, batch: int, world_size: int, cores: int) -> float:
    """Seconds of a step."""
    compute = fit.fixed_s[model] * max(1, world_size / cores) + fit.image_s[model] * batch / min(world_size, cores)
    exchange = fit.alpha_s * math.log2(world_size) + fit.beta_s * BYTES[model] * 2 * (world_size - 1) / world_size
    return compute + exchange


def fit_all(measured: dict[tuple[str, int, int], float], cores: int) -> Fit:
    """Fit f and c to one rank, then alpha and beta to what two ranks need beyond that."""
    fixed_s, image_s = {}, {}
    for model, batches in BATCHES.items():
        times = np.array([measured[model, batch, 1] for batch in batches])
        columns = np.stack((np.ones(len(batches)), np.array(batches)), 1)
        fixed_s[model], image_s[model] = _fit_costs(columns, times, times)
    alone = Fit(fixed_s, image_s, 0.0, 0.0)
    cases = [(model, batch) for model, batches in BATCHES.items() for batch in batches]
    times = np.array([measured[model, batch, 2] for model, batch in cases])
    left = times - np.array([predict(alone, model, batch, 2, cores) for model, batch in cases])
    columns = np.array([(1.0, BYTES[model]) for model, _ in cases])
    return Fit(fixed_s, image_s, *_fit_costs(columns, left, times))


def _fit_costs(columns: Any, values: Any, scales: Any) -> list[float]:
    """Least squares relative to `scales`; what would be below zero is zero, since nothing costs less than nothing."""
    costs = np.zeros(columns.shape[1])
    kept = np.arange(columns.shape[1])
    while kept.size:
        found = np.linalg.lstsq(columns[:, kept] / scales[:, None], values / scales, rcond=None)[0]
        if (found >= 0).all():
            costs[kept] = found
            break
        kept = kept[found >= 0]
    return costs.tolist()  # type: ignore[no-any-return]


def on_gpus(model: str, batch: int, gpus: int) -> float:
    """Seconds of a step on a cluster of H100: reduced in each node, over the network, and handed back."""
    nodes, inside = -(-gpus // GPUS_PER_NODE), min(gpus, GPUS_PER_NODE)
    compute = GPU_FIXED_S + batch / gpus * FLOP_PER_IMAGE[model] / GPU_FLOP_PER_S
    if gpus == 1:
        return compute
    latency = NCCL_BASE_S + 2 * ((inside - 1) * NCCL_NVLINK_S + math.log2(nodes) * NCCL_NETWORK_S)
    links = 2 * (inside - 1) / inside / NVLINK_BYTES_PER_S
    network = 2 * (nodes - 1) / nodes / inside / INFINIBAND_BYTES_PER_S
    return compute + latency + BYTES[model] * (links + network)


def efficiency(model: str, batch: int, gpus: int) -> float:
    """Images/s a GPU, as a share of what one GPU alone has at the same global batch."""
    return on_gpus(model, batch, 1) / (gpus * on_gpus(model, batch, gpus))


def measure(rounds: int) -> dict[tuple[str, int, int], float]:
    """Seconds of a step of the job itself, for each network, global batch and world size: medians."""
    found: dict[tuple[str, int, int], list[float]] = {}
    for _ in range(rounds):
        for model, batches in BATCHES.items():
            for batch in batches:
                for world_size in WORLD_SIZES:
                    arguments = [f"model={model}", f"batch_size={batch}", f"max_steps={STEPS[batch]}", "epochs=5"]
                    done = train([*arguments, "precision=no", "threads=1"], world_size)
                    found.setdefault((model, batch, world_size), []).append(done["seconds"] / done["step"])
    return {case: statistics.median(seconds) for case, seconds in found.items()}


def plot(path: str, measured: dict[tuple[str, int, int], float], fit: Fit, cores: int) -> None:
    """Steps measured against the model's, and the efficiency predicted on GPUs."""
    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.2), layout="constrained")
    markers = {1: "o", 2: "s", 4: "^"}
    for (model, batch, world_size), seconds in measured.items():
        color = "tab:blue" if model == "mlp" else "tab:orange"
        is_first = batch == BATCHES[model][0]
        seen = "fitted" if world_size < WORLD_SIZES[-1] else "predicted"
        label = f"{model.upper()}, {world_size} rank{'s' * (world_size > 1)} ({seen})" if is_first else None
        predicted = predict(fit, model, batch, world_size, cores)
        filled = {"color": color} if world_size < WORLD_SIZES[-1] else {"color": color, "mfc": "none"}
        left.plot(1e3 * predicted, 1e3 * seconds, markers[world_size], label=label, **filled)
    ends = [1e3 * min(measured.values()) / 1.5, 1e3 * max(measured.values()) * 1.5]
    left.plot(ends, ends, color="0.7", zorder=0)
    left.set(xscale="log", yscale="log", xlabel="the model's step, ms", ylabel="measured step, ms")
    left.set_title("Here: two CPU cores, gloo")
    left.legend(fontsize=8)
    styles = dict(zip(GPU_BATCHES, (":", "--", "-"), strict=True))
    for model, color in (("mlp", "tab:blue"), ("cnn", "tab:orange")):
        for batch, style in styles.items():
            gpus = [n for n in GPUS if n <= batch]
            shares = [100 * efficiency(model, batch, n) for n in gpus]
            right.plot(gpus, shares, style, color=color, label=f"{model.upper()}, batch {batch:,}")
    right.set(xlabel="GPUs", ylabel="efficiency, %", ylim=(0, 100))
    right.set_xscale("log", base=2)
    right.set_xticks(GPUS, [str(gpus) for gpus in GPUS], fontsize=8)
    right.set_title("Predicted: H100, NVLink, InfiniBand")
    right.legend(fontsize=8)
    figure.savefig(path)


def show(measured: dict[tuple[str, int, int], float], fit: Fit, cores: int) -> dict[str, float]:
    """Print what was measured, fitted and predicted; returns the errors on the world size that was held out."""
    print(f"{processor_name()}\n\n| network | global batch | ranks | measured, ms | model, ms | error |")
    print("|---" * 6 + "|")
    errors = {}
    for (model, batch, world_size), seconds in measured.items():
        predicted = predict(fit, model, batch, world_size, cores)
        error = predicted / seconds - 1
        cells = (model, batch, world_size, f"{1e3 * seconds:.2f}", f"{1e3 * predicted:.2f}", f"{100 * error:+.0f} %")
        print(f"| {' | '.join(map(str, cells))} |")
        if world_size == WORLD_SIZES[-1]:
            errors[f"{model} {batch}"] = error
    for model in BATCHES:
        print(f"\n{model}: f {1e3 * fit.fixed_s[model]:.3f} ms, c {1e6 * fit.image_s[model]:.2f} us an image")
    print(f"alpha {1e3 * fit.alpha_s:.3f} ms, beta {1e9 * fit.beta_s:.3f} ns a byte")
    mean = statistics.mean(abs(error) for error in errors.values())
    print(f"mean error at {WORLD_SIZES[-1]} ranks, which were not fitted: {100 * mean:.0f} %\n")
    print(f"| network | global batch | {' | '.join(map(str, GPUS))} | fastest | half |")
    print("|---" * (len(GPUS) + 4) + "|")
    for model in BATCHES:
        for batch in GPU_BATCHES:
            gpus = [n for n in (1, 2, 4, *GPUS) if n <= batch]
            fastest = min(gpus, key=lambda n: on_gpus(model, batch, n))
            half = max((n for n in gpus if efficiency(model, batch, n) >= 0.5), default=1)
            shares = [f"{100 * efficiency(model, batch, n):.1f}" if n <= batch else "" for n in GPUS]
            print(f"| {model} | {batch:,} | {' | '.join(shares)} | {fastest} | {half} |")
    return errors


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", default="", metavar="FILE")
    parser.add_argument("--plot", default="", metavar="FILE")
    options = parser.parse_args()
    cores = len(usable_cores())
    measured = measure(options.rounds)
    fit = fit_all(measured, cores)
    errors = show(measured, fit, cores)
    if options.plot:
        plot(options.plot, measured, fit, cores)
    rows = [{"model": m, "batch_size": b, "ranks": w, "seconds": s} for (m, b, w), s in measured.items()]
    write(options.json, {"rows": rows, "fit": fit._asdict(), "errors": errors})


if __name__ == "__main__":
    main()
