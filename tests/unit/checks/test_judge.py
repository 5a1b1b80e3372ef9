"""What recorded figures mean: GPUs, links, counts. Nothing here was measured by the test itself."""

from typing import Any

import pytest

from mnist_dist.checks import judge
from mnist_dist.checks.compute import read_transport
from mnist_dist.checks.facts import KERNEL_ERRORS, parse_gpus, read_throttled
from mnist_dist.checks.findings import Status, worst
from mnist_dist.checks.network import pair_rounds

# As `nvidia-smi --query-gpu=... --format=csv,noheader,nounits` prints it, put together from its documentation.
HEALTHY = "0, NVIDIA H100 80GB HBM3, 0x0000000000000000, 0, 16, 16, 81559\n"
IDLE = "0, NVIDIA H100 80GB HBM3, 0x0000000000000001, 0, 16, 16, 81559\n"
POWER_CAP = "0, NVIDIA H100 80GB HBM3, 0x0000000000000004, 0, 16, 16, 81559\n"
HOT = "1, NVIDIA H100 80GB HBM3, 0x0000000000000040, 0, 16, 16, 81559\n"
WARM = "1, NVIDIA H100 80GB HBM3, 0x0000000000000020, 0, 16, 16, 81559\n"
BROKEN_MEMORY = "2, NVIDIA A100-SXM4-40GB, 0x0000000000000000, 3, 16, 16, 40960\n"
NARROW = "3, NVIDIA A100-PCIE-40GB, 0x0000000000000000, 0, 4, 16, 40960\n"
NO_ECC = "0, NVIDIA GeForce RTX 4090, [N/A], [N/A], 16, 16, 24564\n"


def rank(number: int, host: str, **changes: Any) -> dict[str, Any]:
    """The facts of a healthy rank, with changes."""
    facts = {
        "rank": number,
        "local_rank": 0,
        "host": host,
        "gpus": [],
        "gpu_problem": "",
        "infiniband": False,
        "kernel_errors": [],
        "cores": [0, 1, 2, 3],
        "all_cores": 4,
        "throttled": 0.0,
        "stolen_percent": 0.0,
        "shm_free": 8 << 30,
        "open_files": 65536,
        "locked_kib": 64,
    }
    return facts | changes


@pytest.mark.parametrize(
    ("row", "name", "words"),
    [
        (HEALTHY, "", ""),
        (IDLE, "", ""),
        (POWER_CAP, "", ""),  # as set by the administrator: no alarm
        (HOT, "gpus.health", "GPU 1: hardware thermal slowdown"),
        (WARM, "gpus.power", "GPU 1: software thermal slowdown"),
        (BROKEN_MEMORY, "gpus.health", "GPU 2: 3 uncorrected memory errors"),
        (NARROW, "gpus.power", "GPU 3: its PCIe link has 4 lanes of 16"),
        (NO_ECC, "", ""),
    ],
)
def test_a_gpu_that_is_ill_is_named(row: str, name: str, words: str) -> None:
    findings = judge.judge_gpus([rank(0, "a"), rank(1, "b", gpus=parse_gpus(HEALTHY + row))])
    assert [f.name for f in findings] == ([name] if name else [])
    assert all(f.text == f"b, {words}" for f in findings)


def test_gpus_that_were_not_read_do_not_pass() -> None:
    findings = judge.judge_gpus([rank(0, "a", gpu_problem="nvidia-smi: timed out")])
    assert worst(findings) == Status.SKIP


@pytest.mark.parametrize(
    ("log", "network"),
    [
        ("n1:12:13 [0] NCCL INFO Using network Socket\n", "Socket"),
        ("n1:12:13 [0] NCCL INFO NET/IB : Using [0]mlx5_0:1/IB\nn1:12:13 [0] NCCL INFO Using network IB\n", "IB"),
        ("n1:12:13 [0] NCCL INFO NET/Socket : Using [0]eth0:10.0.0.1<0>\n", "Socket"),
        ("", ""),
    ],
)
def test_ncclls_network_is_read_from_its_log(log: str, network: str) -> None:
    assert read_transport(log) == network


def test_tcp_beside_infiniband_is_named_once_a_host() -> None:
    facts = [rank(r, "a", infiniband=True) for r in range(2)]
    found = judge.judge_transport(facts, [{"transport": "Socket"}, {"transport": "Socket"}])
    assert [f.name for f in found] == ["gpus.transport"]
    assert judge.judge_transport(facts, [{"transport": "IB"}, {"transport": "IB"}]) == []
    assert judge.judge_transport([rank(0, "a")], [{"transport": "Socket"}]) == []


@pytest.mark.parametrize(
    ("line", "is_error"),
    [
        ("[12.3] NVRM: Xid (PCI:0000:3b:00): 79, pid=1234, GPU has fallen off the bus.", True),
        ("[12.3] mce: [Hardware Error]: Machine check events logged", True),
        ("[12.3] EDAC MC0: 1 UE memory read error", True),
        ("[12.3] mce: CPU supports 32 MCE banks", False),
        ("[12.3] EXT4-fs error (device sda1)", False),
    ],
)
def test_errors_of_hardware_are_told_from_other_lines(line: str, is_error: bool) -> None:
    assert bool(KERNEL_ERRORS.search(line)) == is_error


def test_a_kernel_log_that_may_not_be_read_does_not_pass() -> None:
    facts = [rank(0, "a", kernel_errors=None), rank(1, "b", kernel_errors=["[1] NVRM: Xid 79"])]
    assert [f.name for f in judge.judge_kernel_log(facts)] == ["kernel.errors", "kernel.unread"]


SPEEDS = {("a", "b"): 10e9, ("a", "c"): 10e9, ("b", "c"): 10e9, ("a", "d"): 9e9, ("b", "d"): 11e9, ("c", "d"): 10e9}


@pytest.mark.parametrize(
    ("slow", "names"),
    [
        ({}, []),
        ({("a", "d"): 4e8, ("b", "d"): 4e8, ("c", "d"): 4e8}, ["links.slow_host"]),
        ({("a", "d"): 7e9, ("b", "d"): 7e9, ("c", "d"): 7e9}, ["links.slower_host"]),
        ({("b", "c"): 4e8}, ["links.slow_link"]),
        ({pair: 1e8 for pair in SPEEDS}, []),  # all alike: a slow network, and no fault of one host
    ],
    ids=["healthy", "slow card", "slower card", "slow link", "slow network"],
)
def test_a_slow_host_is_told_from_a_slow_link(slow: dict[tuple[str, str], float], names: list[str]) -> None:
    findings = judge.judge_links(["a", "b", "c", "d"], SPEEDS | slow)
    assert [f.name for f in findings] == names


@pytest.mark.parametrize("count", [2, 3, 4, 5, 8])
def test_each_pair_of_few_hosts_meets_once_and_no_host_twice_in_a_round(count: int) -> None:
    rounds = pair_rounds(count)
    assert len(rounds) == count - 1 + count % 2
    assert sorted(pair for pairs in rounds for pair in pairs) == [
        (a, b) for a in range(count) for b in range(a + 1, count)
    ]
    assert all(len({host for pair in pairs for host in pair}) == 2 * len(pairs) for pairs in rounds)


def test_many_hosts_take_few_rounds() -> None:
    rounds = pair_rounds(100)
    assert len(rounds) == 7
    assert {host for pairs in rounds for pair in pairs for host in pair} == set(range(100))
    assert all(len({host for pair in pairs for host in pair}) == 2 * len(pairs) for pairs in rounds)


@pytest.mark.parametrize(
    ("slots", "text"),
    [
        ([1, 0, 3], "a sum over the ranks has nothing of rank 1 on b"),
        ([1, 4, 3], "a sum over the ranks has twice the part of rank 1 on b"),
        ([1, 2.5, 3], "a sum over the ranks has a changed part of rank 1 on b"),
    ],
)
def test_the_rank_whose_part_is_missing_is_named(slots: list[float], text: str) -> None:
    reports = {"content": 7, "slots": slots, "hash": "x", "done": True}
    facts = [rank(0, "a"), rank(1, "b"), rank(2, "c")]
    assert [f.text for f in judge.judge_exchange(facts, [reports] * 3, 15)] == [text]


def test_the_minority_is_named_not_the_first() -> None:
    same = {"kernel": "6.1", "NCCL": "2.30"}
    facts = [
        rank(r, h, same=same | {"kernel": k}, settings={})
        for r, (h, k) in enumerate(zip("abc", ("5.4", "6.1", "6.1"), strict=True))
    ]
    assert [f.text for f in judge.judge_sameness(facts)] == ["a has kernel=5.4, most have 6.1"]
    facts[1]["settings"] = {"NCCL_IB_DISABLE": "1"}
    assert [f.text for f in judge.judge_sameness(facts)][1] == (
        "b has NCCL_IB_DISABLE=1 in the environment, most have nothing"
    )


def test_a_dataset_that_is_not_read_in_time_does_not_pass() -> None:
    facts = [rank(0, "a"), rank(1, "b")]
    findings = judge.judge_data(facts, [{"fingerprint": "1" * 64, "done": True}, {}], "mnist", "/data", 12)
    assert [f.text for f in findings] == ["rank 1 on b: mnist in data_dir=/data was not read within 12 s"]
    assert worst(findings) == Status.FAIL
    assert worst(judge.judge_data(facts, [{}, None], "mnist", "/data", 12)) == Status.FAIL


def test_the_limits_of_a_host_are_named() -> None:
    ill = rank(0, "a", gpus=[{"name": "x"}], shm_free=32 << 20, open_files=256, infiniband=True)
    assert [f.name for f in judge.judge_limits([ill])] == ["shm.small", "limits.files", "limits.memlock"]
    assert judge.judge_limits([rank(0, "a", locked_kib=-1, infiniband=True)]) == []


def test_ranks_without_cores_of_their_own_are_named() -> None:
    assert [f.name for f in judge.judge_cores([rank(r, "a", cores=[0]) for r in range(2)])] == ["cores.shared"]
    assert [f.name for f in judge.judge_cores([rank(r, "a") for r in range(5)])] == ["cores.few"]
    ill = rank(0, "a", throttled=50.0, stolen_percent=12.0)
    assert [f.name for f in judge.judge_cores([ill])] == ["cores.throttled", "cores.stolen"]


def test_a_container_without_a_limit_is_not_throttled(tmp_path: Any) -> None:
    assert read_throttled(tmp_path) == 0
    (tmp_path / "cpu.stat").write_text("usage_usec 5\nnr_periods 200\nnr_throttled 50\n")
    assert read_throttled(tmp_path) == 25
