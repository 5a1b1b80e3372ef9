"""A network's weights in files: our own, and those that other programs leave. No code from a file is ever run."""

import io
import json
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load as load_safetensors
from torch import Tensor, nn

from mnist_dist.errors import RequestError, one_line
from mnist_dist.models import MODELS, build_model
from mnist_dist.run import checkpoint
from mnist_dist.run.logger import warn

PREFIXES = ("module.", "_orig_mod.")  # of networks that were wrapped for several GPUs, or compiled


@dataclass(frozen=True)
class Source:
    """Weights, and what is known of them."""

    path: Path
    weights: dict[str, Tensor]
    dataset: str  # that they were trained on; empty where that is not known
    training: dict[str, Any] = field(default_factory=dict)  # of a checkpoint: what training goes on with


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
    found = checkpoint.find(path, warn)
    training = checkpoint.parse_training(found.training, found.path / checkpoint.TRAINING)
    dataset = training.get("dataset", {})
    name = dataset.get("name") if isinstance(dataset, dict) else None
    file = found.path / checkpoint.MODEL
    return Source(file, parse_weights(found.model, file), name or "", training)


def build_network(source: Source) -> tuple[nn.Module, str]:
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
        raise RequestError(f"{source.path} holds weights that are not finite; give an earlier checkpoint")
    return model, name


def parse_weights(data: bytes, origin: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file's bytes, or of a .pt or .pth file's, by its name. Raises RequestError."""
    try:
        if origin.suffix in (".pt", ".pth"):
            with warnings.catch_warnings(action="ignore"):  # what torch says of an odd file is said by the refusal
                loaded = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
            weights = _find_tensors(loaded)
        else:
            weights = load_safetensors(data)
    except Exception as error:  # SafetensorError, and whatever else a forged header or pickle leads to
        kind = "PyTorch" if origin.suffix in (".pt", ".pth") else "safetensors"
        reason = one_line(error)
        raise RequestError(f"{origin} is not a {kind} file of weights: {reason}") from None
    for prefix in PREFIXES * 2:  # in either order
        if weights and all(name.startswith(prefix) for name in weights):
            weights = {name.removeprefix(prefix): tensor for name, tensor in weights.items()}
    return weights


def read_about(path: Path) -> dict[str, Any]:
    """What a model.safetensors says about itself: what it was trained on. Empty where it says nothing."""
    try:
        with safe_open(path, framework="pt") as file:
            about = json.loads((file.metadata() or {}).get(checkpoint.ABOUT, "{}"))
    except Exception:  # what is wrong with it is said by whoever reads its weights
        return {}
    return about if isinstance(about, dict) else {}


def load_weights(model: nn.Module, weights: dict[str, Tensor]) -> str:
    """Put weights into a network; returns what does not fit, in words, or the empty string."""
    expected = {name: tuple(p.shape) for name, p in model.state_dict().items()}
    given = {name: tuple(p.shape) for name, p in weights.items()}
    if expected != given:
        names = [name for name in [*expected, *given] if expected.get(name) != given.get(name)]
        return f"{names[0]} is {given.get(names[0], 'missing')}, not {expected.get(names[0], 'known')}"
    model.load_state_dict(weights)
    return ""


def _find_tensors(loaded: Any) -> dict[str, Tensor]:
    """A state dict, alone or under the names that training programs give it in a larger dictionary."""
    if isinstance(loaded, dict):
        for key in ("state_dict", "model_state_dict", "model"):
            if isinstance(loaded.get(key), dict):
                loaded = loaded[key]
        if loaded and all(isinstance(value, Tensor) for value in loaded.values()):
            return {str(name): tensor for name, tensor in loaded.items()}
    raise ValueError("it holds no dictionary of tensors")
