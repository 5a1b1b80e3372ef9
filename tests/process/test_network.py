"""Ranks on machines whose network is broken: named within seconds, before the ranks wait for each other."""

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.conftest import wait_ranks
from tests.hosts import MASTER_PORT, Hosts

REQUEST = ["train", "dataset=synthetic", "max_steps=3", "threads=1", "precision=fp32", "batch_size=60"]


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosts]:
    """Two machines."""
    with Hosts(tmp_path_factory.mktemp("hosts"), {"n1": "10.0.0.11", "n2": "10.0.0.12"}) as started:
        yield started


def test_ranks_of_two_machines_train(hosts: Hosts, data_dir: Path, tmp_path: Path) -> None:
    log = tmp_path / "output.txt"
    result = wait_ranks(hosts.start(["n1", "n2"], [*REQUEST, f"data_dir={data_dir}", "run_dir=run"], log), log)
    assert result.code == 0
    assert (tmp_path / "run" / "DONE").exists()


@pytest.mark.parametrize(
    ("kind", "why"),
    [("blackhole", "no answer within 2 s"), ("prohibit", "no route to host|no answer within 2 s")],
)
def test_a_firewall_that_lets_only_the_master_port_through_is_named(
    kind: str, why: str, hosts: Hosts, data_dir: Path, tmp_path: Path
) -> None:
    log = tmp_path / "output.txt"
    with hosts.firewall(MASTER_PORT, kind=kind):
        result = wait_ranks(hosts.start(["n1", "n2"], [*REQUEST, f"data_dir={data_dir}"], log), log, timeout_s=60)
    assert result.code == 1
    sentence = f"mnist-dist: rank 0 on n1 cannot connect to rank 1 on n2 at {hosts.addresses['n2']}:"
    assert sentence in result.output
    assert any(f"({reason})" in result.output for reason in why.split("|"))
    assert result.output.count("mnist-dist:") == 1
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("names", "environment", "code", "sentence"),
    [
        (
            "127.0.0.1 localhost\n127.0.1.1 n2\n10.0.0.11 n1\n",
            {},
            1,
            "rank 1 on n2: the host's own name leads to 127.0.1.1, where no other host can reach it; ",
        ),
        (
            "",
            {"GLOO_SOCKET_IFNAME": "eth99"},
            2,
            "GLOO_SOCKET_IFNAME=eth99 names no network interface of n1 that is up",
        ),
        ("127.0.0.1 localhost\n127.0.1.1 n2\n10.0.0.11 n1\n", {"GLOO_SOCKET_IFNAME": "eth0"}, 0, ""),
    ],
    ids=["loopback", "no such interface", "loopback, but an interface is given"],
)
def test_a_name_that_leads_nowhere_is_named(
    names: str, environment: dict[str, str], code: int, sentence: str, hosts: Hosts, data_dir: Path, tmp_path: Path
) -> None:
    log = tmp_path / "output.txt"
    (tmp_path / "names").write_text(names)
    with ExitStack() as stack:
        if names:
            stack.enter_context(hosts.replaced("n2", "/etc/hosts", tmp_path / "names"))
        started = hosts.start(["n1", "n2"], [*REQUEST, f"data_dir={data_dir}"], log, **environment)
        result = wait_ranks(started, log, timeout_s=60)
    # A rank that is refused alone has failed: its launcher must hear of it.
    assert result.code == code
    assert sentence in result.output


def test_a_name_server_that_never_answers_is_said_and_endured(hosts: Hosts, data_dir: Path, tmp_path: Path) -> None:
    log = tmp_path / "output.txt"
    (tmp_path / "resolv.conf").write_text("nameserver 10.0.0.11\noptions timeout:2 attempts:1\n")
    (tmp_path / "names").write_text("127.0.0.1 localhost\n10.0.0.12 n2\n")  # n1's address has no name here
    with (
        hosts.firewall(protocol="udp"),
        hosts.replaced("n2", "/etc/resolv.conf", tmp_path / "resolv.conf"),
        hosts.replaced("n2", "/etc/hosts", tmp_path / "names"),
    ):
        request = [*REQUEST, f"data_dir={data_dir}", "timeout_s=10"]
        result = wait_ranks(hosts.start(["n1", "n2"], request, log), log, timeout_s=120)
    assert result.code == 0
    assert "looking up MASTER_ADDR=10.0.0.11 took " in result.output
    assert "s on n2; its name server is slow or does not answer" in result.output
