"""What a start goes on from, and whether that is the same run."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from mnist_dist.config.schema import IDENTITY, Config
from mnist_dist.errors import RequestError
from mnist_dist.run import checkpoint
from mnist_dist.run.checkpoint import Checkpoint
from mnist_dist.run.run_dir import RunDir

NOT_WORTH_SAYING = ("dataset", "data_dir", "run_dir", "resume", "mirror", "missing")


def find_source(config: Config, say: Callable[[str], None]) -> Checkpoint | None:
    """The checkpoint that `resume` names, if it names one and run_dir has none. Raises RequestError.

    It is looked for before a folder is made.
    """
    if config.resume in ("auto", "never") or (config.run_dir and (config.run_dir / "checkpoints").exists()):
        return None
    return checkpoint.find(Path(config.resume), say)


def find_start(
    config: Config, run_dir: RunDir, source: Checkpoint | None, say: Callable[[str], None]
) -> Checkpoint | None:
    """The checkpoint to go on from: the run's own, else the one that `resume` names. Raises RequestError."""
    own = checkpoint.newest(run_dir.checkpoints, say)
    if own and config.resume == "never":
        raise RequestError(f"resume=never, but run_dir={run_dir} has checkpoints; give another run_dir")
    if own and config.resume not in ("auto", "never"):  # put back into the queue; what it was started from may be gone
        say(f"note: resume={config.resume} is not used, since run_dir={run_dir} has checkpoints of its own")
    if not own and not source and config.resume not in ("auto", "never"):
        source = checkpoint.find(Path(config.resume), say)
    start = own or source
    if start:
        say(f"going on from {start.path}")
    return start


def check_same_run(saved: dict[str, Any], config: Config, dataset: dict[str, str]) -> None:
    """Refuse a checkpoint of another run. `dataset` has name and fingerprint. Raises RequestError."""
    before = saved_config(saved)
    now = config.model_dump(mode="json") | {"dataset": dataset["name"]}
    before["dataset"] = saved.get("dataset", {}).get("name")
    for key in IDENTITY:
        if before.get(key) != now[key]:
            raise RequestError(
                f"the checkpoint is of a run with {key}={before.get(key)}, not {key}={now[key]}; give that, or another "
                "run_dir"
            )
    if saved.get("dataset") != dataset:
        raise RequestError(f"the checkpoint was trained on other images that are called {dataset['name']} too")


def changes(saved: dict[str, Any], config: Config) -> list[str]:
    """What is asked for differently since the checkpoint, a line each."""
    before, now = saved_config(saved), config.model_dump(mode="json")
    keys = [key for key in now if before.get(key) != now[key] and key not in NOT_WORTH_SAYING]
    return [f"{key}={before.get(key)} is now {now[key]}" for key in keys]


def changed_bits(saved: dict[str, Any], basis: dict[str, Any]) -> list[str]:
    """What the bits of the weights depend on and is another thing now, a line each."""
    before = saved.get("bits_depend_on") or basis  # older checkpoints do not say
    return [
        f"{key} was {before.get(key)} and is now {value}" for key, value in basis.items() if before.get(key) != value
    ]


def saved_config(saved: dict[str, Any]) -> dict[str, Any]:
    """The configuration in a checkpoint; what older ones do not have or call otherwise is as they meant it."""
    config = {"bit_exact": 0, **saved.get("config", {})}
    if config.get("precision") == "no":
        config["precision"] = "fp32"
    return config
