"""The floating-point operations per second of training, beside those of the machine's own matrix products.

    python -m benchmarks.arithmetic [--precisions no bf16] [--rounds 5] [--json FILE]

A step of an epoch at the tutorials' batch size, timed by the job itself, against a product of two 2048 x 2048 matrices
on as many threads, in turn. Beside them the step's own products or convolutions alone, forward and backward, as torch
runs them with nothing in between: what a step that did nothing else could reach.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.common import REPOSITORY, train, write
from benchmarks.loops import BATCH_SIZE
from mnist_dist.distributed.device import processor_name, tune_cpu, usable_cores

# Multiplications and additions of the forward pass, an image. The backward pass has twice as many, less the gradient
# with respect to the images, which nobody needs.
LAYERS = {
    "mlp": [2 * 784 * 512, 2 * 512 * 256, 2 * 256 * 10],
    "cnn": [2 * 9 * 32 * 784, 2 * 9 * 32 * 64 * 196, 2 * 9 * 64 * 128 * 49, 2 * 1152 * 10],
}
FLOP_PER_IMAGE = {model: 3 * sum(layers) - layers[0] for model, layers in LAYERS.items()}
SHAPES: dict[str, list[tuple[int, ...]]] = {
    "mlp": [(784, 512), (512, 256), (256, 10)],
    "cnn": [(1, 32, 28), (32, 64, 14), (64, 128, 7)],
}


def seconds_of(work: Callable[[], object], at_least_s: float = 0.5) -> float:
    """Seconds of one call, the mean over as many as fill half a second."""
    for _ in range(3):
        work()
    began_s, calls = time.perf_counter(), 0
    while time.perf_counter() - began_s < at_least_s:
        work()
        calls += 1
    return (time.perf_counter() - began_s) / calls


def matrix_product(dtype: torch.dtype) -> float:
    """FLOP/s of a product of two 2048 x 2048 matrices."""
    a, b = (torch.randn(2048, 2048).to(dtype) for _ in range(2))
    return 2 * 2048**3 / seconds_of(lambda: a @ b)


def products_alone(model: str, dtype: torch.dtype) -> float:
    """FLOP/s of the step's own products, or convolutions, forward and backward and nothing else."""
    batch, work = BATCH_SIZE[model], []
    for index, shape in enumerate(SHAPES[model]):
        if model == "mlp":
            inputs, outputs = shape
            x, y = torch.randn(batch, inputs).to(dtype), torch.randn(batch, outputs).to(dtype)
            weight = torch.randn(outputs, inputs).to(dtype)
            work.append(_linear(x, weight, y, index > 0))
        else:
            inputs, outputs, side = shape
            image = torch.randn(batch, inputs, side, side).to(dtype).to(memory_format=torch.channels_last)
            gradient = torch.randn(batch, outputs, side, side).to(dtype).to(memory_format=torch.channels_last)
            weight = torch.randn(outputs, inputs, 3, 3).to(dtype).to(memory_format=torch.channels_last)
            work.append(_convolution(image, weight, gradient, index > 0))
    layers = LAYERS[model][: len(work)]
    return batch * (3 * sum(layers) - layers[0]) / seconds_of(lambda: [run() for run in work])


def _linear(x: Tensor, weight: Tensor, gradient: Tensor, inputs_too: bool) -> Callable[[], object]:
    return lambda: (F.linear(x, weight), gradient.T @ x, gradient @ weight if inputs_too else None)


def _convolution(x: Tensor, weight: Tensor, gradient: Tensor, inputs_too: bool) -> Callable[[], object]:
    def run() -> None:
        F.conv2d(x, weight, padding=1)
        wanted = [inputs_too, True, False]
        torch.ops.aten.convolution_backward(gradient, x, weight, None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1, wanted)

    return run


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--precisions", nargs="+", default=["no", "bf16"], choices=["no", "bf16"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", default="", metavar="FILE")
    options = parser.parse_args()
    tune_cpu()
    torch.set_num_threads(len(usable_cores()))
    print(f"{processor_name()}\nGFLOP/s, medians of {options.rounds}")
    rows = []
    for precision in options.precisions:
        dtype = torch.float32 if precision == "no" else torch.bfloat16
        for model in ("mlp", "cnn"):
            found: dict[str, list[float]] = {"matrix product": [], "the step's products alone": [], "training": []}
            for _ in range(options.rounds):
                recipe = str(REPOSITORY / f"configs/tutorial-{model}.yaml")
                found["matrix product"].append(matrix_product(dtype))
                found["the step's products alone"].append(products_alone(model, dtype))
                done = train([recipe, "epochs=1", "evaluate_train=false", f"precision={precision}"])
                found["training"].append(done["images"] * FLOP_PER_IMAGE[model] / done["seconds"])
            medians = {name: statistics.median(values) for name, values in found.items()}
            peak, alone, training = medians.values()
            shown = ", ".join(f"{name} {value / 1e9:.0f}" for name, value in medians.items())
            shares = f"of the matrix product {training / peak:.2f}, alone {alone / peak:.2f}"
            print(f"{model} {precision}: {shown}; {shares}", flush=True)
            rows.append({"model": model, "precision": precision, "flop_per_s": found})
    write(options.json, {"rows": rows})


if __name__ == "__main__":
    main()
