"""Which cases are measured."""

from typing import Any

import pytest

from mnist_dist.config.schema import Config
from mnist_dist.speed.plan import NUM_IMAGES, Case, Plan, largest_world_size, list_world_sizes, make_plan


def plan(world_size: int, *, on_cpu: bool = True, all_threads: int = 1, **request: Any) -> Plan:
    return make_plan(Config(**request), world_size, threads=1, all_threads=all_threads, on_cpu=on_cpu)


def test_both_networks_and_several_batches_unless_the_request_names_them() -> None:
    assert plan(1).batch_sizes == {"mlp": [64, 512, 4096], "cnn": [64, 256, 1024]}
    assert plan(1, on_cpu=False).batch_sizes == {"mlp": [64, 512, 4096], "cnn": [64, 512, 4096]}
    assert plan(1, batch_size=100).batch_sizes == {"mlp": [100], "cnn": [100]}
    assert plan(1, model="cnn").batch_sizes == {"cnn": [64, 256, 1024]}
    assert plan(1, model="mlp", batch_size=100).cases == [Case("mlp", 100, 1, 1)]


def test_the_same_batch_in_all_and_a_rank_and_one_rank_with_all_cores() -> None:
    assert plan(2, all_threads=2, model="mlp", batch_size=8).cases == [
        Case("mlp", 8, 1, 2),
        Case("mlp", 8, 1, 1),
        Case("mlp", 8, 2, 1),
        Case("mlp", 16, 2, 1),
    ]


def test_a_case_of_two_kinds_is_measured_once() -> None:
    cases = plan(8, model="mlp").cases
    assert cases.count(Case("mlp", 512, 8, 1)) == 1  # 512 in all, and 64 a rank
    assert len(cases) == len(set(cases))


@pytest.mark.parametrize(
    ("request_", "most", "sizes"),
    [
        ({}, 1, [1]),
        ({}, 8, [1, 2, 4, 8]),
        ({"batch_size": 96}, 6, [1, 2, 4, 6]),
        ({"batch_size": 9}, 3, [1, 3]),
        ({"bit_exact": 2}, 2, [1, 2]),
    ],
)
def test_world_sizes_are_powers_of_two_and_the_largest(request_: dict[str, Any], most: int, sizes: list[int]) -> None:
    assert list_world_sizes(Config(**request_), most) == sizes


@pytest.mark.parametrize(
    ("request_", "num_devices", "size"),
    [({}, 1, 1), ({}, 6, 4), ({}, 8, 8), ({}, 200, 64), ({"batch_size": 9}, 8, 1), ({"bit_exact": 2}, 8, 2)],
)
def test_started_alone_there_are_as_many_ranks_as_share_the_batch(
    request_: dict[str, Any], num_devices: int, size: int
) -> None:
    assert largest_world_size(Config(**request_), num_devices) == size


def test_a_batch_of_more_images_than_there_are_is_left_out_with_the_reason() -> None:
    made = plan(32, on_cpu=False, model="cnn")
    assert max(case.batch_size for case in made.cases) <= NUM_IMAGES
    assert made.left_out == [
        f"cnn, batch {4096 * ranks}, {ranks} ranks x 1 thread: more than the 60,000 images of MNIST"
        for ranks in (16, 32)
    ]


def test_a_batch_that_cannot_be_shared_is_left_out_with_the_reason() -> None:
    made = make_plan(Config(model="cnn"), 6, threads=1, all_threads=1, on_cpu=True)
    assert "cnn, batch 64, 6 ranks x 1 thread: the batch cannot be shared equally" in made.left_out
    assert Case("cnn", 64 * 6, 6, 1) in made.cases
