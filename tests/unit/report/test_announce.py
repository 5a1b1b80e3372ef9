"""What a run says of its GPUs."""

from types import SimpleNamespace
from typing import Any, cast

from mnist_dist.distributed.world import Member, World
from mnist_dist.report.announce import describe_gpus


def world(*members: Member) -> World:
    """Ranks that have joined."""
    return cast(World, SimpleNamespace(members=list(members)))


def member(host: str, device: str, driver: str = "") -> Member:
    """One rank."""
    return Member(host, (0,), has_fast_bf16=False, device=device, processor="x", driver=driver)


def test_cpus_have_no_gpus() -> None:
    assert describe_gpus(world(member("a", "cpu"))) == {}


def test_the_gpu_and_driver_of_each_host_are_recorded_once() -> None:
    ranks = [member("a", "cuda: NVIDIA H100", "570.1")] * 2 + [member("b", "cuda: NVIDIA A100", "560.2")]
    said: dict[str, Any] = describe_gpus(world(*ranks))
    assert said["gpus"] == {"a": "NVIDIA H100, driver 570.1", "b": "NVIDIA A100, driver 560.2"}
    assert said.keys() == {"gpus", "cuda", "nccl"}
