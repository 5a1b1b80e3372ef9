"""The verb `evaluate`: a finished or running run, one checkpoint, or a bare model.safetensors."""

import json
import math
import sys
from pathlib import Path
from typing import Any

import torch

from mnist_dist.config.schema import Config, build, load
from mnist_dist.data.dataset import load_dataset
from mnist_dist.data.download import dataset_file, fetch
from mnist_dist.distributed.device import usable_cores
from mnist_dist.errors import RequestError
from mnist_dist.models import build_model
from mnist_dist.run import checkpoint
from mnist_dist.training.evaluation import Evaluation, evaluate, load_weights


def report(path: Path, overrides: dict[str, Any], *, as_json: bool) -> None:
    """Print loss, accuracy with its 95 % interval and confusion matrix. Raises RequestError."""
    try:
        is_there = path.exists()
    except OSError as error:
        raise RequestError(f"{path} cannot be read: {error.strerror}") from None
    if not is_there:
        raise RequestError(f"there is no {path}; give a run's folder, a checkpoint's, or a .safetensors file")
    source, weights, trained_on = _read(path)
    config = _config(source, overrides | ({} if "dataset" in overrides else trained_on))
    torch.set_num_threads(config.threads or len(usable_cores()))
    name = "cnn" if "conv1.weight" in weights else "mlp"
    model = build_model(name, seed=0)
    if misfit := load_weights(model, weights):
        raise RequestError(f"{source} does not hold the weights of a network of this program: {misfit}")
    fetched = fetch(config.dataset, config.data_dir, mirror=config.mirror, missing=config.missing, say=_say)
    dataset = load_dataset(fetched, config.data_dir, config.validation)
    result = evaluate(model, dataset.held_out)
    if as_json:
        low, high = result.interval()
        about = {
            "weights": str(source),
            "model": name,
            "dataset": dataset.name,
            "split": dataset.held_out_name,
        }
        figures: dict[str, Any] = {"accuracy_95": [low, high], "confusion": result.confusion.tolist()}
        if not math.isfinite(result.loss):
            figures["loss"] = None  # as in metrics.jsonl: JSON has no NaN
        print(json.dumps(about | result.record() | figures, allow_nan=False))
        return
    print(f"{source}: {name} on {dataset.name}, {dataset.held_out_name}")
    print(_table(result))


def _say(text: str) -> None:
    print(text, file=sys.stderr)


def _read(path: Path) -> tuple[Path, dict[str, torch.Tensor], dict[str, Any]]:
    """Where the weights are, what they are, and which dataset they were trained on, if that is known."""
    if path.is_file():
        try:
            data = path.read_bytes()
        except OSError as error:
            raise RequestError(f"{path} cannot be read: {error.strerror}") from None
        return path, checkpoint.parse_weights(data, path), {}
    found = checkpoint.find(path, _say)
    dataset = checkpoint.parse_training(found.training, found.path / checkpoint.TRAINING).get("dataset", {})
    name = dataset.get("name") if isinstance(dataset, dict) else None
    return found.path / checkpoint.MODEL, found.weights(), {"dataset": name} if name else {}


def _config(weights_file: Path, overrides: dict[str, Any]) -> Config:
    """What to evaluate on: as the run that the weights lie in, if they lie in one, with the overrides."""
    checkpoints = weights_file.absolute().parent.parent
    run_file = checkpoints.parent / "config.yaml"
    if checkpoints.name != "checkpoints" or not run_file.is_file():
        return build(overrides)
    run, _ = load([str(run_file)])
    # What is measured; the rest was that machine's.
    inherited: dict[str, Any] = {"dataset": run.dataset, "validation": run.validation}
    if dataset_file(str(overrides.get("dataset", run.dataset)), run.data_dir).exists():
        inherited["data_dir"] = run.data_dir
    return build(inherited | overrides)


def _table(result: Evaluation) -> str:
    low, high = result.interval()
    lines = [
        f"loss      {result.loss:.6f}",
        f"accuracy  {100 * result.accuracy:.2f} % ({result.correct:,} of {result.count:,}), 95 % interval "
        f"{100 * low:.2f} to {100 * high:.2f} %",
        "confusion, true class down, predicted class across:",
        "     " + "".join(f"{digit:>7}" for digit in range(10)),
    ]
    lines += [f"{digit:>5}" + "".join(f"{n:>7}" for n in row) for digit, row in enumerate(result.confusion.tolist())]
    return "\n".join(lines)
