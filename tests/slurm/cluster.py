"""A real SLURM cluster of two nodes on one machine, made of Debian's packages slurm-wlm, munge and iproute2, as root.

The controller and the two nodes have namespaces of their own: network (so a wrong master address shows), host name,
mounts and processes. A node's first process is its power switch: when it is killed, the kernel kills all that runs
there, and the network goes with it. So nothing is left behind, even where the tests themselves are killed.

    with Cluster() as cluster:
        cluster.client("sinfo")
"""

import contextlib
import os
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Self

from tests.conftest import clean_environment, skip, wait_for
from tests.processes import is_alive

PROGRAMS = ("slurmctld", "slurmd", "sbatch", "munged", "ip", "unshare", "nsenter", "setpriv")
NODES = ("n1", "n2")
CPUS, GPUS = 4, 2  # of a node, as far as SLURM believes
HEAD = "head"
_ADDRESSES = {HEAD: "10.0.0.1", "n1": "10.0.0.11", "n2": "10.0.0.12"}
_INIT = ["bash", "-c", "sleep infinity & wait"]  # a shell, because it collects orphans

# Times are short, so that a lost node is noticed and a requeued job may start (cred_expire; SLURM takes less than 5 s
# for 120) within seconds.
# preempt_send_user_signal: a preempted job hears the signal that it asked for, and has GraceTime to leave.
# "steady" jobs are never preempted, "urgent" ones preempt those of "main".
_CONFIGURATION = """\
ClusterName=test
SlurmctldHost=head(10.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket,cred_expire=5
CredType=cred/munge
MpiDefault=none
MailProg=/bin/true
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
ReturnToService=2
StateSaveLocation={folder}/state
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmdSpoolDir={folder}/spool.%n
SlurmdParameters=config_overrides
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=1,sched_interval=1,batch_sched_delay=0
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
GresTypes=gpu
MinJobAge=3600
KillWait=10
SlurmctldTimeout=10
SlurmdTimeout=5
MessageTimeout=10
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
NodeName=n1 NodeAddr=10.0.0.11 CPUs={cpus} RealMemory=4000 Gres=gpu:{gpus} State=UNKNOWN
NodeName=n2 NodeAddr=10.0.0.12 CPUs={cpus} RealMemory=4000 Gres=gpu:{gpus} State=UNKNOWN
PartitionName=main Nodes=n[1-2] Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=30
PartitionName=steady Nodes=n[1-2] MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
PartitionName=urgent Nodes=n[1-2] MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
"""


class Cluster:
    """Two nodes n1 and n2, each with four CPUs and two GPUs that are only device files."""

    def __init__(self) -> None:
        if os.getuid() != 0:
            skip("slurm", "a SLURM cluster with nodes of their own needs root")
        missing = [program for program in PROGRAMS if not shutil.which(program)]
        if missing:
            skip("slurm", f"{', '.join(missing)} missing; apt-get install slurm-wlm munge iproute2")
        self.folder = Path(tempfile.mkdtemp(prefix="slurm-"))  # not pytest's: munge wants it open to all
        self.folder.chmod(0o755)
        self._switches: dict[str, subprocess.Popen[bytes]] = {}
        self._inits: dict[str, int] = {}
        self._daemons: dict[tuple[str, str], subprocess.Popen[bytes]] = {}

    def __enter__(self) -> Self:
        try:
            self._configure()
            for name in (HEAD, *NODES):
                self._switch_on(name)
            self._connect()
            munge = self.folder / "munge"
            self._start(
                HEAD,
                "munged",
                "--foreground",
                f"--key-file={munge}/key",
                f"--socket={munge}/socket",
                f"--pid-file={munge}/pid",
                f"--seed-file={munge}/seed",
            )
            wait_for((munge / "socket").exists)
            self._start(HEAD, "slurmctld", "-D", "-c")
            for node in NODES:
                self.start_slurmd(node)
            wait_for(lambda: self.client("sinfo", "-h", "-t", "idle", "-o", "%D", "-p", "main", check=False) == "2\n")
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
        for process in (*self._switches.values(), *self._daemons.values()):
            process.kill()
            process.wait()
        wait_for(lambda: not any(is_alive(pid) for pid in self._inits.values()))
        shutil.rmtree(self.folder)

    def client(self, *command: str, cwd: Path | None = None, check: bool = True, **environment: str) -> str:
        """Run a command where the controller is, as on a login node; its output. It is killed after a minute."""
        enter = ["nsenter", f"--target={self._inits[HEAD]}", "--net", "--uts", "--"]
        result = subprocess.run(
            [*enter, *command],
            cwd=cwd,
            env=self._environment(**environment),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=60,
        )
        assert not check or result.returncode == 0, f"{command}: {result.stdout}"
        return result.stdout

    def in_node(self, node: str, *command: str) -> None:
        """Run a command as root of a node."""
        subprocess.run([*self._enter(node), *command], check=True, capture_output=True)

    @contextlib.contextmanager
    def replaced(self, node: str, path: str, by: Path) -> Iterator[None]:
        """For a while, let a node see another file in a file's place."""
        self.in_node(node, "mount", "--bind", str(by), path)
        try:
            yield
        finally:
            self.in_node(node, "umount", path)

    def processes(self, node: str) -> dict[int, list[str]]:
        """Pid and command of each process of a job on a node: all but the node's own."""
        own = {"slurmd", "bash -c sleep infinity & wait", "sleep infinity"}
        home = Path(f"/proc/{self._inits[node]}/ns/pid").readlink()
        found = {}
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                if (entry / "ns" / "pid").readlink() != home or not is_alive(int(entry.name)):
                    continue
                command = (entry / "cmdline").read_bytes().decode(errors="replace").rstrip("\0").split("\0")
            except OSError:
                continue
            if " ".join(command) not in own and Path(command[0]).name != "slurmd":
                found[int(entry.name)] = command
        return found

    def start_slurmd(self, node: str) -> None:
        """Start a node's slurmd."""
        self._start(node, "slurmd", "-D", "-N", node)

    @contextlib.contextmanager
    def without_slurmd(self, node: str) -> Iterator[None]:
        """For a while, a node has no slurmd; what it started runs on, as it does when a node loses touch."""
        os.kill(_child(self._daemons[node, "slurmd"].pid), signal.SIGKILL)
        self._daemons[node, "slurmd"].wait()
        try:
            yield
        finally:
            self.start_slurmd(node)

    def _configure(self) -> None:
        for name in ("munge", "state", "dev", *(f"spool.{node}" for node in NODES)):
            (self.folder / name).mkdir()
        text = _CONFIGURATION.format(folder=self.folder, cpus=CPUS, gpus=GPUS)
        (self.folder / "slurm.conf").write_text(text)
        for index in range(GPUS):  # /dev/null under another name
            os.mknod(self.folder / "dev" / f"gpu{index}", 0o666 | stat.S_IFCHR, os.makedev(1, 3))
        (self.folder / "gres.conf").write_text(f"NodeName=n[1-2] Name=gpu File={self.folder}/dev/gpu[0-{GPUS - 1}]\n")
        hosts = "".join(f"{address} {name}\n" for name, address in _ADDRESSES.items())
        (self.folder / "hosts").write_text(f"127.0.0.1 localhost\n{hosts}")
        key = self.folder / "munge" / "key"
        key.touch(0o600)
        key.write_bytes(os.urandom(128))

    def _switch_on(self, name: str) -> None:
        """Start a machine: namespaces, and the process on which they depend, which itself depends on this one."""
        unshare = ["unshare", "--net", "--uts", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
        switch = subprocess.Popen(["setpriv", "--pdeathsig=KILL", *unshare, *_INIT])
        self._switches[name] = switch
        wait_for(lambda: _child(switch.pid) != 0)
        self._inits[name] = _child(switch.pid)
        wait_for(lambda: "bash" in Path(f"/proc/{self._inits[name]}/comm").read_text())  # it is all set up
        self.in_node(name, "hostname", name)
        self.in_node(name, "mount", "--bind", str(self.folder / "hosts"), "/etc/hosts")
        self.in_node(name, "ip", "link", "set", "lo", "up")

    def _connect(self) -> None:
        """Lay a cable from each node to a switch in the head."""
        bridge = ["ip", "link", "add", "name", "switch", "type", "bridge"]
        self.in_node(HEAD, *bridge)
        self.in_node(HEAD, "ip", "address", "add", f"{_ADDRESSES[HEAD]}/24", "dev", "switch")
        self.in_node(HEAD, "ip", "link", "set", "switch", "up")
        for node in NODES:
            ends = ["netns", str(self._inits[HEAD]), "type", "veth", "peer", "name", "eth0", "netns"]
            subprocess.run(["ip", "link", "add", "name", node, *ends, str(self._inits[node])], check=True)
            self.in_node(HEAD, "ip", "link", "set", node, "master", "switch", "up")
            self.in_node(node, "ip", "address", "add", f"{_ADDRESSES[node]}/24", "dev", "eth0")
            self.in_node(node, "ip", "link", "set", "eth0", "up")

    def _enter(self, name: str) -> list[str]:
        return ["nsenter", f"--target={self._inits[name]}", "--net", "--uts", "--mount", "--pid", "--"]

    def _start(self, name: str, *command: str) -> None:
        """Start a daemon, its output into a file of the cluster's folder."""
        with (self.folder / f"{command[0]}.{name}.log").open("ab") as log:
            self._daemons[name, command[0]] = subprocess.Popen(
                [*self._enter(name), *command], env=self._environment(), stdout=log, stderr=log
            )

    def _environment(self, **extra: str) -> dict[str, str]:
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        return clean_environment(PATH=path, SLURM_CONF=str(self.folder / "slurm.conf"), **extra)


def _child(pid: int) -> int:
    """The only child of a process, or 0."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return int(children[0]) if children else 0
