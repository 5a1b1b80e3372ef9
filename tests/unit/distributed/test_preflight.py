"""Which address a rank is reached at, and what a try to connect says."""

import socket

import pytest

from mnist_dist.distributed import preflight
from mnist_dist.distributed.preflight import (
    Interface,
    choose_peers,
    group_address,
    interfaces,
    is_loopback,
    listen,
    try_connect,
    try_peers,
)
from mnist_dist.errors import RequestError

LOOPBACK = Interface("lo", "127.0.0.1", 65536)
ETH = Interface("eth0", "10.0.0.5", 1500)


def test_the_interfaces_of_this_machine_end_with_loopback() -> None:
    assert is_loopback(interfaces()[-1].address)


@pytest.mark.parametrize(
    ("leads_to", "address"),
    [
        (["10.0.0.5"], "10.0.0.5"),
        (["127.0.1.1"], "127.0.1.1"),
        (["192.0.2.1", "10.0.0.5"], "10.0.0.5"),
        ([], "127.0.0.1"),
    ],
)
def test_the_address_is_that_of_the_hosts_own_name(
    leads_to: list[str], address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def look_up(*_: object, **__: object) -> list[tuple[object, ...]]:
        if not leads_to:
            raise socket.gaierror(-2, "Name or service not known")
        return [(None, None, None, "", (found, 0)) for found in leads_to]

    monkeypatch.setattr(preflight, "interfaces", lambda: [ETH, LOOPBACK])
    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    assert group_address("") == address


def test_the_interface_that_gloo_is_told_to_use_goes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight, "interfaces", lambda: [ETH, LOOPBACK])
    assert group_address("eth0") == "10.0.0.5"
    assert group_address("lo,eth0") == "127.0.0.1"
    with pytest.raises(RequestError, match=r"^GLOO_SOCKET_IFNAME=eth99 names no network interface .* it has eth0, lo$"):
        group_address("eth99")


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 7, 8, 100])
def test_every_rank_is_tried_and_all_can_be_reached_from_each(world_size: int) -> None:
    tried = {rank: choose_peers(rank, world_size) for rank in range(world_size)}
    assert all(rank not in peers and len(set(peers)) == len(peers) for rank, peers in tried.items())
    assert {peer for peers in tried.values() for peer in peers} == (set(range(world_size)) if world_size > 1 else set())
    if world_size <= 4:
        assert {frozenset((a, b)) for a, peers in tried.items() for b in peers} == {
            frozenset((a, b)) for a in range(world_size) for b in range(a)
        }


def test_a_try_to_connect_says_why_it_failed() -> None:
    with listen("127.0.0.1") as listener:
        port = listener.getsockname()[1]
        assert try_connect("127.0.0.1", port) == ""
        assert try_peers(0, [("127.0.0.1", 1), ("127.0.0.1", port)]) == []
    assert try_connect("127.0.0.1", port) == "the connection was refused"
    assert try_peers(0, [("127.0.0.1", 1), ("127.0.0.1", port)]) == [(1, "the connection was refused")]
