"""Training and predicting from Python, in a notebook or a program; docs/PYTHON.md shows how.

This imports no torch until something is asked of it.
"""

import json
import os
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mnist_dist.config.parse import parse_values, read_recipe
from mnist_dist.config.schema import Config
from mnist_dist.distributed.launch_env import LaunchEnv, read_launch_env
from mnist_dist.errors import JobError as JobError
from mnist_dist.errors import RequestError
from mnist_dist.run import stop
from mnist_dist.run.run_dir import RunDir

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor, nn

    from mnist_dist.run.weights import Source

BATCH_SIZE = 1000  # images at once


class Run:
    """A run, a checkpoint, or a file of weights. What it holds is read when it is asked for."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __repr__(self) -> str:
        return f"Run({str(self.path)!r})"

    @cached_property
    def network(self) -> "nn.Module":
        """The network, on the CPU, in fp32: logits [n, 10] of float images [n, 28, 28], 0 to 1. Raises RequestError."""
        from mnist_dist.run.weights import build_network

        return build_network(self._source)[0].eval()

    @property
    def dataset(self) -> str:
        """The name of the dataset that it was trained on; empty where that is not known. Raises RequestError."""
        return self._source.dataset

    @property
    def is_finished(self) -> bool:
        """Whether it has trained to its end; if not, `train` with run_dir= goes on."""
        return RunDir(self.path).done_step() is not None

    @property
    def accuracy(self) -> float | None:
        """Share of the test images, or of validation=, that it classified right at its end; None before that."""
        try:
            return float(json.loads(RunDir(self.path).done.read_text())["accuracy"])
        except (OSError, ValueError, KeyError, TypeError):
            return None

    @cached_property
    def _source(self) -> "Source":
        from mnist_dist.run.weights import read_source

        return read_source(self.path)


def train(recipe: str | Path = "", /, **keys: Any) -> Run:
    """Train as `mnist-dist train RECIPE key=value` does, with the same keys, on the ranks of whatever launched this.

    Returns the run, which is not finished where a signal or a STOP file asked it to stop. Raises JobError.
    """
    env = read_launch_env(os.environ)
    config, name = read_recipe(str(recipe), parse_values(keys.items(), "in the call"))
    return Run(start_training(config, name, env)[1])


def load_run(path: str | Path) -> Run:
    """The run, checkpoint or file of weights at a path. Raises RequestError where there is none, or it is damaged."""
    from mnist_dist.config.paths import expand_path

    run = Run(Path(expand_path(str(path), "path")))
    _ = run.network
    return run


def predict(
    run: Run | str | Path, images: "Tensor | np.ndarray[Any, Any] | Sequence[str | Path] | str | Path"
) -> "Tensor":
    """Probabilities float32 [n, 10] of n images.

    They are a tensor or an array, uint8 [n, 28, 28], ink 255 on 0, as MNIST has them; or the paths of n pictures of
    any kind, which are prepared as `mnist-dist predict` does. Raises RequestError.
    """
    import torch

    from mnist_dist.models import Classifier

    run = run if isinstance(run, Run) else load_run(run)
    if isinstance(images, str | Path):
        images = [images]
    if isinstance(images, Sequence):
        from mnist_dist.commands.predict import check_digits, read_pictures

        check_digits(run._source)
        images = read_pictures([str(name) for name in images])
    tensor = torch.as_tensor(images)
    if tensor.dtype != torch.uint8 or tensor.shape[1:] != (28, 28):
        raise RequestError(
            f"the images are {str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}; give uint8 [n, 28, 28], "
            "ink 255 on 0, or a list of pictures' paths"
        )
    with torch.inference_mode():
        classifier = Classifier(run.network)
        return torch.cat([classifier(batch) for batch in tensor.cpu().split(BATCH_SIZE)])


def start_training(config: Config, recipe: str, env: LaunchEnv) -> tuple[int, Path]:
    """Train in this process, one rank of those in `env`: the way in for the command line and for Python.

    Returns the exit code, and the run's folder. Raises JobError.
    """
    if problem := config.world_size_problem(env.world_size):
        raise RequestError(problem, on_every_rank=True)
    is_guest = stop.install()  # of a process that has another purpose and goes on, as a notebook's
    try:
        quieten_libraries()
        from mnist_dist.commands.train import train
        from mnist_dist.distributed.device import restored_settings

        with restored_settings():
            return train(config, recipe, env)
    finally:
        if is_guest:
            stop.uninstall()


def quieten_libraries() -> None:
    """Leave it to us to name the rank that failed; before torch is imported.

    NCCL would abort the process first, and c10d adds a C++ stack for each lost connection.
    """
    os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "0")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
