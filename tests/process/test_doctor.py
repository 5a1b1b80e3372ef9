"""`doctor` on real hosts: each fault that is planted in them is found and named, and healthy ones pass."""

import functools
import json
import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import make_data, wait_ranks
from tests.hosts import MASTER_PORT, ROUTER, Hosts

PLACES = ["n1", "n1", "n2", "n2"]
DEADLINE_S = 60  # in which it ends, whatever is broken; on a busy machine the test allows twice that
MANY_CORES = {"cores"}  # the tests' machine has fewer cores than there are ranks


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosts]:
    """Three machines."""
    addresses = {"n1": "10.0.0.11", "n2": "10.0.0.12", "n3": "10.0.0.13"}
    with Hosts(tmp_path_factory.mktemp("hosts"), addresses) as started:
        yield started


def examine(
    hosts: Hosts,
    folder: Path,
    data_dir: Path,
    places: list[str] = PLACES,
    changes: Mapping[int, Callable[[], None]] | None = None,
    **environment: str,
) -> dict[str, Any]:
    """Run `doctor --json` on some machines, and return what it says."""
    log = folder / "output.txt"
    log.unlink(missing_ok=True)
    arguments = ["doctor", "--json", "dataset=synthetic", f"data_dir={data_dir}", "batch_size=60"]
    ranks = hosts.start(places, arguments, log, changes, **environment)
    result = wait_ranks(ranks[:1], log, timeout_s=2 * DEADLINE_S)
    for rank in ranks[1:]:
        rank.join(10)
        rank.kill()
    lines = [line for line in result.output.splitlines() if line.startswith("{")]
    assert len(lines) == 1, result.output
    said: dict[str, Any] = json.loads(lines[0])
    assert result.codes == [0 if said["verdict"] == "PASS" else 1]
    return said


def found(said: dict[str, Any]) -> dict[str, str]:
    """Name and texts of what was found, without what is true of the tests' machine itself."""
    texts: dict[str, str] = {}
    for finding in said["findings"]:
        if finding["check"] not in {*MANY_CORES, "kernel log"}:
            texts[finding["name"]] = texts.get(finding["name"], "") + finding["text"] + "\n"
    return texts


def test_healthy_hosts_pass_each_time(hosts: Hosts, data_dir: Path, tmp_path: Path) -> None:
    for _ in range(10):
        said = examine(hosts, tmp_path, data_dir)
        assert said["verdict"] == "PASS", said
        assert [f["name"] for f in said["findings"] if f["status"] == "FAIL"] == []
        assert said["not_needed"] == {"gpus": "no GPU"}
        assert said["seconds"] < DEADLINE_S
        assert set(found(said)) <= {"speed.slower"}  # beside other tests
        assert "Mbit/s" in said["figures"][0]


@contextmanager
def run(hosts: Hosts, name: str, begin: str, end: str) -> Iterator[None]:
    """For a while, have done something on a machine."""
    hosts.run(name, "sh", "-ec", begin)
    try:
        yield
    finally:
        hosts.run(name, "sh", "-ec", end)


def replace_file(hosts: Hosts, name: str, path: str, folder: Path, text: str) -> AbstractContextManager[None]:
    """For a while, let a machine see other text in a file."""
    by = folder / Path(path).name
    by.write_text(text)
    return hosts.replaced(name, path, by)


NAMES = "127.0.0.1 localhost\n10.0.0.11 n1\n10.0.0.12 n2\n"
SLOW_CARD = "tc qdisc {} dev {} root tbf rate 400mbit burst 64kbit latency 400ms"


def plant(fault: str, hosts: Hosts, folder: Path, data_dir: Path) -> AbstractContextManager[Any]:
    """Break the machines in some way, for a while."""
    stack = ExitStack()
    if fault in ("silent firewall", "rejecting firewall"):
        stack.enter_context(hosts.firewall(MASTER_PORT, kind="blackhole" if fault.startswith("silent") else "prohibit"))
    elif fault == "interface that does not route":
        for number, name in ((1, "n1"), (2, "n2")):
            begin = "ip link add lost type veth peer name end; ip link set end up; ip link set lost up; "
            begin += f"ip address add 192.168.7.{number}/32 dev lost"
            stack.enter_context(run(hosts, name, begin, "ip link del lost"))
    elif fault == "name that leads to loopback":
        text = NAMES.replace("10.0.0.12 n2", "127.0.1.1 n2")
        stack.enter_context(replace_file(hosts, "n2", "/etc/hosts", folder, text))
    elif fault == "name server that does not answer":
        stack.enter_context(hosts.firewall(protocol="udp"))
        server = "nameserver 10.0.0.13\noptions timeout:2 attempts:1\n"
        stack.enter_context(replace_file(hosts, "n2", "/etc/resolv.conf", folder, server))
        stack.enter_context(replace_file(hosts, "n2", "/etc/hosts", folder, NAMES.replace("10.0.0.11 n1\n", "")))
    elif fault == "name that leads nowhere":
        stack.enter_context(replace_file(hosts, "n2", "/etc/resolv.conf", folder, ""))
        stack.enter_context(replace_file(hosts, "n2", "/etc/hosts", folder, "127.0.0.1 localhost\n"))
    elif fault == "mtu black hole":
        for name in ("n1", "n2"):  # whose cards would else hand on several packets as one, of any size
            sizes = ((9000, 1), (1500, 65535))
            stack.enter_context(
                run(hosts, name, *(f"ip link set eth0 mtu {mtu} gso_max_segs {number}" for mtu, number in sizes))
            )
        stack.enter_context(run(hosts, ROUTER, *(f"ip link set n1 mtu {mtu}" for mtu in (9000, 1500))))
        stack.enter_context(hosts.firewall(protocol="icmp"))  # nobody hears that a packet was too large
    elif fault == "mtu black hole one way":
        for name, card in (("n1", "eth0"), ("n2", "eth0"), (ROUTER, "n1")):
            stack.enter_context(run(hosts, name, *(f"ip link set {card} mtu {mtu}" for mtu in (9000, 1500))))
        route = "ip route replace default via 10.0.0.1"
        stack.enter_context(run(hosts, "n2", f"{route} mtu lock 1500 advmss 8960", route))  # it sends small packets
        stack.enter_context(hosts.firewall(protocol="icmp"))
    elif fault == "small shared memory":
        begin = "mount -t tmpfs -o size=64m tmpfs /dev/shm"
        stack.enter_context(run(hosts, "n2", begin, "umount /dev/shm"))
    elif fault == "run directory that is not shared":
        (folder / "runs").mkdir()
        stack.enter_context(run(hosts, "n2", f"mount -t tmpfs tmpfs {folder}/runs", f"umount {folder}/runs"))
    elif fault == "no dataset on one host":
        stack.enter_context(run(hosts, "n2", f"mount -t tmpfs tmpfs {data_dir}", f"umount {data_dir}"))
    elif fault == "another dataset on one host":
        stack.enter_context(hosts.replaced("n2", str(data_dir), make_data(folder / "data", seed=7)))
    elif fault == "slow host":
        for name, card in (("n3", "eth0"), (ROUTER, "n3")):
            stack.enter_context(run(hosts, name, *(SLOW_CARD.format(verb, card) for verb in ("add", "del"))))
    elif fault == "slow link":
        for name, peer in (("n1", "10.0.0.12"), ("n2", "10.0.0.11")):
            begin = (
                "tc qdisc add dev eth0 root handle 1: htb default 1; "
                "tc class add dev eth0 parent 1: classid 1:1 htb rate 100gbit; "
                "tc class add dev eth0 parent 1: classid 1:2 htb rate 300mbit; "
                f"tc filter add dev eth0 parent 1: protocol ip u32 match ip dst {peer}/32 flowid 1:2"
            )
            stack.enter_context(run(hosts, name, begin, "tc qdisc del dev eth0 root"))
    else:
        stack.enter_context(nullcontext())
    return stack


@pytest.mark.parametrize(
    ("fault", "places", "environment", "name", "words"),
    [
        ("silent firewall", PLACES, {}, "reachability.blocked", ["n1", "n2", "no answer within 2 s"]),
        ("rejecting firewall", PLACES, {}, "reachability.blocked", ["n1", "n2"]),
        (
            "interface that does not route",
            PLACES,
            {"GLOO_SOCKET_IFNAME": "lost"},
            "reachability.blocked",
            ["rank 0 on n1", "rank 2 on n2", "192.168.7.2"],
        ),
        ("name that leads to loopback", PLACES, {}, "names.loopback", ["n2: its own name leads to 127.0.1.1"]),
        ("name that leads nowhere", PLACES, {}, "names.unknown", ["n2: its own name leads nowhere"]),
        ("name server that does not answer", PLACES, {}, "names.slow", ["n2: looking up 10.0.0.11 took "]),
        ("mtu black hole", PLACES, {}, "mtu.stalls", ["from n2 to n1", "9000 and 9000"]),
        ("mtu black hole one way", PLACES, {}, "mtu.stalls", ["from n1 to n2", "9000 and 9000"]),
        ("small shared memory", PLACES, {}, "shm.tight", ["n2: /dev/shm has 64 MiB"]),
        ("run directory that is not shared", PLACES, {}, "run_dir.not_shared", ["n2 does not see what n1 writes"]),
        ("no dataset on one host", PLACES, {}, "data.missing", ["n2 does not have synthetic"]),
        ("another dataset on one host", PLACES, {}, "data.differs", ["n2 has another synthetic than n1"]),
        ("slow host", ["n1", "n2", "n3"], {}, "links.slow_host", ["n3 sends and receives "]),
        ("slow link", ["n1", "n2", "n3"], {}, "links.slow_link", ["between n1 and n2 "]),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_fault_of_the_hosts_is_named(
    fault: str,
    places: list[str],
    environment: dict[str, str],
    name: str,
    words: list[str],
    hosts: Hosts,
    data_dir: Path,
    tmp_path: Path,
) -> None:
    with plant(fault, hosts, tmp_path, data_dir):
        said = examine(hosts, tmp_path, data_dir, places, **environment)
    assert name in found(said), said["findings"]
    assert all(word in found(said)[name] for word in words), found(said)[name]
    if fault == "interface that does not route":
        cure = next(f["cure"] for f in said["findings"] if f["name"] == name)
        assert "GLOO_SOCKET_IFNAME=eth0" in cure
    # Nothing else is accused, but for what could not be tried.
    others = {f["name"] for f in said["findings"] if f["status"] == "FAIL"} - {name}
    assert others == set(), said["findings"]
    assert said["seconds"] < DEADLINE_S


def _change_code() -> None:
    from mnist_dist.distributed import rendezvous

    rendezvous.code_hash = lambda: "another"


def _set_clock(seconds: float) -> None:
    from mnist_dist.checks import network

    network.now_s = lambda: time.time() + seconds


def _bind_to_one_core() -> None:
    os.sched_setaffinity(0, {0})


def _stop() -> None:
    from mnist_dist.checks import network

    network.find_ways = lambda *_: os.kill(os.getpid(), signal.SIGSTOP)  # type: ignore[assignment]


def _be_slow() -> None:
    import torch

    multiply = torch.matmul
    torch.matmul = lambda a, b: [multiply(a, b) for _ in range(10)].pop()  # type: ignore[assignment]


def _compute_wrongly() -> None:
    import torch

    from mnist_dist.checks import compute

    def multiply(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        product = torch.matmul(a, b)
        product[3, 5] += 1
        return product

    compute.multiply = multiply


def _hang_in_the_device() -> None:
    from mnist_dist.checks import compute
    from mnist_dist.commands import doctor

    doctor.DEVICE_S = 8.0
    compute.find_wrong_product = lambda _: time.sleep(1000)  # type: ignore[assignment,func-returns-value]


def _add_twice() -> None:
    import torch
    import torch.distributed as dist

    from mnist_dist.checks import compute

    def all_reduce(tensor: torch.Tensor) -> None:
        dist.all_reduce(tensor.mul_(2))

    compute.all_reduce = all_reduce


@pytest.mark.parametrize(
    ("change", "ranks", "name", "words"),
    [
        (_change_code, [3], "request.differs", ["rank 3 on n2 has code=another"]),
        (functools.partial(_set_clock, 30.0), [2, 3], "clock.far", ["n2's clock is +30.0 s off that of n1"]),
        (functools.partial(_set_clock, -3.0), [2, 3], "clock.off", ["n2's clock is -3.0 s off that of n1"]),
        (_bind_to_one_core, [2, 3], "cores.shared", ["n2: 2 ranks share 1 of the host's"]),
        (_stop, [1], "ranks.silent", ["rank 1 on n1 came, and did not answer"]),
        (_be_slow, [2], "speed.slow", ["rank 2 on n2, cpu: "]),
        (_compute_wrongly, [1], "compute.wrong", ["rank 1 on n1, cpu", "fp32", "row 3, column 5"]),
        (_hang_in_the_device, [3], "compute.hangs", ["rank 3 on n2, cpu"]),
        (_add_twice, [1], "exchange.wrong", ["twice the part of rank 1 on n1"]),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_fault_of_a_rank_is_named(
    change: Callable[[], None],
    ranks: list[int],
    name: str,
    words: list[str],
    hosts: Hosts,
    data_dir: Path,
    tmp_path: Path,
) -> None:
    said = examine(hosts, tmp_path, data_dir, changes=dict.fromkeys(ranks, change))
    texts = [f["text"] for f in said["findings"] if f["name"] == name]
    assert texts, said["findings"]
    assert all(word in texts[0] for word in words), texts
    others = {f["name"] for f in said["findings"] if f["status"] == "FAIL"} - {name}
    assert others <= {"exchange.differs"} if name == "exchange.wrong" else others == set(), said["findings"]
    assert said["seconds"] < DEADLINE_S


def _wait_less() -> None:
    from mnist_dist.commands import doctor

    doctor.JOIN_S = 8.0


def test_ranks_that_never_come_are_named(hosts: Hosts, data_dir: Path, tmp_path: Path) -> None:
    log = tmp_path / "output.txt"
    arguments = ["doctor", "dataset=synthetic", f"data_dir={data_dir}", "batch_size=60"]
    variables = {"WORLD_SIZE": "3", "OMP_NUM_THREADS": "1"}
    changes = dict.fromkeys(range(2), _wait_less)
    result = wait_ranks(hosts.start(["n1", "n2"], arguments, log, changes, **variables), log, timeout_s=2 * DEADLINE_S)
    assert result.code == 1
    assert "FAIL  ranks: of 3 ranks these did not come within 8 s: 2\n" in result.output
    assert "verdict: FAIL: ranks" in result.output
    assert "Traceback" not in result.output
