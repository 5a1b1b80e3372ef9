"""Two measurements of benchmarks.gpu that need a process of their own; each prints a JSON object a row, as it comes.

python -m benchmarks.gpu_parts busy
python -m benchmarks.gpu_parts seeds RECIPE NUMBER
"""

import contextlib
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

import mnist_dist
from benchmarks.common import data_dir
from mnist_dist.config.parse import read_recipe
from mnist_dist.distributed.launch_env import read_launch_env
from mnist_dist.distributed.setup import init_distributed
from mnist_dist.speed.measure import StepTask, draw_images
from mnist_dist.speed.plan import Case

NUM_TIMED, NUM_PROFILED = 300, 100  # steps


def measure_busy() -> Iterator[dict[str, Any]]:
    """How long the GPU computes in a step, of the step's seconds, in the precision that it has by default."""
    config, _ = read_recipe("", {})
    with init_distributed(config, read_launch_env(os.environ)) as world:
        if world.device.type != "cuda":
            raise SystemExit("there is no GPU to be busy")
        images = draw_images(world.device)
        for model in ("mlp", "cnn"):
            for batch_size in (64, 512, 4096):
                notes: list[str] = []
                task = StepTask(Case(model, batch_size, 1, 1), config, world, images, notes.append)
                task.run(10)
                step_s = task.run(NUM_TIMED)
                with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
                    task.run(NUM_PROFILED)  # and one more, which is not timed
                kernel_us = sum(event.self_device_time_total for event in profile.key_averages())
                kernel_s = kernel_us / 1e6 / (NUM_PROFILED + 1)
                row = {"model": model, "batch_size": batch_size, "precision": world.precision, "notes": notes}
                times = {"step_s": step_s, "kernels_s": kernel_s, "busy": kernel_s / step_s}
                yield row | {"is_cuda_graph": task.is_replayed} | times


def train_seeds(recipe: str, number: int) -> Iterator[dict[str, Any]]:
    """Train a recipe with so many seeds, in this process: the first also starts the GPU."""
    for seed in range(number):
        with tempfile.TemporaryDirectory() as folder:
            mnist_dist.train(recipe, seed=seed, data_dir=data_dir(), run_dir=f"{folder}/run")
            done = json.loads(Path(folder, "run/DONE").read_text())
            yield {"recipe": recipe, "seed": seed, "seconds": done["seconds"], "test": 100 * done["accuracy"]}


def main() -> None:
    """Run one of them."""
    part, *arguments = sys.argv[1:]
    rows = measure_busy() if part == "busy" else train_seeds(arguments[0], int(arguments[1]))
    output = sys.stdout
    with contextlib.redirect_stdout(sys.stderr):
        for row in rows:
            print(json.dumps(row), file=output, flush=True)


if __name__ == "__main__":
    main()
