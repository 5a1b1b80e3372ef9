"""The verb `predict`: which digit a picture shows."""

import argparse
import io
import json
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import BinaryIO

import torch
from rich.console import Console
from rich.progress import track
from rich.text import Text
from torch import Tensor

from mnist_dist.config.paths import expand_path
from mnist_dist.data.picture import SIDE, SUFFIXES, prepare
from mnist_dist.errors import RequestError, RunError
from mnist_dist.models import Classifier
from mnist_dist.run.stop import interruptible
from mnist_dist.run.weights import Source, build_network, read_source

STANDARD_INPUT = "standard input"
NO_DIGITS = ("fashion-mnist", "kmnist")  # datasets whose classes are other things


def run(options: argparse.Namespace, arguments: list[str]) -> int:
    """Print a line a picture, of `RUN IMAGE ...`. Raises RequestError.

    A picture among several that cannot be answered is named on the standard error stream; the others are answered.
    """
    words = [word for word in arguments if word != "--"]
    if option := next((word for word in words if word.startswith("-") and word != "-"), ""):
        raise RequestError(f"there is no option {option}; a file of that name is ./{option}")
    if len(words) < 2:
        raise RequestError("give a RUN and one IMAGE or more: files, folders, or - for the standard input")
    source = read_source(Path(expand_path(words[0], "RUN")))
    check_digits(source)
    classifier = Classifier(build_network(source)[0])
    torch.set_num_threads(1)  # pictures are small
    names = [name for word in words[1:] for name in list_pictures(word)]
    num_answered = 0
    with interruptible("reading pictures"), torch.inference_mode():
        for name in with_bar(names):
            try:
                with open_picture(name) as file:
                    image = prepare(file, name)
            except RequestError as error:
                if len(names) == 1:
                    raise
                print(f"mnist-dist: {error}", file=sys.stderr, flush=True)
                continue
            print(describe(name, classifier(image[None])[0], as_json=options.json), flush=True)
            num_answered += 1
            if options.show:
                show(image)
    if num_answered == len(names):
        return 0
    return RunError.exit_code if num_answered else RequestError.exit_code


def check_digits(source: Source) -> None:
    """Raises RequestError where weights were trained on something other than digits."""
    if source.dataset in NO_DIGITS:
        raise RequestError(f"{source.path} was trained on {source.dataset}, which has no digits; give another RUN")


def read_pictures(names: list[str]) -> Tensor:
    """Images uint8 [n, 28, 28] of n pictures. Raises RequestError, which names the first that cannot be read."""
    images = torch.zeros(len(names), SIDE, SIDE, dtype=torch.uint8)
    for number, name in enumerate(names):
        with open_picture(name) as file:
            images[number] = prepare(file, name)
    return images


def list_pictures(word: str) -> list[str]:
    """The pictures that an IMAGE names: itself, or those of a folder in the order of their names.

    Raises RequestError where a folder has none.
    """
    if word == "-":
        return [STANDARD_INPUT]
    folder = Path(expand_path(word, "IMAGE"))
    try:
        if not folder.is_dir():
            return [str(folder)]
        pictures = sorted(str(path) for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)
    except OSError as error:
        raise RequestError(f"{folder} cannot be read: {error.strerror}") from None
    if not pictures:
        raise RequestError(f"the folder {folder} has no pictures in it ({', '.join(SUFFIXES)})")
    return pictures


@contextmanager
def open_picture(name: str) -> Iterator[BinaryIO]:
    """A picture's file, to read. Raises RequestError."""
    if name == STANDARD_INPUT:
        yield io.BytesIO(sys.stdin.buffer.read())
        return
    with ExitStack() as stack:
        try:
            file = stack.enter_context(Path(name).open("rb"))
        except OSError as error:
            raise RequestError(f"{name} cannot be read: {error.strerror}") from None
        yield file


def with_bar(names: list[str]) -> Iterator[str]:
    """The same, with a bar on the standard error stream, if that is a terminal and the answers go elsewhere."""
    errors_shown, answers_shown = (stream is not None and stream.isatty() for stream in (sys.stderr, sys.stdout))
    return iter(
        track(
            names, "predicting", console=Console(stderr=True), transient=True, disable=answers_shown or not errors_shown
        )
    )


def describe(name: str, probabilities: Tensor, *, as_json: bool) -> str:
    """The answer for one picture, of probabilities float32 [10], in one line."""
    (first, second), (digit, other) = (values.tolist() for values in probabilities.topk(2))
    if as_json:
        answer = {"file": name, "digit": digit, "probability": first, "probabilities": probabilities.tolist()}
        return json.dumps(answer)
    return f"{name}: {digit} ({100 * first:.2f} %, then {other}: {100 * second:.2f} %)"


def show(image: Tensor) -> None:
    """Draw an image uint8 [28, 28] in the terminal, two pixels a character; without colours where there are none."""
    console = Console(highlight=False)
    for top, bottom in zip(image[::2].tolist(), image[1::2].tolist(), strict=True):
        line = Text("  ")
        for upper, lower in zip(top, bottom, strict=True):
            if console.color_system:
                line.append("▀", f"rgb({upper},{upper},{upper}) on rgb({lower},{lower},{lower})")
            else:
                line.append(" ▄▀█"[2 * (upper > 127) + (lower > 127)])
        console.print(line, soft_wrap=True)
