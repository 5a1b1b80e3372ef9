"""A step is torch's own, however it is cut into shards and micro-batches, replayed in a graph, or scaled for fp16."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim import SGD, Adam, AdamW
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from mnist_dist.models import build_model
from mnist_dist.training.optimizer import MovingAverage, build_optimizer
from tests.unit.training.steps import NUM_IMAGES, keep_threads, make_config, make_sampler, make_split, make_step, train

_threads = pytest.fixture(autouse=True)(keep_threads)

EPOCH = range(7)
TWO_EPOCHS = range(14)
SIX_EPOCHS = range(42)  # the short last batch is replayed from the fourth on


def copied(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in tensors.items()}


def check_close(mine: dict[str, Tensor], other: dict[str, Tensor], atol: float) -> None:
    assert mine.keys() == other.keys()
    for name, tensor in other.items():
        torch.testing.assert_close(mine[name], tensor, rtol=0, atol=atol, msg=lambda text, name=name: f"{name}: {text}")


def check_same(mine: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    check_close(mine, other, atol=0)


# Not the CNN with Adam: gradients about zero, which its pooling has many of, become steps of the size of the others.
@pytest.mark.parametrize(("model", "optimizer"), [("mlp", "sgd"), ("mlp", "adam"), ("mlp", "adamw"), ("cnn", "sgd")])
def test_an_epoch_is_that_of_a_plain_loop(model: Any, optimizer: Any) -> None:
    config = make_config(model=model, optimizer=optimizer, weight_decay=0.01, label_smoothing=0.1, clip_grad_norm=1.0)
    step, sampler = make_step(config), make_sampler(config)
    losses = train(step, EPOCH)

    network, (images, labels) = build_model(model, config.seed), make_split()
    kinds = {
        "sgd": lambda p: SGD(p, lr=1, momentum=config.momentum, nesterov=True, weight_decay=0.01),
        "adam": lambda p: Adam(p, lr=1, betas=(config.momentum, config.beta2), weight_decay=0.01),
        "adamw": lambda p: AdamW(p, lr=1, betas=(config.momentum, config.beta2), weight_decay=0.01),
    }
    plain, expected = kinds[optimizer](network.parameters()), []
    for number in EPOCH:
        rows = sampler.order(0)[number * config.batch_size : (number + 1) * config.batch_size]
        plain.param_groups[0]["lr"] = 1e-3 * (1 + number % 7)
        loss = F.cross_entropy(network(images[rows].float() / 255), labels[rows], label_smoothing=0.1)
        plain.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        plain.step()
        expected.append(float(loss.detach()) * len(rows))  # the last batch is short
    assert losses == pytest.approx(expected, rel=1e-4)
    check_close(step.weights(), network.state_dict(), atol=2e-4)


@pytest.mark.parametrize("bit_exact", [1, 2, 4, 8, 16])  # with 8 and 16 the last batch of four has masked images
@pytest.mark.parametrize("settings", [{}, {"micro_batch": 1}, {"shift": 2.0, "elastic": 1.0}, {"clip_grad_norm": 0.1}])
def test_shards_train_the_same(bit_exact: int, settings: dict[str, Any]) -> None:
    whole, cut = (make_step(make_config(optimizer="sgd", bit_exact=n, **settings)) for n in (0, bit_exact))
    assert train(cut, TWO_EPOCHS) == pytest.approx(train(whole, TWO_EPOCHS), rel=1e-4)
    assert cut.num_shards == bit_exact
    check_close(cut.weights(), whole.weights(), atol=1e-5)


@pytest.mark.parametrize("micro_batch", [1, 3, 5, 8, 16])
def test_a_micro_batch_changes_nothing(micro_batch: int) -> None:
    whole, cut = (make_step(make_config(optimizer="sgd", micro_batch=n)) for n in (0, micro_batch))
    assert train(cut, EPOCH) == pytest.approx(train(whole, EPOCH), rel=1e-4)
    check_close(cut.weights(), whole.weights(), atol=1e-5)


@pytest.mark.parametrize(
    "settings",
    [
        {"optimizer": "adam"},
        {"optimizer": "adamw", "micro_batch": 5, "clip_grad_norm": 1.0},
        {"optimizer": "sgd", "ema": 0.9},
        {"shift": 2.0, "rotate": 10.0, "elastic": 1.0},
        {"bit_exact": 8, "shift": 2.0},  # with masked images in the last batch
    ],
)
def test_replayed_steps_are_the_steps(settings: dict[str, Any]) -> None:
    config = make_config(**settings)
    step, replayed = make_step(config), make_step(config, replay=True)
    losses, replayed_losses = train(step, SIX_EPOCHS), train(replayed, SIX_EPOCHS)
    assert set(replayed.graphs.replays) == {16, 4}
    assert replayed_losses == pytest.approx(losses, rel=1e-6)  # the learning rate is a tensor there, in fp32
    check_close(replayed.weights(), step.weights(), atol=1e-4)


# --- the moving average ---


def test_the_average_is_torchs_own() -> None:
    network = build_model("mlp", seed=0)
    average, reference = MovingAverage(network, 0.9), AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    for _ in range(3):
        with torch.no_grad():
            for parameter in network.parameters():
                parameter += 1
        average.update_parameters(network)
        reference.update_parameters(network)
    check_same(average.state_dict(), reference.state_dict())


def test_an_average_moves_with_each_step_and_is_what_is_evaluated() -> None:
    step = make_step(make_config(ema=0.9))
    assert step.average
    reference = AveragedModel(step.network, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    for number in EPOCH:
        train(step, range(number, number + 1))
        reference.update_parameters(step.network)
    check_same(step.weights(), reference.module.state_dict())
    without = make_step(make_config())
    train(without, EPOCH)
    check_same(step.network.state_dict(), without.weights())  # training itself does not see it


# --- fp16's scaler ---

TOO_LARGE = 2.0**127


def with_scaler(init_scale: float, **settings: Any) -> Any:
    """A step with the scaler that fp16 has."""
    step = make_step(make_config(**settings))
    step.scaler = torch.amp.GradScaler("cpu", init_scale=init_scale)
    step.optimizer = build_optimizer(step.config, step.network, in_graph=False, precision="fp16")
    return step


def that_overflows(**settings: Any) -> Any:
    """The same with weights, and so gradients, that are too large for its scale even in fp32."""
    step = with_scaler(TOO_LARGE, **settings)
    with torch.no_grad():
        for parameter in step.network.parameters():
            parameter *= 8
    if step.average:
        step.average.module.load_state_dict(step.network.state_dict())
    return step


@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "adam", "muon"])
@pytest.mark.parametrize("bit_exact", [0, 2])
def test_a_gradient_that_overflows_is_skipped(optimizer: str, bit_exact: int) -> None:
    step = that_overflows(optimizer=optimizer, ema=0.9, bit_exact=bit_exact)
    before, average = copied(step.network.state_dict()), copied(step.weights())
    (loss,) = train(step, range(1))
    assert step.was_skipped
    check_same(step.network.state_dict(), before)
    check_same(step.weights(), average)  # nor does the average move
    assert step.average.n_averaged == 0
    assert step.scaler.get_scale() == TOO_LARGE / 2
    assert step.is_finite()
    step.scaler = None
    assert loss == train(step, range(1))[0]  # what is reported is not scaled


@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "adam", "muon"])
@pytest.mark.parametrize("bit_exact", [0, 2])
def test_a_good_gradient_is_not_skipped_and_its_scale_leaves_no_trace(optimizer: str, bit_exact: int) -> None:
    step = with_scaler(2.0**10, optimizer=optimizer, ema=0.9, bit_exact=bit_exact)
    plain = make_step(make_config(optimizer=optimizer, ema=0.9, bit_exact=bit_exact))
    before = copied(step.network.state_dict())
    for number in EPOCH:
        assert train(step, range(number, number + 1)) == pytest.approx(train(plain, range(number, number + 1)))
        assert not step.was_skipped
    assert not any(torch.equal(tensor, before[name]) for name, tensor in step.network.state_dict().items())
    check_close(step.network.state_dict(), plain.network.state_dict(), atol=1e-6)
    check_close(step.weights(), plain.weights(), atol=1e-6)


@pytest.mark.parametrize("optimizer", ["adam", "adamw"])
def test_the_scaler_finds_a_scale_that_fits(optimizer: str) -> None:
    step, skipped = that_overflows(optimizer=optimizer), []
    step.learning_rate = lambda _: 1e-6  # so little that its gradient stays as large as it is
    before = copied(step.network.state_dict())
    for _ in range(40):
        train(step, range(1))
        skipped.append(step.was_skipped)
        if step.was_skipped:
            check_same(step.network.state_dict(), before)
    assert skipped[0]
    assert not skipped[-1]
    assert skipped == sorted(skipped, reverse=True)  # it is found once
    assert step.scaler.get_scale() == TOO_LARGE / 2 ** sum(skipped)
    assert not torch.equal(step.network.get_parameter("0.weight"), before["0.weight"])


def skip_one(step: Any) -> None:
    """A step whose gradient overflows: for once the scale is too large for any."""
    scaler, weights = step.scaler, copied(step.network.state_dict())
    with torch.no_grad():
        for parameter in step.network.parameters():
            parameter *= 8
    step.scaler = torch.amp.GradScaler("cpu", init_scale=TOO_LARGE)
    train(step, range(1))
    assert step.was_skipped
    step.network.load_state_dict(weights)
    step.scaler = scaler


@pytest.mark.parametrize(
    ("optimizer", "when"),
    [
        ("sgd", 0),
        ("adam", 0),
        ("adamw", 0),
        ("sgd", 3),
        ("adam", 3),
        ("adamw", 3),
    ],
)
def test_a_skipped_step_leaves_no_trace_in_the_optimizer(
    optimizer: str, when: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)  # with NaN, in this mode:
    torch.use_deterministic_algorithms(True)
    try:
        skipped, undisturbed = (with_scaler(2.0**10, optimizer=optimizer) for _ in range(2))
        losses = train(undisturbed, EPOCH)
        assert train(skipped, range(when)) == losses[:when]
        skip_one(skipped)
        assert train(skipped, range(when, 7)) == losses[when:]
        check_same(skipped.weights(), undisturbed.weights())
    finally:
        torch.use_deterministic_algorithms(False)


# --- what training goes on with ---


@pytest.mark.parametrize(
    "settings",
    [{"optimizer": "sgd"}, {"optimizer": "adamw", "ema": 0.9}, {"shift": 2.0, "elastic": 1.0, "bit_exact": 2}],
)
def test_a_step_goes_on_where_it_stood(settings: dict[str, Any]) -> None:
    straight, first, second = (make_step(make_config(**settings)) for _ in range(3))
    losses = train(straight, TWO_EPOCHS)
    assert train(first, range(5)) == losses[:5]
    second.load_state_dict(first.state_dict())
    assert train(second, range(5, 14)) == losses[5:]
    check_same(second.weights(), straight.weights())


def test_the_configuration_has_its_way_over_what_was_saved() -> None:
    first, second = make_step(make_config(weight_decay=0.5)), make_step(make_config(weight_decay=0.1, momentum=0.8))
    train(first, range(2))
    second.load_state_dict(first.state_dict())
    (group,) = second.optimizer.param_groups
    assert (group["weight_decay"], group["betas"]) == (0.1, (0.8, second.config.beta2))


def test_an_average_that_was_not_saved_starts_as_the_weights() -> None:
    first, second = make_step(make_config()), make_step(make_config(ema=0.9))
    train(first, range(3))
    second.load_state_dict(copy.deepcopy(first.state_dict()))  # torch's optimizer would take the tensors themselves
    check_same(second.weights(), first.weights())
    train(second, range(3, 4))
    train(first, range(3, 4))
    check_same(second.weights(), first.weights())  # the first update makes the average the weights


def test_the_scalers_state_is_gone_on_with() -> None:
    first, second = that_overflows(), with_scaler(2.0**10)
    train(first, range(3))
    second.load_state_dict(first.state_dict())
    assert second.scaler.get_scale() == first.scaler.get_scale() == TOO_LARGE / 2**3


def test_a_weight_that_is_no_number_is_found() -> None:
    step = make_step(make_config())
    assert step.is_finite()
    with torch.no_grad():
        step.network.get_parameter("2.weight")[3, 5] = float("nan")
    assert not step.is_finite()


def test_the_steps_cover_the_images() -> None:
    """The loops above would also agree if they trained on nothing."""
    sampler = make_sampler(make_config())
    assert sum(sampler.batch(number).num_images for number in EPOCH) == NUM_IMAGES
