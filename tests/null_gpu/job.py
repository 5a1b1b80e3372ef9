"""Runs the command line on the null GPU, and prints last what each step, sync, evaluation and save put on it.

    LD_PRELOAD=libcuda.so.1 python -m tests.null_gpu.job train mlp ...

Nothing is computed there, so what judges values is replaced; everything else is the job's own.
"""

import ctypes
import json
import os
import sys
from collections.abc import Callable
from typing import Any

import torch

from mnist_dist.cli import main
from mnist_dist.training import trainer as trainer_module
from mnist_dist.training.evaluation import Evaluation, evaluate
from mnist_dist.training.train_step import TrainStep

NUM_DIGITS = 10
counted: dict[str, list[dict[str, int]]] = {"step": [], "sync": [], "evaluate": [], "save": []}


def read_counts() -> dict[str, int]:
    """What was put on the GPU so far, by kind."""
    null_gpu = ctypes.CDLL(None)
    null_gpu.null_gpu_counts.restype = ctypes.c_char_p
    text = null_gpu.null_gpu_counts().decode()
    return {name: int(number) for name, _, number in (pair.partition("=") for pair in text.split(";") if pair)}


def count(kind: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """The same function, with an account of what it puts on the GPU."""

    def counting(*arguments: Any, **options: Any) -> Any:
        before = read_counts()
        result = function(*arguments, **options)
        after = read_counts()
        counted[kind].append({k: n - before.get(k, 0) for k, n in after.items() if n != before.get(k, 0)})
        return result

    return counting


def pretend_to_evaluate(model: Any, split: Any) -> Evaluation:
    """Evaluate, and say that all images were taken for zeros."""
    evaluate(model, split)
    confusion = torch.zeros(NUM_DIGITS, NUM_DIGITS, dtype=torch.int64)
    confusion[0, 0] = len(split.labels)
    return Evaluation(0.1, confusion)


def plant(fault: str) -> None:
    """A fault in the step of one rank that a capture does not allow: a value that is read, or copied to the GPU."""
    update = TrainStep.update

    def update_and_read(self: TrainStep, *arguments: Any) -> Any:
        loss = update(self, *arguments)
        if self.world.rank == int(os.environ.get("NULL_GPU_RANK", "0")):
            loss.item() if fault == "item" else torch.ones(()).to(loss.device)
        return loss

    if fault:
        TrainStep.update = update_and_read  # type: ignore[method-assign]


if __name__ == "__main__":
    torch.backends.cudnn.enabled = False  # it is not there
    TrainStep.is_finite = lambda _: True  # type: ignore[method-assign]
    plant(os.environ.get("NULL_GPU_FAULT", ""))
    trainer_class = trainer_module.Trainer
    TrainStep.__call__ = count("step", TrainStep.__call__)  # type: ignore[method-assign]
    trainer_module.Sync.run = count("sync", trainer_module.Sync.run)  # type: ignore[method-assign]
    trainer_module.evaluate = count("evaluate", pretend_to_evaluate)
    trainer_class.save = count("save", trainer_class.save)  # type: ignore[method-assign]
    code = main(sys.argv[1:])
    print(json.dumps(counted), flush=True)
    os._exit(code)
