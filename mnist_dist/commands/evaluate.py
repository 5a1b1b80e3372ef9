"""The verb `evaluate`: a finished or running run, one checkpoint, or a file of weights."""

import argparse
import contextlib
import json
import math
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mnist_dist.config.parse import build_config, check_keys, parse_values, split_arguments
from mnist_dist.config.paths import expand_path
from mnist_dist.config.schema import Config
from mnist_dist.config.yaml_file import read_file
from mnist_dist.data.dataset import load_dataset
from mnist_dist.data.download import find_place, look_up
from mnist_dist.distributed.device import usable_cores
from mnist_dist.errors import RequestError
from mnist_dist.models import MODELS, build_model
from mnist_dist.run import checkpoint
from mnist_dist.run.run_dir import RunDir
from mnist_dist.run.weights import load_weights, parse_weights, read_about
from mnist_dist.training.evaluation import Evaluation, evaluate

# The last two decide nothing here: where the dataset is missing, the sentence says so and how to fetch it.
KEYS = ("dataset", "data_dir", "validation", "threads", "mirror", "missing")


@dataclass(frozen=True)
class Source:
    """Weights, and what is known of them."""

    path: Path
    weights: dict[str, Tensor]
    dataset: str  # that they were trained on; empty where that is not known
    training: dict[str, Any] = field(default_factory=dict)  # of a checkpoint: what training goes on with


def run(options: argparse.Namespace, arguments: list[str]) -> int:
    """Print loss, accuracy with its interval and confusion matrix, of `RUN [key=value ...]`. Raises RequestError."""
    check_keys(arguments, KEYS)
    pairs, words = split_arguments(arguments)
    if len(words) != 1:
        what = "no RUN" if not words else f"{words[1]!r} beside RUN {words[0]!r}"
        raise RequestError(f"there is {what}; give a run's folder, a checkpoint's, or a file of weights, and key=value")
    overrides = parse_values(pairs, "on the command line")
    build_config(overrides)  # a wrong value is refused before anything is read
    source = read_source(Path(expand_path(words[0], "RUN")))
    config = choose_config(source, overrides)
    torch.set_num_threads(config.threads or len(usable_cores()))
    model, name = build_network(source)
    look_up(config.dataset, config.data_dir, "evaluate fetches nothing; run {} first", say=print_error)
    dataset = load_dataset(config.dataset, config.data_dir, config.validation)
    result = evaluate(model, dataset.eval_split)
    if options.json:
        low, high = result.interval()
        about = {"weights": str(source.path), "model": name, "dataset": dataset.name, "split": dataset.eval_name}
        figures: dict[str, Any] = {"accuracy_95": [low, high], "confusion": result.confusion.tolist()}
        if not math.isfinite(result.loss):
            figures["loss"] = None  # as in metrics.jsonl: JSON has no NaN
        print(json.dumps(about | result.record() | figures, allow_nan=False))
        return 0
    print(f"{source.path}: {name} on {dataset.name}, {dataset.eval_name}")
    print(table(result))
    return 0


def read_source(path: Path) -> Source:
    """The weights that a path names, and what they were trained on. Raises RequestError."""
    try:
        is_there = path.exists()
        if path.is_file():
            return Source(path, parse_weights(path.read_bytes(), path), str(read_about(path).get("dataset", "")))
    except OSError as error:
        raise RequestError(f"{path} cannot be read: {error.strerror}") from None
    if not is_there:
        raise RequestError(f"there is no {path}; give a run's folder, a checkpoint's, or a file of weights")
    found = checkpoint.find(path, print_error)
    training = checkpoint.parse_training(found.training, found.path / checkpoint.TRAINING)
    dataset = training.get("dataset", {})
    name = dataset.get("name") if isinstance(dataset, dict) else None
    file = found.path / checkpoint.MODEL
    return Source(file, parse_weights(found.model, file), name or "", training)


def choose_config(source: Source, overrides: dict[str, Any]) -> Config:
    """What to evaluate on: as the run that the weights lie in, if they lie in one, with the overrides."""
    trained_on = {"dataset": source.dataset} if source.dataset else {}
    checkpoints = source.path.absolute().parent.parent
    folder = RunDir(checkpoints.parent)
    if checkpoints.name != folder.checkpoints.name or not folder.config.is_file():
        return build_config(trained_on | overrides)
    # What is measured; the rest was that machine's.
    recorded = {k: v for k, v in read_file(folder.config).items() if k in ("dataset", "validation", "data_dir")}
    before = build_config(parse_values(recorded.items(), f"in {folder.config}"))
    inherited: dict[str, Any] = {"dataset": before.dataset, "validation": before.validation, **trained_on}
    with contextlib.suppress(RequestError):  # the folder was that machine's; here there may be anything in its place
        if find_place(str(overrides.get("dataset", inherited["dataset"])), before.data_dir):
            inherited["data_dir"] = before.data_dir
    return build_config(inherited | overrides)


def build_network(source: Source) -> tuple[torch.nn.Module, str]:
    """The network that the weights are of, with them in it, and its name. Raises RequestError."""
    misfits = {}
    for name in MODELS:
        model = build_model(name, seed=0)
        misfits[name] = load_weights(model, source.weights)
        if not misfits[name]:
            break
    else:
        # The nearer network, by the names that they share, says best what is wrong.
        names = {n: build_model(n, seed=0).state_dict().keys() & source.weights.keys() for n in misfits}
        name = max(misfits, key=lambda n: len(names[n]))
        raise RequestError(f"{source.path} does not hold the weights of a network of this program: {misfits[name]}")
    if not all(bool(tensor.isfinite().all()) for tensor in source.weights.values()):
        raise RequestError(f"{source.path} holds weights that are not finite, so there is nothing to evaluate")
    return model, name


def print_error(text: str) -> None:
    """One line on the standard error stream."""
    print(text, file=sys.stderr)


def table(result: Evaluation) -> str:
    """An evaluation for people."""
    low, high = result.interval()
    lines = [
        f"loss      {result.loss:.6f}",
        f"accuracy  {100 * result.accuracy:.2f} % ({result.correct:,} of {result.count:,}), 95 % interval "
        f"{100 * low:.2f} to {100 * high:.2f} %",
        "confusion, true class down, predicted class across:",
        "     " + "".join(f"{digit:>7}" for digit in range(len(result.confusion))),
    ]
    lines += [f"{digit:>5}" + "".join(f"{n:>7}" for n in row) for digit, row in enumerate(result.confusion.tolist())]
    return "\n".join(lines)
