"""Ranks that are not one job do not become one: what they are asked for is compared before they join."""

import os
import socket
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from mnist_dist.config.schema import MAY_DIFFER, Config
from mnist_dist.distributed import rendezvous as module
from mnist_dist.distributed.launch_env import VARIABLES, LaunchEnv
from mnist_dist.distributed.rendezvous import (
    agree,
    connect_store,
    describe_request,
    refuse_difference,
    refuse_unreachable,
)
from mnist_dist.distributed.setup import choose_precision, choose_threads, init_distributed
from mnist_dist.distributed.world import Member
from mnist_dist.errors import JobError, RequestError, RunError
from tests.conftest import become, free_port, rank_environment, start_verb, wait_ranks

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
HOST = socket.gethostname()


def member(cores: range | tuple[int, ...] = (0,), host: str = "a", has_fast_bf16: bool = False) -> Member:
    return Member(host, tuple(cores), has_fast_bf16, "cpu", "x")


@pytest.mark.parametrize(
    ("members", "threads"),
    [
        ([member(range(8))], [8]),
        ([member(range(8))] * 2, [4, 4]),  # one machine, shared
        ([member(range(8))] * 3, [2, 2, 2]),
        ([member(range(2))] * 4, [1, 1, 1, 1]),  # more ranks than cores
        ([member(range(8)), member(range(8), "b")], [8, 8]),  # the same numbers on another machine are other cores
        ([member(range(4)), member(range(4, 8))], [4, 4]),  # srun gave each rank its own
        ([member(range(4)), member(range(8))], [2, 4]),  # partly shared
        ([member(range(8)), member(range(4)), member(range(4, 8))], [2, 2, 2]),
    ],
)
def test_threads_are_the_cores_divided_by_the_ranks_that_share_them(members: list[Member], threads: list[int]) -> None:
    ranks = range(len(members))
    assert [choose_threads(members, rank, CPU, bit_exact=False) for rank in ranks] == threads
    assert [choose_threads(members, rank, CPU, bit_exact=True) for rank in ranks] == [1] * len(members)
    assert [choose_threads(members, rank, GPU, bit_exact=False) for rank in ranks] == [0] * len(members)


@pytest.mark.parametrize(
    ("precision", "fast", "device", "chosen"),
    [
        ("auto", [True, True], CPU, "bf16"),
        ("auto", [True, False], CPU, "fp32"),
        ("auto", [True], GPU, "bf16"),
        ("fp32", [True], CPU, "fp32"),
        ("bf16", [False], CPU, "bf16"),
        ("fp16", [True], GPU, "fp16"),
        ("tf32", [True], GPU, "tf32"),
    ],
)
def test_bf16_is_chosen_where_all_ranks_are_faster_with_it(
    precision: Any, fast: list[bool], device: torch.device, chosen: str
) -> None:
    members = [member(has_fast_bf16=is_fast) for is_fast in fast]
    assert choose_precision(Config(precision=precision), members, device) == chosen


@pytest.mark.parametrize("precision", ["fp16", "tf32"])
def test_a_precision_that_a_cpu_does_not_have_is_refused_by_all(precision: Any) -> None:
    with pytest.raises(RequestError, match=f"^precision={precision} needs a GPU ") as refused:
        choose_precision(Config(precision=precision), [member()], CPU)
    assert refused.value.on_every_rank


# --- what the ranks were asked for ---


def request(host: str = "a", refusal: str = "", **changes: object) -> dict[str, object]:
    place = {"host": host, "refusal": refusal, "address": ["10.0.0.1", 4000]}
    return {"lr": 0.005, "seed": 0, "code": "abc", "torch": "2.11"} | place | changes


def test_ranks_with_the_same_request_do_not_differ() -> None:
    refuse_difference([request()])
    refuse_difference([request("a"), request("b"), request("a")])  # the host may be another
    refuse_difference([request(address=["127.0.0.1", 4000]), request(address=["127.0.0.1", 5000])])  # on one host


@pytest.mark.parametrize(
    ("requests", "sentence"),
    [
        (
            [request(), request(), request("b", lr=0.001)],
            "rank 2 on b has lr=0.001 and rank 0 on a has lr=0.005; start all ranks with the same request and the same "
            "code",
        ),
        (
            [request(), request("b", code="def"), request("c", lr=1.0)],  # the first rank, not the first key
            "rank 1 on b has code=def and rank 0 on a has code=abc; start all ranks with the same request and the same "
            "code",
        ),
        (
            [request(), request("b", torchvision="0.26")],  # a library that rank 0 does not have
            "rank 1 on b has torchvision=0.26 and rank 0 on a has torchvision=None; start all ranks with the same "
            "request and the same code",
        ),
        (
            [request(accelerate="1.15"), request("b")],
            "rank 1 on b has accelerate=None and rank 0 on a has accelerate=1.15; start all ranks with the same "
            "request and the same code",
        ),
        (
            [request(), request("b", lr=0.001), request("c", refusal="it has no GPU")],  # a refusal goes first
            "rank 2 on c: it has no GPU",
        ),
        (
            [request(refusal="it has no GPU"), request("b", refusal="nor has this")],
            "rank 0 on a: it has no GPU",
        ),
        (
            [request(), request("b", address=["127.0.1.1", 4000])],
            "rank 1 on b: the host's own name leads to 127.0.1.1, where no other host can reach it; mend DNS or "
            "/etc/hosts, or set GLOO_SOCKET_IFNAME to an interface that the others reach",
        ),
    ],
)
def test_a_rank_that_differs_is_named_with_both_values(requests: list[dict[str, object]], sentence: str) -> None:
    with pytest.raises(JobError) as refused:
        refuse_difference(requests)
    assert str(refused.value) == sentence
    assert refused.value.on_every_rank


def test_a_rank_that_another_does_not_reach_is_named() -> None:
    hosts, addresses = ["a", "a", "b"], [("10.0.0.1", 4000), ("10.0.0.1", 4001), ("10.0.0.2", 4000)]
    refuse_unreachable(hosts, addresses, [[], [], []])
    with pytest.raises(
        RunError, match=r"^rank 1 on a cannot connect to rank 2 on b at 10.0.0.2:4000 .no answer.; "
    ) as e:
        refuse_unreachable(hosts, addresses, [[], [(2, "no answer")], [(0, "refused")]])
    assert e.value.on_every_rank


def meet_all(configs: list[Config], refusals: list[str] | None = None) -> list[JobError | None]:
    """Let ranks agree in one store, a thread a rank; returns what each raised."""
    store, raised = dist.HashStore(), [None for _ in configs]

    def come(rank: int) -> None:
        place = {"host": HOST, "refusal": (refusals or [""] * len(configs))[rank], "address": ["127.0.0.1", 1]}
        request = describe_request(configs[rank]) | place
        try:
            assert len(agree(store, "here", request, refuse_difference, LaunchEnv(rank, len(configs)), 10)) == len(
                configs
            )
        except JobError as error:
            raised[rank] = error  # type: ignore[call-overload]

    threads = [threading.Thread(target=come, args=(rank,)) for rank in range(len(configs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return raised  # type: ignore[return-value]


ELSEWHERE: dict[str, Any] = {
    "data_dir": Path("/elsewhere"),
    "mirror": "https://example.org",
    "missing": "fail",
    "run_dir": Path("/runs"),
    "resume": "never",
    "threads": 3,
}


def test_what_may_differ_between_ranks_is_not_compared() -> None:
    assert ELSEWHERE.keys() == set(MAY_DIFFER)
    assert meet_all([Config(), Config(**ELSEWHERE), Config()]) == [None] * 3


@pytest.mark.parametrize("change", [{"lr": 0.001}, {"seed": 1}, {"timeout_s": 301}, {"log_every_steps": 7}], ids=str)
def test_ranks_with_different_requests_are_all_refused_and_rank_0_says_it(change: dict[str, Any]) -> None:
    first, second, third = meet_all([Config(), Config(), Config(**change)])
    for error in (first, second, third):
        assert type(error) is RequestError
        assert error.on_every_rank
    (key,) = change
    assert str(first).startswith(
        f"rank 2 on {HOST} has {key}={getattr(Config(**change), key)} and rank 0 on {HOST} has "
        f"{key}={getattr(Config(), key)}; "
    )


@pytest.mark.parametrize("refused", [0, 1])
def test_a_rank_that_cannot_take_part_tells_the_others(refused: int) -> None:
    refusals = ["", ""]
    refusals[refused] = "it has no GPU"
    raised = meet_all([Config(), Config()], refusals)
    assert [type(error) for error in raised] == [RequestError, RequestError]
    assert str(raised[0]) == f"rank {refused} on {HOST}: it has no GPU"


def test_ranks_that_do_not_come_are_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(module, "HEARING_S", 0)  # nobody is there to hear it
    monkeypatch.setattr(module, "SAY_EVERY_S", 0)
    store = dist.HashStore()
    store.set("here/2", "{}")
    with pytest.raises(RunError, match=r"^of 4 ranks these did not come within 0.1 s .timeout_s.: 1, 3; look at"):
        agree(store, "here", {}, refuse_difference, LaunchEnv(0, 4), 0.1)
    assert "mnist-dist: waiting for ranks 1, 3 of 4, since 0 s of at most 0.1\n" in capsys.readouterr().err
    with pytest.raises(RunError) as raised:  # one that comes too late hears of it
        agree(store, "here", {}, refuse_difference, LaunchEnv(1, 4), 0.1)
    assert raised.value.on_every_rank


def env_of(rank: int, port: int, host: str = "127.0.0.1") -> LaunchEnv:
    return LaunchEnv(rank, 2, rank, host, str(port))


def test_a_store_that_rank_0_hosts_is_found_by_the_others() -> None:
    port = free_port()
    host = connect_store(env_of(0, port), 10, hosting=True)
    host.set("key", "value")
    assert connect_store(env_of(1, port), 10, hosting=False).get("key") == b"value"
    restarted = LaunchEnv(1, 2, 1, "127.0.0.1", str(port), restart_count="1")
    assert not connect_store(restarted, 10, hosting=False).check(["key"])  # keys of its own


def test_a_store_that_is_not_there_is_one_sentence(capfd: pytest.CaptureFixture[str]) -> None:
    port = free_port()
    with pytest.raises(RunError) as raised:
        connect_store(env_of(1, port), 0.1, hosting=False)
    sentence = f"rank 1 on {HOST} could not reach rank 0 at 127.0.0.1:{port} within 0.1 s (timeout_s): "
    assert str(raised.value).startswith(sentence)
    assert "\n" not in str(raised.value)


def test_a_port_that_is_taken_is_one_sentence(capfd: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(RunError, match=f"^rank 0 on {HOST} cannot listen on port {port} within 1 s ") as raised:
            connect_store(env_of(0, port), 1, hosting=True)
    assert "\n" not in str(raised.value)


def test_a_host_that_has_no_address_is_one_sentence() -> None:
    with pytest.raises(RunError, match=f"^rank 1 on {HOST} cannot resolve MASTER_ADDR=no-such-host.invalid: "):
        connect_store(env_of(1, 29500, "no-such-host.invalid"), 1, hosting=False)


@pytest.mark.parametrize(("rank", "code"), [(0, 2), (1, 1)])
def test_a_rank_that_is_refused_alone_has_failed(rank: int, code: int, data_dir: Path, tmp_path: Path) -> None:
    """Its launcher, which is not told of wrong requests, ends the others then."""
    log = tmp_path / "output.txt"
    environment = rank_environment(rank, 2, 29500) | {"MASTER_PORT": "x"}
    arguments = ["train", "dataset=synthetic", f"data_dir={data_dir}"]
    result = wait_ranks([start_verb(arguments, log, become, **environment)], log)
    assert result.code == code
    assert result.output.startswith("mnist-dist: MASTER_ADDR='127.0.0.1' and MASTER_PORT='x' in the environment are no")
    assert result.output.count("\n") == 1


# --- one rank ---


def test_one_rank_is_a_world_whatever_launcher_started_it(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", *VARIABLES["srun"])
    for name in names:
        monkeypatch.setenv(name, "1" if "SIZE" in name or "NUM" in name else "0")
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR")
    monkeypatch.setenv("OMP_NUM_THREADS", "2,1")  # which Accelerate could not read
    before = torch.get_num_threads()
    try:
        world = init_distributed(Config(precision="fp32", threads=3), LaunchEnv(use_cpu=True))
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
    assert (world.rank, world.size, world.device, world.precision, world.watchdog) == (0, 1, CPU, "fp32", None)
    assert [m.host for m in world.members] == [HOST]
    assert world.notes == ["the launcher asked for torch.compile; this job runs without it"]
    assert not any(name in os.environ for name in (*names, "ACCELERATE_DYNAMO_BACKEND"))
