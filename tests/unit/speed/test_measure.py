"""The step whose parts are timed is the job's step."""

import functools
from typing import Any

import pytest
import torch

from mnist_dist.speed.measure import NUM_DRAWN, PARTS, LapClock, TimedStep, draw_images
from mnist_dist.speed.plan import NUM_IMAGES
from tests.unit.training.steps import keep_threads, make_config, make_step, train

threads = pytest.fixture(autouse=True)(keep_threads)


@pytest.mark.parametrize("settings", [{}, {"bit_exact": 4}, {"micro_batch": 5, "shift": 2.0, "ema": 0.9}])
def test_the_same_weights_with_all_parts_timed(settings: dict[str, Any]) -> None:
    config = make_config(**settings)
    clock = LapClock(torch.device("cpu"))
    timed, whole = make_step(config, build=functools.partial(TimedStep, clock)), make_step(config)
    clock.start()
    began_s = clock.last_s
    assert train(timed, range(9)) == train(whole, range(9))
    for name, weight in whole.weights().items():
        assert torch.equal(weight, timed.weights()[name])
    assert list(clock.seconds) == list(PARTS)
    assert all(seconds > 0 for seconds in clock.seconds.values())
    assert sum(clock.seconds.values()) == pytest.approx(clock.last_s - began_s)  # no time is left out


def test_there_are_as_many_images_as_mnist_has() -> None:
    images, labels = draw_images(torch.device("cpu"))
    assert (len(images), len(labels)) == (NUM_IMAGES, NUM_IMAGES)
    assert torch.equal(images[:NUM_DRAWN], images[-NUM_DRAWN:])
    assert torch.equal(labels[:NUM_DRAWN], labels[-NUM_DRAWN:])
