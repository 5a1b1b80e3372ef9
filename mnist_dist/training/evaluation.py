"""Exact evaluation of a bare network on one rank: each image once, in fp32, no wrapper around it."""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mnist_dist.data.dataset import Split
from mnist_dist.models import NUM_CLASSES
from mnist_dist.tensors import to_cpu

# Images at once, which bounds the memory; the result does not depend on it beyond float rounding. On a CPU few, whose
# activations fit into its caches; on a GPU many, since each batch costs a dozen launches.
CPU_BATCH_SIZE, GPU_BATCH_SIZE = 250, 5000
NUM_MISTAKES = 24  # to keep


class Mistake(NamedTuple):
    """An image that a network takes for another class."""

    image: int  # its place in the split
    true: int
    predicted: int
    confidence: float  # the probability that the network gives to what it predicts


@dataclass(frozen=True)
class Evaluation:
    """What a network makes of a set of images."""

    loss: float  # mean cross-entropy, nats
    confusion: Tensor  # int64 [classes, classes]: true class by predicted class
    mistakes: tuple[Mistake, ...] = ()  # the most confident ones, at most NUM_MISTAKES, the worst first

    @property
    def count(self) -> int:
        """Images evaluated."""
        return int(self.confusion.sum())

    @property
    def correct(self) -> int:
        """Images whose most likely class is their own."""
        return int(self.confusion.diagonal().sum())

    @property
    def accuracy(self) -> float:
        """Share of images classified right, between 0 and 1."""
        return self.correct / self.count

    def interval(self) -> tuple[float, float]:
        """The accuracy's 95 % interval over images."""
        return accuracy_interval(self.accuracy, self.count)

    def record(self) -> dict[str, Any]:
        """The figures of one `eval` line of metrics.jsonl."""
        return {"loss": self.loss, "accuracy": self.accuracy, "count": self.count}


def accuracy_interval(accuracy: float, count: int) -> tuple[float, float]:
    """The 95 % interval of an accuracy, between 0 and 1, over `count` images (Wilson 1927, score interval)."""
    n, p, z = count, accuracy, 1.959963984540054
    centre, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    return max((centre - half) / scale, 0.0), min((centre + half) / scale, 1.0)


@torch.inference_mode()
def evaluate(model: nn.Module, split: Split) -> Evaluation:
    """Evaluate a bare network on images of its own device."""
    device = split.images.device
    size = CPU_BATCH_SIZE if device.type == "cpu" else GPU_BATCH_SIZE
    losses, confidences, predictions = [], [], []
    model.eval()
    for images, labels in zip(split.images.split(size), split.labels.split(size), strict=True):
        logits = model(images.float() / 255)
        losses.append(F.cross_entropy(logits, labels, reduction="sum").double())
        predictions.append(logits.argmax(1))
        confidences.append(logits.double().softmax(1).amax(1))  # many are 1 in float32
    loss, confidence, predicted, labels = to_cpu(
        [torch.stack(losses).sum(), torch.cat(confidences), torch.cat(predictions), split.labels]
    )
    confusion = torch.bincount(labels * NUM_CLASSES + predicted, minlength=NUM_CLASSES**2)
    mistakes = find_mistakes(confidence, predicted, labels)
    return Evaluation(float(loss) / len(labels), confusion.view(NUM_CLASSES, NUM_CLASSES), mistakes)


def find_mistakes(confidence: Tensor, predicted: Tensor, labels: Tensor) -> tuple[Mistake, ...]:
    """The most confident mistakes, at most NUM_MISTAKES; all three are [n], on the CPU."""
    wrong = (predicted != labels).nonzero().flatten()
    worst = wrong[confidence[wrong].argsort(descending=True, stable=True)][:NUM_MISTAKES]
    return tuple(Mistake(i, int(labels[i]), int(predicted[i]), float(confidence[i])) for i in worst.tolist())
