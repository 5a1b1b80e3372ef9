"""The verb export: files that predict what the network does, for any number of images; what it refuses."""

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from mnist_dist.cli import main
from mnist_dist.commands import export
from mnist_dist.data.dataset import load_dataset
from mnist_dist.models import CNN, Classifier, build_model
from mnist_dist.run import checkpoint
from mnist_dist.run.weights import build_network, read_source

FORMATS = ("onnx", "torch-export")
pytestmark = pytest.mark.usefixtures("one_thread")


def load(path: Path, kind: str) -> Callable[[Tensor], Tensor]:
    """What another program would do with the file."""
    if kind == "torch-export":
        module = torch.export.load(path.rename(path.with_suffix(".pt2"))).module()  # it warns of other names
        return lambda images: module(images).detach()
    import onnxruntime

    session = onnxruntime.InferenceSession(path)
    (given,), (answer,) = session.get_inputs(), session.get_outputs()
    assert (given.name, given.type, given.shape) == ("images", "tensor(uint8)", ["n", 28, 28])
    assert (answer.name, answer.type, answer.shape) == ("probabilities", "tensor(float)", ["n", 10])
    return lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


def assert_same(file: Callable[[Tensor], Tensor], run: Path, images: Tensor, batch_size: int) -> None:
    """The file's probabilities are the network's, and its predictions the same, all of them."""
    classifier = Classifier(build_network(read_source(run))[0])
    for batch in images.split(batch_size):
        with torch.inference_mode():
            expected = classifier(batch)
        given = file(batch)
        assert (given.dtype, given.shape) == (torch.float32, (len(batch), 10))
        assert (given - expected).abs().max() < 1e-5
        assert given.argmax(1).equal(expected.argmax(1))


@pytest.mark.real_data
@pytest.mark.parametrize("kind", FORMATS)
def test_all_ten_thousand_predictions_are_equal(
    kind: str, mnist_run: Path, mnist_dir: Path, cwd: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", str(mnist_run), "--to", kind, "digits"]) == 0
    assert "10,000 of 10,000 predictions on mnist, test are those of torch" in capsys.readouterr().out
    images = load_dataset("mnist", mnist_dir).eval_split.images
    file = load(Path("digits"), kind)
    assert_same(file, mnist_run, images, 1000)
    assert_same(file, mnist_run, images[:700], 7)
    assert_same(file, mnist_run, images[:100], 1)


@pytest.mark.parametrize("kind", FORMATS)
def test_the_mlp_is_exported_and_compared_on_drawn_digits(
    kind: str, cwd: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_file(build_model("mlp", seed=3).state_dict(), "model.safetensors")
    Path("digits").write_text("what was there before")
    assert main(["export", "--to", kind, "model.safetensors", "digits"]) == 0
    lines, errors = capsys.readouterr()
    first, second, last = lines.splitlines()
    assert errors == ""
    assert first == "digits: mlp, images uint8 [n, 28, 28] in, ink 255 on 0; probabilities float32 [n, 10] out"
    assert second.startswith(
        "2,000 of 2,000 predictions on drawn digits (there is no mnist in data) are those of torch"
    )
    assert last.startswith("next: ")
    assert_same(load(Path("digits"), kind), Path("model.safetensors"), torch.randint(256, (21, 28, 28)).byte(), 7)


def test_safetensors_load_into_the_tutorials_class(cwd: Path, capsys: pytest.CaptureFixture[str]) -> None:
    training = {"dataset": {"name": "synthetic", "fingerprint": "?"}}
    path = checkpoint.save(Path("run"), 1, build_model("cnn", seed=0).state_dict(), training, keep=1)
    assert main(["export", str(path), "--to", "safetensors", "digits.safetensors"]) == 0
    CNN().load_state_dict(load_file("digits.safetensors"), strict=True)
    with safe_open("digits.safetensors", framework="pt") as file:
        assert json.loads(file.metadata()["about"]) == {"model": "cnn", "dataset": "synthetic"}
    assert capsys.readouterr().out.startswith("digits.safetensors: the weights of cnn, 8 tensors")
    assert main(["export", "digits.safetensors", "--to", "safetensors", "again.safetensors"]) == 0
    assert Path("again.safetensors").read_bytes() == Path("digits.safetensors").read_bytes()


def test_a_file_that_predicts_something_else_is_not_written(
    cwd: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    save_file(build_model("mlp", seed=3).state_dict(), "model.safetensors")
    wrong = (b"wrong", lambda _: lambda images: torch.eye(10)[torch.arange(len(images)) % 10])
    monkeypatch.setattr(export, "to_torch_export", lambda _: wrong)
    assert main(["export", "--to", "torch-export", "model.safetensors", "digits"]) == 1
    sentence = capsys.readouterr().err
    assert "the exported network predicts another digit for 1," in sentence
    assert "of 2,000 images of drawn digits" in sentence
    assert "so digits was not written; try another format\n" in sentence
    assert not Path("digits").exists()


def test_without_the_extra_it_says_what_to_install(
    cwd: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    assert main(["export", "--to", "onnx", "run", "digits.onnx"]) == 2
    assert capsys.readouterr().err == (
        "mnist-dist: --to onnx needs onnx, onnxruntime, onnxscript, which are not installed; run "
        "`pip install 'mnist-dist[export]'`, or use --to torch-export\n"
    )


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["run", "digits"], "the following arguments are required: --to"),
        (["--to", "onxx", "run", "digits"], "invalid choice: 'onxx'"),
        (["--to", "safetensors", "run"], "give RUN and FILE, and nothing else, beside --to safetensors"),
        (["--to", "safetensors", "run", "a", "b"], "give RUN and FILE, and nothing else"),
        (["--to", "safetensors", "run", "--force", "a"], "there is no option --force"),
        (["--to", "safetensors", "model.safetensors", "."], ". is a folder; give the name of a file in it"),
        (["--to", "safetensors", "model.safetensors", "no/file"], "/no for file; make it first"),
        (["--to", "safetensors", "nowhere", "digits"], "there is no nowhere; give a run's folder"),
        (["--to", "safetensors", "model.safetensors", "x" * 5000], "File name too long"),
        (["--to", "safetensors", "model.safetensors", "/proc/digits"], "/proc/digits cannot be written"),
    ],
    ids=lambda value: " ".join(value)[:60] if isinstance(value, list) else "",
)
def test_bad_requests(arguments: list[str], sentence: str, cwd: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_file(build_model("mlp", seed=3).state_dict(), "model.safetensors")
    assert main(["export", *arguments]) == (1 if "/proc/digits" in arguments else 2)
    out, error = capsys.readouterr()
    assert (out, error.count("\n")) == ("", 1)
    assert error.startswith("mnist-dist: ")
    assert sentence in error
