"""Weights come out of our own files and those of other programs, and fit their network or are refused by name."""

import io
import os
import pickle
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save, save_file
from torch import Tensor

from mnist_dist.errors import RequestError
from mnist_dist.models import build_model
from mnist_dist.run.weights import load_weights, parse_weights, read_about


def pt(value: object, *, as_zip: bool = True) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer, _use_new_zipfile_serialization=as_zip)
    return buffer.getvalue()


def prefixed(prefix: str, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + name: tensor for name, tensor in weights.items()}


def check_equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


MLP: dict[str, Tensor] = dict(build_model("mlp", seed=1).state_dict())
WRAPPINGS: dict[str, Any] = {
    "plain": MLP,
    "ordered": OrderedDict(MLP),
    "of several GPUs": prefixed("module.", MLP),
    "compiled": prefixed("_orig_mod.", MLP),
    "compiled, of several GPUs": prefixed("module._orig_mod.", MLP),
    "of several GPUs, compiled": prefixed("_orig_mod.module.", MLP),
    "state_dict": {"state_dict": MLP, "epoch": 3},
    "model_state_dict": {"model_state_dict": prefixed("module.", MLP), "optimizer_state_dict": {"state": {}}},
    "model": {"model": MLP, "lr": 0.1},
    "parameters": {name: torch.nn.Parameter(tensor) for name, tensor in MLP.items()},
}


@pytest.mark.parametrize("as_zip", [True, False])
@pytest.mark.parametrize("name", ["model.pt", "model.pth"])
@pytest.mark.parametrize("wrapping", WRAPPINGS)
def test_weights_of_other_programs_are_found(wrapping: str, name: str, as_zip: bool) -> None:
    check_equal(parse_weights(pt(WRAPPINGS[wrapping], as_zip=as_zip), Path(name)), MLP)


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
def test_a_safetensors_file_may_have_the_prefixes_too(prefix: str) -> None:
    check_equal(parse_weights(save(prefixed(prefix, MLP)), Path("model.safetensors")), MLP)


def test_a_prefix_that_not_all_names_have_stays() -> None:
    weights = {"module.a": torch.zeros(1), "b": torch.ones(1)}
    check_equal(parse_weights(save(weights), Path("model.safetensors")), weights)


@pytest.mark.parametrize(
    "value",
    [None, 5, [MLP], {}, {"state_dict": {}}, {"epoch": 3}, {"a": torch.zeros(1), "epoch": 3}],
    ids=["none", "number", "list", "empty", "empty state_dict", "no tensors", "not only tensors"],
)
def test_a_pt_file_without_a_dictionary_of_tensors_is_refused(value: object) -> None:
    with pytest.raises(RequestError) as refused:
        parse_weights(pt(value), Path("model.pt"))
    assert str(refused.value) == "model.pt is not a PyTorch file of weights: it holds no dictionary of tensors"


class Bomb:
    """Runs a command when it is unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch '{self.target}'",)


def test_no_code_of_a_pt_file_is_run(tmp_path: Path) -> None:
    target = tmp_path / "ran"
    values = (Bomb(target), {"state_dict": Bomb(target)}, {**MLP, "x": Bomb(target)}, torch.nn.Linear(1, 1))
    contents = [pickle.dumps(Bomb(target)), *(pt(value, as_zip=z) for value in values for z in (True, False))]
    for content in contents:
        with pytest.raises(RequestError, match=r"^a/model\.pth is not a PyTorch file of weights: ") as refused:
            parse_weights(content, Path("a/model.pth"))
        assert "\n" not in str(refused.value)
        assert not target.exists()


@pytest.mark.parametrize("content", [b"", b"\0" * 7, b"<html>404</html>", save(MLP), pt(MLP)[:-100]])
def test_a_pt_file_that_is_none_is_one_sentence(content: bytes) -> None:
    with pytest.raises(RequestError, match=r"^model\.pt is not a PyTorch file of weights: \S") as refused:
        parse_weights(content, Path("model.pt"))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("metadata", "about"),
    [
        (None, {}),
        ({"format": "pt"}, {}),
        ({"about": '{"dataset": "mnist"}'}, {"dataset": "mnist"}),
        ({"about": "{"}, {}),
        ({"about": "[1]"}, {}),
        ({"about": "[" * 10_000}, {}),
    ],
)
def test_a_file_says_about_itself_what_it_can(
    metadata: dict[str, str] | None, about: dict[str, Any], tmp_path: Path
) -> None:
    path = tmp_path / "model.safetensors"
    save_file(MLP, path, metadata)
    assert read_about(path) == about


def test_a_file_that_is_none_says_nothing(tmp_path: Path) -> None:
    (tmp_path / "model.pt").write_bytes(pt(MLP))
    for path in (tmp_path / "model.pt", tmp_path / "gone", tmp_path):
        assert read_about(path) == {}


@pytest.mark.parametrize("name", ["mlp", "cnn"])
def test_weights_that_fit_are_loaded(name: str) -> None:
    source, target = build_model(name, seed=1), build_model(name, seed=2)
    assert load_weights(target, source.state_dict()) == ""
    check_equal(target.state_dict(), source.state_dict())


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"fc1.bias": None}, "fc1.bias is missing, not (10,)"),
        ({"fc1.bias": torch.zeros(11)}, "fc1.bias is (11,), not (10,)"),
        ({"conv2.weight": torch.zeros(64, 32, 9)}, "conv2.weight is (64, 32, 9), not (64, 32, 3, 3)"),
        ({"fc2.bias": torch.zeros(3)}, "fc2.bias is (3,), not known"),
        ({"fc2.bias": torch.zeros(3), "fc1.bias": None}, "fc1.bias is missing, not (10,)"),
    ],
)
def test_weights_that_do_not_fit_are_named_and_change_nothing(change: dict[str, Tensor], sentence: str) -> None:
    model = build_model("cnn", seed=2)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    weights = {**build_model("cnn", seed=1).state_dict(), **change}
    assert load_weights(model, {key: value for key, value in weights.items() if value is not None}) == sentence
    check_equal(model.state_dict(), before)


def test_another_networks_weights_do_not_fit() -> None:
    sentence = "0.weight is missing, not (512, 784)"
    assert load_weights(build_model("mlp", 0), build_model("cnn", 0).state_dict()) == sentence
