"""The verb `evaluate`: a finished or running run, one checkpoint, or a file of weights."""

import argparse
import contextlib
import json
import math
from pathlib import Path
from typing import Any

import torch

from mnist_dist.config.parse import build_config, check_keys, parse_values, split_arguments
from mnist_dist.config.paths import expand_path
from mnist_dist.config.schema import Config
from mnist_dist.config.yaml_file import read_file
from mnist_dist.data.dataset import load_dataset
from mnist_dist.data.download import find_place, look_up
from mnist_dist.distributed.device import usable_cores
from mnist_dist.errors import RequestError
from mnist_dist.run.logger import warn
from mnist_dist.run.run_dir import RunDir
from mnist_dist.run.weights import Source, build_network, read_source
from mnist_dist.training.evaluation import Evaluation, evaluate

# The last two decide nothing here: where the dataset is missing, the sentence says so and how to fetch it.
KEYS = ("dataset", "data_dir", "validation", "threads", "mirror", "missing")


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
    look_up(config.dataset, config.data_dir, "evaluate fetches nothing; run {} first", say=warn)
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
