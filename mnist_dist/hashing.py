"""The bytes of tensors, for hashes of them."""

import torch
from torch import Tensor


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a tensor on any device, row by row, whatever the order of its memory."""
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data
