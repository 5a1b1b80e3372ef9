"""Machines that are namespaces of this one, joined by a router: network, host name, mounts and processes of their own.

A machine's first process is its power switch: when it is killed, the kernel kills all that runs there, and the network
goes with it. So nothing is left behind, even where the tests themselves are killed. Needs root and iproute2.

    with Hosts(folder, {"n1": "10.0.0.11", "n2": "10.0.0.12"}) as hosts:
        hosts.run("n1", "ip", "link", "set", "eth0", "mtu", "9000")
"""

import contextlib
import ctypes
import functools
import os
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from types import TracebackType
from typing import Self

from tests.conftest import become, rank_environment, skip, start_verb, wait_for
from tests.processes import is_alive

PROGRAMS = ("ip", "unshare", "nsenter", "setpriv")
ROUTER = "head"  # the machine that forwards between the others
ROUTER_ADDRESS = "10.0.0.1"
_INIT = ["bash", "-c", "sleep infinity & wait"]  # a shell, because it collects orphans
MASTER_PORT = 29500
ENDS = ("sport", "dport")
_NAMESPACES = ("net", "uts", "mnt", "pid")
_PR_SET_PDEATHSIG = 1


class Hosts:
    """Machines by name, each with an interface eth0 that has the given address."""

    def __init__(self, folder: Path, addresses: Mapping[str, str]) -> None:
        """`folder` is for files that the machines see in place of the system's."""
        if os.getuid() != 0:
            skip("hosts", "machines with networks of their own need root")
        if missing := [program for program in PROGRAMS if not shutil.which(program)]:
            skip("hosts", f"{', '.join(missing)} missing; apt-get install iproute2")
        self.folder, self.addresses = folder, {ROUTER: ROUTER_ADDRESS, **addresses}
        self._switches: dict[str, subprocess.Popen[bytes]] = {}
        self.inits: dict[str, int] = {}

    def __enter__(self) -> Self:
        try:
            names = "".join(f"{address} {name}\n" for name, address in self.addresses.items())
            (self.folder / "hosts").write_text(f"127.0.0.1 localhost\n{names}")
            for name in self.addresses:
                self._switch_on(name)
            self._connect()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """Switch everything off."""
        for process in self._switches.values():
            process.kill()
            process.wait()
        wait_for(lambda: not any(is_alive(pid) for pid in self.inits.values()))

    def enter(self, name: str) -> list[str]:
        """The beginning of a command that runs on a machine."""
        return ["nsenter", f"--target={self.inits[name]}", "--net", "--uts", "--mount", "--pid", "--"]

    def run(self, name: str, *command: str) -> None:
        """Run a command as root of a machine."""
        subprocess.run([*self.enter(name), *command], check=True, capture_output=True)

    @contextlib.contextmanager
    def replaced(self, name: str, path: str, by: Path) -> Iterator[None]:
        """For a while, let a machine see another file or folder in one's place."""
        self.run(name, "mount", "--bind", str(by), path)
        try:
            yield
        finally:
            self.run(name, "umount", path)

    @contextlib.contextmanager
    def firewall(self, *ports: int, kind: str = "blackhole", protocol: str = "tcp") -> Iterator[None]:
        """For a while, let the router forward only what goes to or comes from some ports.

        `kind` is what becomes of the rest: blackhole drops it silently, prohibit rejects it.
        """
        rules = [["pref", "10", "ipproto", protocol, end, str(p), "lookup", "main"] for p in ports for end in ENDS]
        rules.append(["pref", "20", "ipproto", protocol, kind])
        for rule in rules:
            self.run(ROUTER, "ip", "rule", "add", *rule)
        try:
            yield
        finally:
            for rule in rules:
                self.run(ROUTER, "ip", "rule", "del", *rule)

    def start(
        self,
        places: Sequence[str],
        arguments: Sequence[object],
        log: Path,
        changes: Mapping[int, Callable[[], None]] | None = None,
        **environment: str,
    ) -> list[ForkServerProcess]:
        """Start `mnist-dist VERB ...` once a rank, each on its machine; they meet on the first one's.

        `changes` has what is to be done in the process of a rank before it begins.
        """
        processes = []
        for rank, name in enumerate(places):
            variables = rank_environment(rank, len(places), MASTER_PORT)
            variables |= {"MASTER_ADDR": self.addresses[places[0]], "LOCAL_RANK": str(places[:rank].count(name))}
            variables |= {"LOCAL_WORLD_SIZE": str(places.count(name))} | environment
            target = functools.partial(become_on, self.inits[name], (changes or {}).get(rank))
            processes.append(start_verb(arguments, log, target, **variables))
        return processes

    def _switch_on(self, name: str) -> None:
        """Start a machine: namespaces, and the process on which they depend, which itself depends on this one."""
        unshare = ["unshare", "--net", "--uts", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
        switch = subprocess.Popen(["setpriv", "--pdeathsig=KILL", *unshare, *_INIT])
        self._switches[name] = switch
        wait_for(lambda: child_of(switch.pid) != 0)
        self.inits[name] = child_of(switch.pid)
        wait_for(lambda: "bash" in Path(f"/proc/{self.inits[name]}/comm").read_text())  # it is all set up
        self.run(name, "hostname", name)
        self.run(name, "mount", "--bind", str(self.folder / "hosts"), "/etc/hosts")
        self.run(name, "ip", "link", "set", "lo", "up")

    def _connect(self) -> None:
        """Lay a cable from each machine to the router, which has an end of it under the machine's name."""
        self.run(ROUTER, "ip", "address", "add", f"{ROUTER_ADDRESS}/32", "dev", "lo")
        self.run(ROUTER, "sh", "-c", "echo 1 > /proc/sys/net/ipv4/ip_forward")
        for name, address in self.addresses.items():
            if name == ROUTER:
                continue
            ends = ["netns", str(self.inits[ROUTER]), "type", "veth", "peer", "name", "eth0", "netns"]
            subprocess.run(["ip", "link", "add", "name", name, *ends, str(self.inits[name])], check=True)
            self.run(ROUTER, "ip", "link", "set", name, "up")
            self.run(ROUTER, "ip", "route", "add", address, "dev", name)
            self.run(name, "ip", "address", "add", f"{address}/32", "dev", "eth0")
            self.run(name, "ip", "link", "set", "eth0", "up")
            self.run(name, "ip", "route", "add", ROUTER_ADDRESS, "dev", "eth0")
            self.run(name, "ip", "route", "add", "default", "via", ROUTER_ADDRESS)


def become_on(
    init: int,
    change: Callable[[], None] | None,
    arguments: list[str],
    folder: Path,
    log: Path,
    environment: dict[str, str],
) -> None:
    """In a forked process: be what `python train.py` would be on the machine with that first process."""
    libc = ctypes.CDLL(None, use_errno=True)
    descriptors = [os.open(f"/proc/{init}/ns/{kind}", os.O_RDONLY) for kind in _NAMESPACES]
    for descriptor in descriptors:
        if libc.setns(descriptor, 0):
            raise OSError(ctypes.get_errno(), "setns")
        os.close(descriptor)
    if child := os.fork():  # only a child lives in the machine's own list of processes, as its /proc has it
        os._exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) % 256)
    libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if change:
        change()
    become(arguments, folder, log, environment)


def child_of(pid: int) -> int:
    """The only child of a process, or 0."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return int(children[0]) if children else 0
