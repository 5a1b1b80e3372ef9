"""The verb `report`: a run on one page, or several compared, as HTML that needs nothing else."""

import argparse
from pathlib import Path

import torch

from mnist_dist.commands.evaluate import choose_config
from mnist_dist.config.paths import expand_path
from mnist_dist.data.dataset import load_dataset
from mnist_dist.data.download import find_place
from mnist_dist.distributed.device import usable_cores
from mnist_dist.errors import RequestError, StorageError
from mnist_dist.files import write_atomically
from mnist_dist.report.page import Run, examine, make_page, read_run
from mnist_dist.run.run_dir import RunDir
from mnist_dist.run.weights import build_network, read_source
from mnist_dist.training.evaluation import evaluate

COMPARISON = "comparison.html"  # beside the first of several runs


def run(options: argparse.Namespace, arguments: list[str]) -> int:
    """Write the page of `RUN [RUN ...]` and print where it is. Raises RequestError, StorageError."""
    if not arguments:
        raise RequestError("there is no RUN; give the folder of a run, as runs/latest, or of several to compare them")
    folders = [find_run(word) for word in arguments]
    path = folders[0].report if len(folders) == 1 else folders[0].path.absolute().parent / COMPARISON
    if options.output:
        path = Path(expand_path(options.output, "-o"))
    torch.set_num_threads(len(usable_cores()))
    runs = [read_run(folder) for folder in folders]
    for each in runs:
        evaluate_checkpoint(each)
    page = make_page(runs).encode()
    try:
        if path.is_dir():
            raise RequestError(f"-o {path} is a folder; give the name of a file")
        write_atomically(path, page)
    except OSError as error:
        raise StorageError(f"{path} cannot be written: {error.strerror}; give -o FILE to write elsewhere") from None
    print(path)
    return 0


def find_run(word: str) -> RunDir:
    """The run in a folder. Raises RequestError where there is none."""
    if word.startswith("-"):
        raise RequestError(f"there is no option {word}; mnist-dist report --help shows what there is")
    path = Path(expand_path(word, "RUN"))
    try:
        folder = RunDir(path)
        if any(file.exists() for file in (folder.metrics, folder.config, folder.checkpoints)):
            return folder
    except OSError as error:
        raise RequestError(f"{path} cannot be read: {error.strerror}") from None
    raise RequestError(
        f"there is no run in {folder}: neither metrics.jsonl nor config.yaml nor checkpoints; give a run's folder"
    )


def evaluate_checkpoint(each: Run) -> None:
    """Evaluate a run's last checkpoint where its dataset is; else note why not. Fetches nothing."""
    try:
        if not any(each.folder.checkpoints.glob("step-*")):
            raise RequestError("the run has no checkpoint")
        source = read_source(each.folder.path)
        if each.seconds is None and isinstance(seconds := source.training.get("seconds"), int | float):
            each.seconds = seconds
        config = choose_config(source, {})
        model, _ = build_network(source)
        if find_place(config.dataset, config.data_dir) is None:
            raise RequestError(
                f"{config.dataset} is not in {config.data_dir}; MNIST_DIST_DATA_DIR in the environment says where it is"
            )
        dataset = load_dataset(config.dataset, config.data_dir, config.validation)
        if source.training.get("dataset") != dataset.identity():
            raise RequestError(f"{config.dataset} in {config.data_dir} has other images than the run was trained on")
    except (RequestError, OSError) as error:
        each.not_examined = str(error)
        return
    evaluation, split = evaluate(model, dataset.eval_split), dataset.eval_split
    each.examined = examine(evaluation, split.images, dataset.eval_name, int(source.training.get("step", 0)))
