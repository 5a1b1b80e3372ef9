"""The verb `fetch`: bring a dataset to this machine, and look whether what is there is whole."""

import argparse

from mnist_dist.config.parse import build_config, check_keys, parse_values, split_arguments
from mnist_dist.data.dataset import load_dataset
from mnist_dist.data.download import fetch, find_place
from mnist_dist.errors import RequestError
from mnist_dist.run.stop import interruptible

KEYS = ("dataset", "data_dir", "mirror")


def run(_options: argparse.Namespace, arguments: list[str]) -> int:
    """Run it on `[DATASET] [key=value ...]`. Raises RequestError, StorageError."""
    check_keys(arguments, KEYS)
    pairs, words = split_arguments(arguments)
    if len(words) > 1:
        raise RequestError(f"{words[1]!r} is a second dataset beside {words[0]!r}; give one")
    pairs += [("dataset", word) for word in words]
    config = build_config(parse_values(pairs, "on the command line"))
    with interruptible("fetching the dataset"):
        name = fetch(config.dataset, config.data_dir, mirror=config.mirror, say=print_now)
    load_dataset(name, config.data_dir)  # what lay there already may be damaged
    print(f"{name} is in {find_place(name, config.data_dir)}")
    return 0


def print_now(text: str) -> None:
    """One line on the standard output, at once also in a log file."""
    print(text, flush=True)
