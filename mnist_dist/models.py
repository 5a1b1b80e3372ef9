"""The two classic networks, with the tutorials' own shapes and parameter names.

Both take images of shape [batch, 28, 28] or [batch, 1, 28, 28], float, scaled to [0, 1], and return logits of
shape [batch, 10]; IMAGE_SHAPE and NUM_CLASSES are where other images are named. Their state dicts load into the
tutorials' own classes with strict=True.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

IMAGE_SHAPE = (1, 28, 28)  # channels, rows, columns
NUM_CLASSES = 10


class MLP(nn.Sequential):
    """784-512-256-10 with ReLU: 535,818 parameters, named 0, 2 and 4 as in the tutorial's nn.Sequential."""

    def __init__(self) -> None:
        size = math.prod(IMAGE_SHAPE)
        super().__init__(nn.Linear(size, 512), nn.ReLU(), nn.Linear(512, 256), nn.ReLU(), nn.Linear(256, NUM_CLASSES))

    def forward(self, images: Tensor) -> Tensor:
        """Logits [batch, 10] of images [batch, 28, 28]."""
        return super().forward(check_images(images).flatten(1))  # type: ignore[no-any-return, no-untyped-call]


class CNN(nn.Module):
    """Three 3x3 convolutions (32, 64, 128), each with ReLU and 2x2 max-pooling, and one linear layer: 104,202
    parameters."""

    def __init__(self) -> None:
        super().__init__()
        channels, rows, columns = IMAGE_SHAPE
        self.conv1 = nn.Conv2d(channels, 32, kernel_size=3, padding=1)
        self.conv2 = nn.Conv2d(32, 64, kernel_size=3, padding=1)
        self.conv3 = nn.Conv2d(64, 128, kernel_size=3, padding=1)
        self.fc1 = nn.Linear(128 * (rows // 8) * (columns // 8), NUM_CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        """Logits [batch, 10] of images [batch, 28, 28]."""
        x = check_images(images)
        for conv in (self.conv1, self.conv2, self.conv3):
            # Pooling before ReLU: max and ReLU commute, gradients included, and ReLU has a quarter of the work.
            x = F.relu(F.max_pool2d(conv(x), 2))
        return self.fc1(x.flatten(1))  # type: ignore[no-any-return]


class Classifier(nn.Module):
    """A network as others use it: images uint8 [n, 28, 28] in, ink 255 on 0; probabilities float32 [n, 10] out."""

    def __init__(self, network: nn.Module) -> None:
        """In evaluation mode."""
        super().__init__()
        self.network = network
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        """Probabilities [n, 10] of images uint8 [n, 28, 28]."""
        return self.network(images.float() / 255).softmax(1)  # type: ignore[no-any-return]


def check_images(images: Tensor) -> Tensor:
    """Images as [batch, 1, 28, 28]. Raises ValueError for another shape, which a view would take apart."""
    channels, rows, columns = IMAGE_SHAPE
    if images.shape[1:] != IMAGE_SHAPE and (channels != 1 or images.shape[1:] != (rows, columns)):
        grey = f"neither [batch, {rows}, {columns}] nor" if channels == 1 else "not"
        raise ValueError(f"images of shape {list(images.shape)} are {grey} [batch, {channels}, {rows}, {columns}]")
    return images.view(-1, *IMAGE_SHAPE)


MODELS: dict[str, type[nn.Module]] = {"mlp": MLP, "cnn": CNN}


def build_model(name: str, seed: int) -> nn.Module:
    """The network with torch's default initial weights, which are a pure function of the seed.

    On the CPU, fp32; the global random state is left as it was.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return MODELS[name]().to(memory_format=torch.channels_last)


def num_parameters(model: nn.Module) -> int:
    """How many numbers the network learns."""
    return sum(p.numel() for p in model.parameters())
