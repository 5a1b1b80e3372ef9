"""A network's weights in files: our own, and those that other programs leave. No code from a file is ever run."""

import io
import json
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load as load_safetensors
from torch import Tensor, nn

from mnist_dist.errors import RequestError, one_line
from mnist_dist.run.checkpoint import ABOUT

PREFIXES = ("module.", "_orig_mod.")  # of networks that were wrapped for several GPUs, or compiled


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
            about = json.loads((file.metadata() or {}).get(ABOUT, "{}"))
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
