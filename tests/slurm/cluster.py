"""A real SLURM cluster of two nodes on one machine, made of Debian's packages slurm-wlm, munge and iproute2, as root.

The controller and the two nodes are machines of tests/hosts.py: a wrong master address shows, and nothing is left
behind, even where the tests themselves are killed.

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
from tests.hosts import ROUTER, Hosts, child_of
from tests.processes import is_alive

PROGRAMS = ("slurmctld", "slurmd", "sbatch", "munged")
NODES = ("n1", "n2")
CPUS, GPUS = 4, 2  # of a node, as far as SLURM believes
HEAD = ROUTER
_ADDRESSES = {"n1": "10.0.0.11", "n2": "10.0.0.12"}

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
        self.hosts = Hosts(self.folder, _ADDRESSES)
        self._daemons: dict[tuple[str, str], subprocess.Popen[bytes]] = {}

    def __enter__(self) -> Self:
        try:
            self._configure()
            self.hosts.__enter__()
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
        for process in self._daemons.values():
            process.kill()
            process.wait()
        self.hosts.stop()
        shutil.rmtree(self.folder)

    def client(self, *command: str, cwd: Path | None = None, check: bool = True, **environment: str) -> str:
        """Run a command where the controller is, as on a login node; its output. It is killed after a minute."""
        enter = ["nsenter", f"--target={self.hosts.inits[HEAD]}", "--net", "--uts", "--"]
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

    def processes(self, node: str) -> dict[int, list[str]]:
        """Pid and command of each process of a job on a node: all but the node's own."""
        own = {"slurmd", "bash -c sleep infinity & wait", "sleep infinity"}
        home = Path(f"/proc/{self.hosts.inits[node]}/ns/pid").readlink()
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
        os.kill(child_of(self._daemons[node, "slurmd"].pid), signal.SIGKILL)
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
        key = self.folder / "munge" / "key"
        key.touch(0o600)
        key.write_bytes(os.urandom(128))

    def _start(self, name: str, *command: str) -> None:
        """Start a daemon, its output into a file of the cluster's folder."""
        with (self.folder / f"{command[0]}.{name}.log").open("ab") as log:
            self._daemons[name, command[0]] = subprocess.Popen(
                [*self.hosts.enter(name), *command], env=self._environment(), stdout=log, stderr=log
            )

    def _environment(self, **extra: str) -> dict[str, str]:
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        return clean_environment(PATH=path, SLURM_CONF=str(self.folder / "slurm.conf"), **extra)
