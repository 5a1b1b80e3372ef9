"""Tensors on any device, brought to the CPU: as they are, or as bytes for a hash."""

from typing import Any

import torch
from torch import Tensor


def to_cpu(state: Any) -> Any:
    """The same state, of dicts, lists and tuples, with its tensors on the CPU. A GPU is waited for once."""
    devices = set()

    def copy(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: copy(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return type(value)(copy(item) for item in value)
        if not isinstance(value, Tensor) or value.device.type == "cpu":
            return value
        devices.add(value.device)
        return torch.empty_like(value, device="cpu", pin_memory=True).copy_(value, non_blocking=True)

    copied = copy(state)
    for device in devices:
        torch.accelerator.synchronize(device)
    return copied


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a tensor on any device, row by row, whatever the order of its memory."""
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data
