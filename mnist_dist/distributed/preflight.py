"""What is tried before the ranks form a group: whether they reach each other.

gloo and NCCL connect the ranks with each other on any free port. Where a firewall, a route or a name prevents that,
they wait for minutes and name nobody. So each rank listens where gloo will, and some others connect, within seconds.
"""

import contextlib
import errno
import os
import socket
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import psutil

from mnist_dist.errors import RequestError

CONNECT_S = 2.0  # for one try to connect: one lost packet is sent again after a second


class Interface(NamedTuple):
    """One address of a network interface that is up."""

    name: str
    address: str
    mtu: int  # bytes


def interfaces() -> list[Interface]:
    """This machine's, loopback last. IPv4 first; IPv6 without the addresses that lead nowhere without a scope."""
    stats, found = psutil.net_if_stats(), []
    for name, addresses in psutil.net_if_addrs().items():
        if name not in stats or not stats[name].isup:
            continue
        for family in (socket.AF_INET, socket.AF_INET6):
            found += [
                Interface(name, a.address, stats[name].mtu)
                for a in addresses
                if a.family == family and not a.address.startswith("fe80")
            ]
    return sorted(found, key=lambda i: (is_loopback(i.address), ":" in i.address, i.name))


def time_lookup(host: str) -> float:
    """Seconds that looking a host up takes, its address and the name of that, whether or not they are found."""
    began_s = time.monotonic()
    with contextlib.suppress(OSError):  # a name that leads nowhere is said where it is used
        socket.getnameinfo(socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0][4], 0)
    return time.monotonic() - began_s


def is_loopback(address: str) -> bool:
    """Whether an address leads to the machine itself."""
    return address.startswith("127.") or address == "::1"


def group_address(wanted: str | None = None) -> str:
    """The address at which gloo will listen on this machine: that of GLOO_SOCKET_IFNAME, else of the host's own name.

    Loopback where the name leads nowhere, as gloo does it. Raises RequestError.
    """
    wanted = os.environ.get("GLOO_SOCKET_IFNAME", "") if wanted is None else wanted
    up = interfaces()
    if wanted:
        first = wanted.split(",")[0]
        for interface in up:
            if interface.name == first:
                return interface.address
        names = ", ".join(dict.fromkeys(i.name for i in up)) or "none"
        raise RequestError(
            f"GLOO_SOCKET_IFNAME={wanted} names no network interface of {socket.gethostname()} that is up and has an "
            f"address; it has {names}"
        )
    here = {i.address for i in up}
    try:
        for *_, address in socket.getaddrinfo(socket.gethostname(), 0, type=socket.SOCK_STREAM):
            if address[0] in here or is_loopback(str(address[0])):
                return str(address[0])
    except OSError:  # the name leads nowhere
        pass
    return "127.0.0.1"


def listen(address: str) -> socket.socket:
    """A socket that listens at a free port there; the kernel answers, nobody needs to accept. Raises OSError."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    return socket.create_server((address, 0), family=family, backlog=128)


def choose_peers(rank: int, world_size: int) -> list[int]:
    """Whom a rank tries: those 1, 2, 4 ... ranks further, so that few tries find a host that is cut off."""
    distances = [1 << k for k in range((world_size - 1).bit_length())]
    return [(rank + distance) % world_size for distance in distances]


def try_connect(address: str, port: int) -> str:
    """Try to connect, and return why that failed, in words, or the empty string."""
    try:
        socket.create_connection((address, port), timeout=CONNECT_S).close()
        return ""
    except TimeoutError:
        return f"no answer within {CONNECT_S:g} s"
    except OSError as error:
        if error.errno == errno.ECONNREFUSED:
            return "the connection was refused"
        return (error.strerror or str(error)).lower()


def try_peers(rank: int, addresses: Sequence[tuple[str, int]]) -> list[tuple[int, str]]:
    """Try to connect to some ranks' addresses, all at once; returns those that failed, and why."""
    peers = choose_peers(rank, len(addresses))
    with ThreadPoolExecutor(max(len(peers), 1)) as threads:
        failures = threads.map(lambda peer: try_connect(*addresses[peer]), peers)
        return [(peer, why) for peer, why in zip(peers, failures, strict=True) if why]
