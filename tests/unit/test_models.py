"""The two networks are the tutorials' own: the same names, sizes, initial weights, logits and gradients."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mnist_dist.models import build_model, num_parameters


def tutorial_mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(784, 512), nn.ReLU(), nn.Linear(512, 256), nn.ReLU(), nn.Linear(256, 10))


class TutorialCNN(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 32, 3, padding=1)
        self.conv2 = nn.Conv2d(32, 64, 3, padding=1)
        self.conv3 = nn.Conv2d(64, 128, 3, padding=1)
        self.fc1 = nn.Linear(128 * 3 * 3, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv1(x))
        x = F.max_pool2d(x, 2)
        x = F.relu(self.conv2(x))
        x = F.max_pool2d(x, 2)
        x = F.relu(self.conv3(x))
        x = F.max_pool2d(x, 2)
        x = x.view(x.size(0), -1)
        return self.fc1(x)


# name, the tutorial's class, the shape of one image that it takes, the names of its parameters
NETWORKS = [
    ("mlp", tutorial_mlp, (784,), ["0", "2", "4"]),
    ("cnn", TutorialCNN, (1, 28, 28), ["conv1", "conv2", "conv3", "fc1"]),
]
IDS = ["mlp", "cnn"]


@pytest.fixture
def images() -> Tensor:
    """Sixteen images that are mostly exactly zero, as MNIST's are: most of what the pooling compares is then equal."""
    generator = torch.Generator().manual_seed(1)
    noise = torch.rand(16, 28, 28, generator=generator)
    return noise * (torch.rand(16, 28, 28, generator=generator) > 0.8)


@pytest.mark.parametrize(("name", "count"), [("mlp", 535_818), ("cnn", 104_202)])
def test_parameters_are_as_many_as_published(name: str, count: int) -> None:
    assert num_parameters(build_model(name, seed=0)) == count


@pytest.mark.parametrize(("name", "tutorial", "shape", "names"), NETWORKS, ids=IDS)
def test_state_dict_has_the_tutorials_names_and_nothing_else(name, tutorial, shape, names) -> None:
    expected = [f"{layer}.{kind}" for layer in names for kind in ("weight", "bias")]
    assert list(build_model(name, seed=0).state_dict()) == expected


@pytest.mark.parametrize(("name", "tutorial", "shape", "names"), NETWORKS, ids=IDS)
def test_weights_in_the_tutorials_class_give_the_same_logits_and_gradients(
    name, tutorial, shape, names, images: Tensor
) -> None:
    ours, theirs = build_model(name, seed=3), tutorial()
    theirs.load_state_dict(ours.state_dict(), strict=True)
    labels = torch.arange(16) % 10
    here, there = images.clone().requires_grad_(), images.view(16, *shape).clone().requires_grad_()
    logits, expected = ours(here), theirs(there)
    assert logits.shape == (16, 10)
    torch.testing.assert_close(logits, expected)

    F.cross_entropy(logits, labels).backward()
    F.cross_entropy(expected, labels).backward()
    for (key, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert q.grad.abs().sum() > 0, key
        torch.testing.assert_close(p.grad, q.grad, msg=lambda text, key=key: f"{key}: {text}")
    torch.testing.assert_close(here.grad, there.grad.view_as(here))


@pytest.mark.parametrize("name", IDS)
def test_a_channel_axis_changes_nothing(name: str, images: Tensor) -> None:
    model = build_model(name, seed=0)
    torch.testing.assert_close(model(images.unsqueeze(1)), model(images))


@pytest.mark.parametrize(("name", "tutorial", "shape", "names"), NETWORKS, ids=IDS)
def test_initial_weights_are_torchs_defaults_under_the_seed(name, tutorial, shape, names) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(17)
        expected = tutorial().state_dict()
    for key, value in build_model(name, seed=17).state_dict().items():
        assert value.dtype == torch.float32
        assert value.device.type == "cpu"
        assert torch.equal(value, expected[key]), key


@pytest.mark.parametrize("name", IDS)
def test_initial_weights_follow_from_the_seed_alone(name: str) -> None:
    first = build_model(name, seed=5).state_dict()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(999)
        torch.rand(7)
        again = build_model(name, seed=5).state_dict()
    other = build_model(name, seed=6).state_dict()
    for key, value in first.items():
        assert torch.equal(value, again[key]), key
        assert not torch.equal(value, other[key]), key


@pytest.mark.parametrize("name", IDS)
def test_building_leaves_the_global_random_state_alone(name: str) -> None:
    before = torch.get_rng_state()
    build_model(name, seed=5)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("name", IDS)
@pytest.mark.parametrize("shape", [(1, 3, 28, 28), (2, 56, 56), (28, 28), (4, 784), (3, 1, 28, 14)])
def test_what_is_no_batch_of_images_is_refused(name: str, shape: tuple[int, ...]) -> None:
    """A view would take three colours for three images, and one large image for four small ones."""
    with pytest.raises(ValueError, match=r"neither \[batch, 28, 28\] nor"):
        build_model(name, seed=0)(torch.zeros(shape))
