"""Accelerate's trackers: tensorboard, wandb, mlflow and so on, which write on rank 0 only."""

import contextlib
import hashlib
from collections.abc import Sequence
from typing import Any

from accelerate.tracking import LOGGER_TYPE_TO_CLASS, TensorBoardTracker, filter_trackers, get_available_trackers

from mnist_dist.config.schema import Config
from mnist_dist.distributed.world import World
from mnist_dist.errors import RequestError, RunError, one_line
from mnist_dist.run.logger import NullLogger
from mnist_dist.run.run_dir import RunDir

PROJECT = "mnist-dist"


def check_trackers(names: Sequence[str]) -> None:
    """Raises RequestError for a tracker that is none, or not installed."""
    installed = [str(tracker) for tracker in get_available_trackers()]
    for name in names:
        if name not in LOGGER_TYPE_TO_CLASS:
            raise RequestError(f"log_with={name} is no tracker; Accelerate knows {', '.join(LOGGER_TYPE_TO_CLASS)}")
        if name not in installed:
            raise RequestError(
                f"log_with={name} is not installed here; `pip install {name}`, or mnist-dist[tracking] for tensorboard"
            )


def start_trackers(config: Config, world: World, run_dir: RunDir, logger: NullLogger) -> None:
    """Start the trackers of `log_with`, and let the logger feed them. Collective. Raises RunError."""
    accelerator, folder = world.accelerator, str(run_dir)
    accelerator.project_configuration.set_directories(folder)
    # TensorBoard's project is the name of its folder in the run directory, which stays.
    accelerator.log_with = [
        TensorBoardTracker("tracking", folder) if str(tracker) == "tensorboard" else tracker
        for tracker in filter_trackers(list(config.log_with), folder)
    ]
    settings = {k: v if isinstance(v, int | float) else str(v) for k, v in config.model_dump(mode="json").items()}
    with world.shared_errors():  # collective
        try:
            accelerator.init_trackers(PROJECT, config=settings, init_kwargs=settings_of_trackers(run_dir))
        except Exception as error:  # whatever a tracker's library raises
            reason = one_line(error)
            raise RunError(f"log_with={','.join(config.log_with)} does not start: {reason}") from None
    logger.start_tracking(lambda numbers, step: accelerator.log(numbers, step=step))


def finish_trackers(world: World) -> None:
    """Let the trackers write what they hold. What is lost of it does not change how the run ended."""
    for tracker in world.accelerator.trackers:
        with contextlib.suppress(Exception):
            tracker.finish()  # not end_training, which takes the process group down as well


def settings_of_trackers(run_dir: RunDir) -> dict[str, dict[str, Any]]:
    """A run in a tracker is called as its directory, and a run that goes on goes on there too."""
    path = run_dir.path.absolute()
    run_id = f"{path.name}-{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
    return {"wandb": {"name": path.name, "id": run_id, "resume": "allow", "dir": str(path)}}
