"""The verb `export`: a run's network as one file, for programs that do not have this package."""

import argparse
import importlib.util
import io
import json
import logging
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from safetensors.torch import save as save_safetensors
from torch import Tensor

from mnist_dist.commands.evaluate import choose_config
from mnist_dist.config.paths import expand_path
from mnist_dist.data.dataset import load_dataset
from mnist_dist.data.download import find_place
from mnist_dist.data.synthetic import draw_digits
from mnist_dist.errors import RequestError, RunError, StorageError
from mnist_dist.files import write_atomically
from mnist_dist.models import Classifier
from mnist_dist.run.checkpoint import ABOUT
from mnist_dist.run.stop import interruptible
from mnist_dist.run.weights import Source, build_network, read_source

BATCH_SIZE = 1000  # images at once in the check
ONNX_PACKAGES = ("onnx", "onnxruntime", "onnxscript")
IN_AND_OUT = "images uint8 [n, 28, 28] in, ink 255 on 0; probabilities float32 [n, 10] out"

Run = Callable[[Tensor], Tensor]  # probabilities [n, 10] of images [n, 28, 28], by the exported file


def run(options: argparse.Namespace, arguments: list[str]) -> int:
    """Write FILE, of `RUN --to FORMAT FILE`, once it predicts what the network does. Raises RequestError, RunError."""
    words = [word for word in arguments if word != "--"]
    if option := next((word for word in words if word.startswith("-")), ""):
        raise RequestError(f"there is no option {option}; mnist-dist export --help shows what there is")
    if len(words) != 2:
        raise RequestError(f"give RUN and FILE, and nothing else, beside --to {options.to}")
    if options.to == "onnx" and not all(importlib.util.find_spec(name) for name in ONNX_PACKAGES):
        raise RequestError(
            f"--to onnx needs {', '.join(ONNX_PACKAGES)}, which are not installed; run "
            "`pip install 'mnist-dist[export]'`, or use --to torch-export"
        )
    path = check_file(Path(expand_path(words[1], "FILE")))
    source = read_source(Path(expand_path(words[0], "RUN")))
    network, name = build_network(source)
    if options.to == "safetensors":
        about = {"model": name, "dataset": source.dataset}
        write(path, save_safetensors(source.weights, {ABOUT: json.dumps(about)}))
        print(f"{path}: the weights of {name}, {len(source.weights)} tensors by their tutorial's names")
        print(f"next: load_state_dict(safetensors.torch.load_file({str(path)!r}))")
        return 0
    classifier = Classifier(network.to(memory_format=torch.contiguous_format))
    # isatty alone decides, as in run/logger.py: FORCE_COLOR would draw into a log file.
    console = Console(stderr=True, force_terminal=sys.stderr is not None and sys.stderr.isatty())
    with interruptible("exporting"), console.status("exporting"):
        data, load = to_onnx(classifier) if options.to == "onnx" else to_torch_export(classifier)
    with interruptible("comparing predictions"), console.status("comparing predictions"):
        images, what = find_images(source)
        num_equal, difference = compare(classifier, load(data), images)
    if num_equal < len(images):
        raise RunError(
            f"the exported network predicts another digit for {len(images) - num_equal:,} of {len(images):,} images of "
            f"{what}, so {path} was not written; try another format"
        )
    write(path, data)
    print(f"{path}: {name}, {IN_AND_OUT}")
    print(
        f"{num_equal:,} of {len(images):,} predictions on {what} are those of torch; the probabilities differ by "
        f"{difference:.0e} at most"
    )
    if options.to == "onnx":
        print(f"next: onnxruntime.InferenceSession({str(path)!r}).run(None, {{'images': images}})")
    else:
        print(f"next: torch.export.load({str(path)!r}).module()(images)")
    return 0


def check_file(path: Path) -> Path:
    """The same path, if a file can be written there. Raises RequestError."""
    try:
        if path.is_dir():
            raise RequestError(f"{path} is a folder; give the name of a file in it")
        if not path.absolute().parent.is_dir():
            raise RequestError(f"there is no folder {path.absolute().parent} for {path.name}; make it first")
    except OSError as error:
        raise RequestError(f"{path} cannot be written: {error.strerror}") from None
    return path


def write(path: Path, data: bytes) -> None:
    """Write the file in one step, over one that is there. Raises StorageError."""
    try:
        write_atomically(path, data)
    except OSError as error:
        raise StorageError(f"{path} cannot be written: {error.strerror}") from None


def to_torch_export(classifier: Classifier) -> tuple[bytes, Callable[[bytes], Run]]:
    """A .pt2 file of torch.export, and what runs it."""
    buffer = io.BytesIO()
    torch.export.save(trace(classifier), buffer)

    def load(data: bytes) -> Run:
        module = torch.export.load(io.BytesIO(data)).module()
        return lambda images: module(images)

    return buffer.getvalue(), load


def to_onnx(classifier: Classifier) -> tuple[bytes, Callable[[bytes], Run]]:
    """An ONNX file, whose input is `images` and whose output is `probabilities`, and what runs it."""
    import onnxruntime

    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings(action="ignore"):  # the exporter's, about itself
        program: Any = torch.onnx.export(
            trace(classifier), dynamo=True, verbose=False, input_names=["images"], output_names=["probabilities"]
        )
    model = program.model_proto
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.shape.dim[0].dim_param = "n"

    def load(data: bytes) -> Run:
        session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
        return lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0])

    return model.SerializeToString(), load


def trace(classifier: Classifier) -> torch.export.ExportedProgram:
    """Its operations, for any number of images."""
    example = torch.zeros(2, 28, 28, dtype=torch.uint8)
    return torch.export.export(classifier, (example,), dynamic_shapes=({0: torch.export.Dim("n")},))


def find_images(source: Source) -> tuple[Tensor, str]:
    """Images uint8 [n, 28, 28] to compare predictions on, and which they are: the run's, or else drawn digits."""
    config = choose_config(source, {})
    if find_place(config.dataset, config.data_dir):
        dataset = load_dataset(config.dataset, config.data_dir, config.validation)
        return dataset.eval_split.images, f"{dataset.name}, {dataset.eval_name}"
    return draw_digits(2 * BATCH_SIZE, seed=0)[0], f"drawn digits (there is no {config.dataset} in {config.data_dir})"


@torch.inference_mode()
def compare(classifier: Classifier, other: Run, images: Tensor) -> tuple[int, float]:
    """How many predictions are equal, and the largest difference of a probability. An image alone is tried too."""
    num_equal, difference = 0, 0.0
    for batch in (*images[1:].split(BATCH_SIZE), images[:1]):
        expected, given = classifier(batch), other(batch)
        num_equal += int((expected.argmax(1) == given.argmax(1)).sum())
        difference = max(difference, float((expected - given).abs().max()))
    return num_equal, difference
