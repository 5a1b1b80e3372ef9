"""What the hosts' network does: clocks, large packets, latency and bandwidth, over plain TCP.

Each rank answers on one port; nothing here needs the group of collectives, which may be what does not come about.
"""

import contextlib
import socket
import struct
import threading
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

from mnist_dist.distributed.preflight import CONNECT_S, is_loopback, try_connect

SMALL_BYTES, LARGE_BYTES = 1 << 10, 256 << 10  # one packet; many
LINK_BYTES = 8 << 20
SLOW_LINK_BYTES = 1 << 20  # tried first: a link that takes long for this is not asked for more
NUM_CLOCK = 20  # readings, of which the one with the shortest way counts
REPLY_S = 5.0

now_s = time.time


class Clock(NamedTuple):
    """Another host's clock against this one's."""

    offset_s: float
    error_s: float  # half the time of the way there and back


class Responder:
    """Answers the other ranks, in a thread: what time it is, and that it got some bytes."""

    def __init__(self) -> None:
        dual = socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if dual else socket.AF_INET
        self.listener = socket.create_server(("", 0), family=family, dualstack_ipv6=dual, backlog=128)
        self.port = int(self.listener.getsockname()[1])
        threading.Thread(target=self._accept, name="responder", daemon=True).start()

    def close(self) -> None:
        """Answer no more."""
        self.listener.close()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self.listener.accept()
            except OSError:  # closed
                return
            threading.Thread(target=self._answer, args=(connection,), daemon=True).start()

    def _answer(self, connection: socket.socket) -> None:
        buffer = bytearray(1 << 20)
        with connection, contextlib.suppress(OSError, struct.error):
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            while head := connection.recv(8, socket.MSG_WAITALL):
                size, answer_size = struct.unpack("!II", head)
                while size:
                    got = connection.recv_into(buffer, min(size, len(buffer)))
                    if not got:
                        return
                    size -= got
                connection.sendall(struct.pack("!d", now_s()) + bytes(answer_size))


def ask(connection: socket.socket, size: int, answer_size: int = 0) -> float:
    """Send so many bytes, and wait for the other host's time, s, and so many bytes behind it. Raises OSError."""
    connection.sendall(struct.pack("!II", size, answer_size))
    if size:
        connection.sendall(bytes(size))
    answer = bytearray()
    while len(answer) < 8 + answer_size:
        part = connection.recv(8 + answer_size - len(answer))
        if not part:
            raise ConnectionError("the other rank is gone")
        answer += part
    return float(struct.unpack("!d", answer[:8])[0])


def connect(address: str, port: int) -> socket.socket:
    """A connection whose every wait has an end. Raises OSError."""
    connection = socket.create_connection((address, port), timeout=CONNECT_S)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return connection


def find_ways(peer: dict[str, Any], address: str) -> tuple[str, list[str]]:
    """Try to connect to a rank at an address. Returns why that failed, or "", and which of its interfaces do answer."""
    why = try_connect(address, peer["port"])
    if not why:
        return "", []
    others = [(name, other) for name, other, _ in peer["interfaces"] if other != address]
    return why, [name for name, other in others if not is_loopback(other) and not try_connect(other, peer["port"])]


def read_clock(connection: socket.socket) -> Clock:
    """The other host's clock, as NTP does it (RFC 5905): the reading with the shortest way counts. Raises OSError."""
    readings = []
    for _ in range(NUM_CLOCK):
        sent_s = now_s()
        theirs_s = ask(connection, 0)
        came_s = now_s()
        readings.append((came_s - sent_s, theirs_s - (sent_s + came_s) / 2))
    delay_s, offset_s = min(readings)
    return Clock(offset_s, delay_s / 2)


def find_stall(connection: socket.socket) -> str:
    """Where small messages pass and a large one does not: "sending", "receiving", or the empty string.

    Each way is tried, since a packet that is too large for a link is dropped before that link alone. Raises OSError
    where the small one does not pass either.
    """
    connection.settimeout(REPLY_S)
    ask(connection, SMALL_BYTES)
    connection.settimeout(CONNECT_S)
    for name, sizes in (("sending", (LARGE_BYTES, 0)), ("receiving", (0, LARGE_BYTES))):
        try:
            ask(connection, *sizes)
        except TimeoutError:
            return name
    return ""


def measure_link(connection: socket.socket) -> tuple[float, float]:
    """Latency there and back, s, and bandwidth, bit/s, of one connection: the best of a few. Raises OSError."""
    connection.settimeout(REPLY_S)
    latency_s = min(time_ask(connection, SMALL_BYTES) for _ in range(10))
    took_s = time_ask(connection, SLOW_LINK_BYTES)
    if took_s > 0.1:
        return latency_s, 8 * SLOW_LINK_BYTES / took_s
    return latency_s, 8 * LINK_BYTES / min(time_ask(connection, LINK_BYTES) for _ in range(4))


def time_ask(connection: socket.socket, size: int) -> float:
    """Seconds until so many bytes were sent and answered."""
    began_s = time.perf_counter()
    ask(connection, size)
    return time.perf_counter() - began_s


def pair_rounds(count: int) -> list[list[tuple[int, int]]]:
    """Rounds of disjoint pairs of 0..count-1: every pair up to 8 hosts (circle method), else partners at 1, 2, 4 ...

    A host that measures alone with one other has the link for itself.
    """
    if count > 8:
        rounds = []
        for k in range((count - 1).bit_length()):
            rounds.append([(i, i ^ (1 << k)) for i in range(count) if i < i ^ (1 << k) < count])
        return rounds
    seats = [*range(count)] + ([-1] if count % 2 else [])
    rounds = []
    for _ in range(len(seats) - 1):
        half = len(seats) // 2
        pairs = zip(seats[:half], reversed(seats[half:]), strict=True)
        rounds.append([(min(a, b), max(a, b)) for a, b in pairs if -1 not in (a, b)])
        seats = [seats[0], seats[-1], *seats[1:-1]]
    return rounds


def leaders(hosts: Sequence[str | None]) -> list[int]:
    """The first rank of each host, of those ranks that came."""
    first: dict[str, int] = {}
    for rank, host in enumerate(hosts):
        if host is not None:
            first.setdefault(host, rank)
    return list(first.values())
