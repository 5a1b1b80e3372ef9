"""The two classic networks, with the tutorials' own shapes and parameter names.

Both take images of shape [batch, 28, 28] or [batch, 1, 28, 28], float, scaled to [0, 1], and return logits of
shape [batch, 10]. Their state dicts load into the tutorials' own classes with strict=True.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class MLP(nn.Sequential):
    """784-512-256-10 with ReLU: 535,818 parameters, named 0, 2 and 4 as in the tutorial's nn.Sequential."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(784, 512), nn.ReLU(), nn.Linear(512, 256), nn.ReLU(), nn.Linear(256, 10))

    def forward(self, images: Tensor) -> Tensor:
        """Logits [batch, 10] of images [batch, 28, 28]."""
        return super().forward(check_images(images).flatten(1))  # type: ignore[no-any-return, no-untyped-call]


class CNN(nn.Module):
    """Three 3x3 convolutions (32, 64, 128), each with ReLU and 2x2 max-pooling, and one linear layer: 104,202
    parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 32, kernel_size=3, padding=1)
        self.conv2 = nn.Conv2d(32, 64, kernel_size=3, padding=1)
        self.conv3 = nn.Conv2d(64, 128, kernel_size=3, padding=1)
        self.fc1 = nn.Linear(128 * 3 * 3, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Logits [batch, 10] of images [batch, 28, 28]."""
        x = check_images(images)
        for conv in (self.conv1, self.conv2, self.conv3):
            # Pooling before ReLU: max and ReLU commute, gradients included, and ReLU has a quarter of the work.
            x = F.relu(F.max_pool2d(conv(x), 2))
        return self.fc1(x.flatten(1))  # type: ignore[no-any-return]


def check_images(images: Tensor) -> Tensor:
    """Images as [batch, 1, 28, 28]. Raises ValueError for another shape, which a view would take apart."""
    if images.shape[1:] not in ((28, 28), (1, 28, 28)):
        raise ValueError(f"images of shape {list(images.shape)} are neither [batch, 28, 28] nor [batch, 1, 28, 28]")
    return images.view(-1, 1, 28, 28)


def build_model(name: str, seed: int) -> nn.Module:
    """The network with torch's default initial weights, which are a pure function of the seed.

    On the CPU, fp32; the global random state is left as it was.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return MLP() if name == "mlp" else CNN().to(memory_format=torch.channels_last)


def num_parameters(model: nn.Module) -> int:
    """How many numbers the network learns."""
    return sum(p.numel() for p in model.parameters())
