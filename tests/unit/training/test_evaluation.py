"""Evaluation: each image once, in fp32, and figures that a plain loop confirms."""

import pytest
import torch
from torch import Tensor, nn

from mnist_dist.data.dataset import Split
from mnist_dist.models import build_model
from mnist_dist.training import evaluation as module
from mnist_dist.training.evaluation import Evaluation, evaluate


@pytest.fixture(scope="module")
def split() -> Split:
    """As many images as leave a short last batch."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (67, 28, 28), dtype=torch.uint8, generator=generator)
    return Split(images, torch.randint(0, 10, (67,), generator=generator))


def evaluation(correct: int, count: int, loss: float = 0.0) -> Evaluation:
    confusion = torch.zeros(10, 10, dtype=torch.int64)
    confusion[3, 3], confusion[3, 5] = correct, count - correct
    return Evaluation(loss, confusion)


@pytest.fixture(scope="module", params=["mlp", "cnn"])
def plain(request: pytest.FixtureRequest, split: Split) -> tuple[nn.Module, float, list[list[int]]]:
    """A network, and its mean loss and confusion matrix as a plain loop over the images finds them."""
    model = build_model(request.param, seed=1)
    for parameter in model.parameters():
        parameter.data.mul_(2)  # a network that is sure of itself, so that small errors in its input show
    loss, confusion = 0.0, [[0] * 10 for _ in range(10)]
    with torch.no_grad():
        for image, label in zip(split.images, split.labels.tolist(), strict=True):
            logits = model(image.unsqueeze(0).float() / 255)[0].double()
            loss += float(logits.logsumexp(0) - logits[label])
            confusion[label][int(logits.argmax())] += 1
    return model, loss / len(split.labels), confusion


@pytest.mark.parametrize("batch_size", [1, 20, 67, 1000])
def test_figures_are_those_of_a_plain_loop(
    batch_size: int, plain: tuple[nn.Module, float, list[list[int]]], split: Split, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "CPU_BATCH_SIZE", batch_size)
    model, loss, confusion = plain
    result = evaluate(model, split)
    assert result.loss == pytest.approx(loss, rel=1e-5)
    assert result.confusion.tolist() == confusion
    assert result.correct == sum(confusion[digit][digit] for digit in range(10))
    assert result.accuracy == result.correct / 67
    assert result.count == 67


def test_confusion_has_the_true_class_down_and_the_predicted_one_across(split: Split) -> None:
    class SaysSeven(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return nn.functional.one_hot(torch.full((len(images),), 7), 10).float()

    confusion = evaluate(SaysSeven(), split).confusion
    assert confusion.dtype == torch.int64
    assert torch.equal(confusion[:, 7], split.labels.bincount(minlength=10))
    assert confusion.sum() == confusion[:, 7].sum() == len(split.labels)


def test_every_class_is_found_where_the_network_is_right() -> None:
    class Reads(nn.Module):
        """Knows the label from the brightness of the first pixel."""

        def forward(self, images: Tensor) -> Tensor:
            return -((images[:, 0, 0, None] * 255 - torch.arange(10)) ** 2)

    labels = torch.arange(10).repeat_interleave(torch.arange(1, 11))
    images = labels.to(torch.uint8).view(-1, 1, 1).expand(-1, 28, 28)
    result = evaluate(Reads(), Split(images, labels))
    assert torch.equal(result.confusion, torch.diag(torch.arange(1, 11)))
    assert result.accuracy == 1


def test_the_network_is_in_evaluation_mode_and_gets_no_gradients(split: Split) -> None:
    torch_model = nn.Sequential(nn.Flatten(), nn.Dropout(0.9), nn.Linear(784, 10))
    torch_model.train()
    first, second = evaluate(torch_model, split), evaluate(torch_model, split)
    assert first.loss == second.loss  # no image was dropped at random
    assert all(p.grad is None for p in torch_model.parameters())


def test_a_record_holds_plain_numbers() -> None:
    assert evaluation(3, 4, loss=0.5).record() == {"loss": 0.5, "accuracy": 0.75, "count": 4}


# Newcombe, Two-sided confidence intervals for the single proportion, Statistics in Medicine 17 (1998), 857-872:
# table I, method 3
@pytest.mark.parametrize(
    ("correct", "count", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0000, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_the_interval_is_the_published_one(correct: int, count: int, low: float, high: float) -> None:
    assert evaluation(correct, count).interval() == pytest.approx((low, high), abs=5e-5)
    # and it treats right and wrong alike
    assert evaluation(count - correct, count).interval() == pytest.approx((1 - high, 1 - low), abs=5e-5)


def test_the_interval_lies_between_zero_and_one_and_holds_the_accuracy() -> None:
    for count in (*range(1, 50), 1000, 10_000, 60_000):
        for correct in {0, 1, count // 2, count - 1, count}:
            result = evaluation(correct, count)
            low, high = result.interval()
            assert 0 <= low <= high <= 1, (correct, count)
            assert low - 1e-12 <= result.accuracy <= high + 1e-12


def test_the_most_confident_mistakes_come_first(split: Split, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CPU_BATCH_SIZE", 20)
    model = build_model("mlp", seed=1)
    with torch.no_grad():
        probabilities = model(split.images.float() / 255).double().softmax(1)
    wrong = [
        (float(row.max()), image, int(split.labels[image]), int(row.argmax()))
        for image, row in enumerate(probabilities)
        if int(row.argmax()) != int(split.labels[image])
    ]
    assert len(wrong) > module.NUM_MISTAKES
    expected = sorted(wrong, reverse=True)[: module.NUM_MISTAKES]
    mistakes = evaluate(model, split).mistakes
    assert [(m.image, m.true, m.predicted) for m in mistakes] == [one[1:] for one in expected]
    assert [m.confidence for m in mistakes] == pytest.approx([one[0] for one in expected], abs=1e-6)


def test_a_network_that_is_always_right_makes_no_mistake(split: Split) -> None:
    class Knows(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return nn.functional.one_hot(split.labels[: len(images)], 10).float()

    assert evaluate(Knows(), split).mistakes == ()
