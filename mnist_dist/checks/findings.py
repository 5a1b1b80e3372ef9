"""Everything that `doctor` and `verify` can say: each sentence with its cause and its cure.

docs/DOCTOR.md lists the same sentences, which a test compares.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any


class Status(StrEnum):
    """How a check ended, the worst first."""

    FAIL = "FAIL"
    WARN = "WARN"
    SKIP = "SKIP"  # it could not be done, which never counts as passed
    PASS = "PASS"


# What doctor looks at, in this order, and what it means where nothing was found.
CHECKS = {
    "ranks": "all ranks came and answered",
    "request": "all ranks have the same request, code and libraries",
    "same everywhere": "driver, kernel, processors, memory and network settings are the same on all hosts",
    "names": "each host's name leads to an address that the others can reach",
    "reachability": "ranks connect to each other on any port",
    "mtu": "large packets pass between all hosts",
    "clock": "the hosts' clocks agree within a second",
    "cores": "each rank has processor cores of its own",
    "shared memory": "/dev/shm is large enough",
    "limits": "a process may open enough files",
    "run directory": "it can be written, locked and renamed in, and all hosts see the same",
    "data": "each host has the same dataset",
    "compute": "each device computes matrix products without an error",
    "speed": "all devices are about equally fast",
    "exchange": "a sum over the ranks has every rank's part in it, exactly once",
    "links": "all connections between hosts are about equally fast",
    "gpus": "no GPU reports errors or throttling, and GPUs read each other's memory",
    "kernel log": "the kernel reports no hardware errors",
}

# What verify compares.
COMPARISONS = {
    "alone": "each rank, training by itself, gets the same bits as the others",
    "together": "the ranks together get the bits of one rank alone",
    "again": "a second time they get the same bits",
    "resumed": "stopped, saved and gone on with, they get the same bits",
    "images": "each image is used once an epoch, and each test image counted once",
    "pace": "no rank is far slower than the others",
    "planted": "the faults that were planted were found",
}


@dataclass(frozen=True)
class Sentence:
    """One thing that can be said; text, cause and cure have fields in braces."""

    check: str
    status: Status
    text: str
    cause: str
    cure: str


@dataclass(frozen=True)
class Finding:
    """Something that was found, in words."""

    name: str
    check: str
    status: Status
    text: str
    cause: str
    cure: str
    hosts: tuple[str, ...]  # where to look, the guilty ones if that is known


def find(name: str, hosts: Iterable[str] = (), /, **fields: Any) -> Finding:
    """Make a finding of one of the sentences."""
    sentence = SENTENCES[name]
    text, cause, cure = (part.format(**fields) for part in (sentence.text, sentence.cause, sentence.cure))
    check = sentence.check.format(**fields)
    return Finding(name, check, sentence.status, text, cause, cure, tuple(dict.fromkeys(hosts)))


def worst(findings: Sequence[Finding]) -> Status:
    """The worst status of some findings: PASS where there are none."""
    return min((f.status for f in findings), key=list(Status).index, default=Status.PASS)


SENTENCES = {
    "skipped": Sentence(
        "{check}",
        Status.SKIP,
        "not tried, since {why}",
        "it needs what failed before",
        "mend that, and run this again",
    ),
    "ranks.missing": Sentence(
        "ranks",
        Status.FAIL,
        "of {size} ranks these did not come within {seconds:g} s: {ranks}",
        "their machine or process was not started, or does not reach the port on which the ranks meet, {place}",
        "look at their logs; try `nc -vz {host} {port}` on their machine",
    ),
    "ranks.silent": Sentence(
        "ranks",
        Status.FAIL,
        "{who} came, and did not answer in the check of {check}",
        "its process was killed or stopped, or its machine is lost or overloaded",
        "look at that machine: `ps`, `dmesg`, its load and memory",
    ),
    "request.differs": Sentence(
        "request",
        Status.FAIL,
        "{who} has {key}={value}, the others {key}={other}",
        "it was started with another request, another copy of the code or another environment",
        "start all ranks from one folder that they share, in the same virtual environment or container",
    ),
    "request.refused": Sentence(
        "request",
        Status.FAIL,
        "{who}: {why}",
        "this rank cannot take part as it was started",
        "mend that; where it is a GPU that is wrong, ACCELERATE_USE_CPU=true trains on the CPU all the same",
    ),
    "same.differs": Sentence(
        "same everywhere",
        Status.WARN,
        "{who} has {key}={value}, most have {other}",
        "the hosts are not of one kind, or one of them was set up in another way",
        "ask for hosts of one kind; bits and speed differ between kinds",
    ),
    "same.settings": Sentence(
        "same everywhere",
        Status.FAIL,
        "{who} has {key}={value} in the environment, most have {other}",
        "a profile or job script sets it on some hosts only",
        "set it alike on all hosts, or nowhere",
    ),
    "names.loopback": Sentence(
        "names",
        Status.FAIL,
        "{host}: its own name leads to {address}, where no other host can reach it",
        "/etc/hosts names the host beside a loopback address, as some installers do",
        "mend /etc/hosts or DNS on {host}, or export GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME (it has: {interfaces})",
    ),
    "names.unknown": Sentence(
        "names",
        Status.FAIL,
        "{host}: its own name leads nowhere, so gloo would use {address}, where no other host can reach it",
        "neither /etc/hosts nor the name server knows the host",
        "add {host} to /etc/hosts or DNS, or export GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME (it has: {interfaces})",
    ),
    "names.slow": Sentence(
        "names",
        Status.WARN,
        "{host}: looking up {name} took {seconds:.0f} s",
        "its name server is slow or does not answer",
        "mend /etc/resolv.conf on {host}, or add the job's hosts to /etc/hosts",
    ),
    "reachability.blocked": Sentence(
        "reachability",
        Status.FAIL,
        "{who} cannot connect to {peer} at {address}:{port} ({why})",
        "a firewall lets only some ports through, or the address belongs to a network that the hosts do not share",
        "{cure}",
    ),
    "mtu.stalls": Sentence(
        "mtu",
        Status.FAIL,
        "from {host} to {peer} 1 KiB passes and 256 KiB stall (their interfaces' MTU: {mtu} and {peer_mtu})",
        "a switch or router on the way has a smaller MTU than the hosts, and does not say so",
        "set the same MTU on all hosts and switches, or 1500 on the hosts",
    ),
    "mtu.differs": Sentence(
        "mtu",
        Status.WARN,
        "{host} has an MTU of {mtu}, most hosts {other}",
        "its network interface was set up in another way",
        "set the same MTU on all hosts: `ip link set {interface} mtu {other}`",
    ),
    "clock.far": Sentence(
        "clock",
        Status.FAIL,
        "{host}'s clock is {offset:+.1f} s off that of {first}",
        "no time server sets it",
        "start chrony or ntpd on {host}; logs, file times and certificates go wrong",
    ),
    "clock.off": Sentence(
        "clock",
        Status.WARN,
        "{host}'s clock is {offset:+.1f} s off that of {first}",
        "its time server is not reached, or has just been started",
        "look at `chronyc tracking` or `timedatectl` on {host}",
    ),
    "cores.shared": Sentence(
        "cores",
        Status.FAIL,
        "{host}: {num_ranks} ranks share {num_cores} of the host's {all_cores} cores",
        "the launcher or the scheduler bound several ranks to the same cores",
        "ask for cores for each rank: --cpus-per-task under SLURM; do not bind, or bind each rank to cores of its own",
    ),
    "cores.few": Sentence(
        "cores",
        Status.WARN,
        "{host}: {num_ranks} ranks on {num_cores} cores",
        "more ranks were started than there are cores",
        "start at most one rank a core",
    ),
    "cores.throttled": Sentence(
        "cores",
        Status.WARN,
        "{who} was held back by its container's limit of processor time in {percent:.0f} % of the periods",
        "the container or the job has a smaller quota than the ranks use",
        "raise the limit (cpu.max), or start fewer ranks",
    ),
    "cores.stolen": Sentence(
        "cores",
        Status.WARN,
        "{host}: the hypervisor took {percent:.0f} % of the processor time",
        "other virtual machines use the same physical cores",
        "ask for dedicated cores",
    ),
    "shm.small": Sentence(
        "shared memory",
        Status.FAIL,
        "{host}: /dev/shm has {free} MiB free for {num_ranks} ranks with GPUs; NCCL needs about 64 MiB a rank",
        "containers get 64 MiB unless they are told otherwise",
        "docker run --ipc=host or --shm-size=8g; in Kubernetes an emptyDir with medium: Memory",
    ),
    "shm.tight": Sentence(
        "shared memory",
        Status.WARN,
        "{host}: /dev/shm has {free} MiB free for {num_ranks} ranks",
        "containers get 64 MiB unless they are told otherwise; gloo does not need it, NCCL does",
        "docker run --ipc=host or --shm-size=8g; in Kubernetes an emptyDir with medium: Memory",
    ),
    "limits.files": Sentence(
        "limits",
        Status.WARN,
        "{host}: a process may open {limit} files, fewer than {wanted}",
        "ulimit -n, or the scheduler's limits",
        "ulimit -n 65536 in the job script, or LimitNOFILE of the scheduler's daemon",
    ),
    "limits.memlock": Sentence(
        "limits",
        Status.FAIL,
        "{host}: a process may lock {limit} KiB of memory, and there is an InfiniBand card, which needs it unlimited",
        "ulimit -l, or the scheduler's limits",
        "LimitMEMLOCK=infinity for the scheduler's daemon, and PropagateResourceLimitsExcept=MEMLOCK under SLURM",
    ),
    "run_dir.unwritable": Sentence(
        "run directory",
        Status.FAIL,
        "{who} cannot write in {folder}: {why}",
        "the folder belongs to somebody else, is mounted read-only, or the disk is full",
        "give a run_dir where this user may write",
    ),
    "run_dir.hangs": Sentence(
        "run directory",
        Status.FAIL,
        "{who}: {what} in {folder} did not end within {seconds:g} s",
        "its file server does not answer",
        "look at the mount with `stat -f {folder}`; give a run_dir on another file system",
    ),
    "run_dir.not_shared": Sentence(
        "run directory",
        Status.WARN,
        "{host} does not see what {first} writes in {folder}",
        "each host has a folder of its own under that name",
        "give a run_dir on a file system that the hosts share, or a restart on another first host begins anew",
    ),
    "run_dir.no_locks": Sentence(
        "run directory",
        Status.WARN,
        "{host} got a lock in {folder} that {first} holds",
        "the file system is mounted without locks between hosts (nolock, localflock)",
        "mount it with locks, or see to it that no two jobs use one run_dir",
    ),
    "run_dir.full": Sentence(
        "run directory",
        Status.WARN,
        "{who}: {folder} has {free} MiB left",
        "the file system, or this user's quota, is nearly full",
        "delete old runs, or give another run_dir",
    ),
    "data.absent": Sentence(
        "data",
        Status.SKIP,
        "{dataset} is on no host in data_dir={folder}",
        "it was neither fetched nor drawn yet; training will do it, and needs the network to fetch it",
        "mnist-dist fetch {dataset}",
    ),
    "data.missing": Sentence(
        "data",
        Status.FAIL,
        "{host} does not have {dataset} in data_dir={folder}, {first} has it",
        "the folder is not shared, or was filled on some hosts only",
        "mnist-dist fetch {dataset} on {host}, or give a data_dir that all hosts share",
    ),
    "data.differs": Sentence(
        "data",
        Status.FAIL,
        "{host} has another {dataset} than {first} in data_dir={folder} ({value} and {other})",
        "one of the copies is another version, or was changed",
        "delete it on {host} and fetch it again",
    ),
    "data.hangs": Sentence(
        "data",
        Status.FAIL,
        "{who}: {dataset} in data_dir={folder} was not read within {seconds:g} s",
        "its file server does not answer, or is overloaded",
        "look at the mount with `stat -f {folder}`; give a data_dir on another file system",
    ),
    "data.unreadable": Sentence(
        "data",
        Status.FAIL,
        "{who}: {why}",
        "the file is damaged or may not be read",
        "do what the sentence says",
    ),
    "compute.wrong": Sentence(
        "compute",
        Status.FAIL,
        "{who}, {device}: a product of integer matrices in {precision} is wrong in row {row}, column {column}: {value} "
        "instead of {expected}",
        "the processor, GPU or memory is faulty, or a library was built for another one",
        "take this host out of the job and have its hardware tested",
    ),
    "compute.failed": Sentence(
        "compute",
        Status.FAIL,
        "{who}, {device}: {why}",
        "the driver or the library does not fit the device, or the device is out of memory or broken",
        "run `python -c 'import torch; print(torch.ones(2, device=\"cuda\") + 1)'` on that host",
    ),
    "compute.hangs": Sentence(
        "compute",
        Status.FAIL,
        "{who}, {device}: the device did not answer within {seconds:g} s",
        "the driver or the device hangs",
        "look at `nvidia-smi` and `dmesg` on that host, and take it out of the job",
    ),
    "speed.slow": Sentence(
        "speed",
        Status.FAIL,
        "{who}, {device}: {ratio:.1f} times as slow as the ranks' median",
        "other processes use its cores, it has a limit of processor time, or it is throttled by heat or power",
        "look at `top` and at the temperature on that host, or take it out of the job",
    ),
    "speed.slower": Sentence(
        "speed",
        Status.WARN,
        "{who}, {device}: {ratio:.1f} times as slow as the ranks' median",
        "other processes use its cores, or it is another kind of device",
        "look at `top` on that host; all ranks wait for the slowest",
    ),
    "exchange.wrong": Sentence(
        "exchange",
        Status.FAIL,
        "a sum over the ranks has {what} of {who}",
        "a network card, driver or library changes or loses what it carries",
        "try NCCL_P2P_DISABLE=1, then NCCL_IB_DISABLE=1; take this host out of the job",
    ),
    "exchange.differs": Sentence(
        "exchange",
        Status.FAIL,
        "{who} got another sum than the other ranks",
        "a network card, driver or library changes what it carries",
        "try NCCL_P2P_DISABLE=1, then NCCL_IB_DISABLE=1; take this host out of the job",
    ),
    "exchange.failed": Sentence(
        "exchange",
        Status.FAIL,
        "{who}: the ranks could not form a group: {why}",
        "the communication library found no way between the ranks",
        "look at the other rows; NCCL_DEBUG=INFO, or TORCH_CPP_LOG_LEVEL=INFO for gloo, says more",
    ),
    "exchange.hangs": Sentence(
        "exchange",
        Status.FAIL,
        "{who} did not end the exchange within {seconds:g} s",
        "the communication library waits for a connection that does not come about",
        "look at the other rows; set NCCL_SOCKET_IFNAME and GLOO_SOCKET_IFNAME to an interface that the hosts share",
    ),
    "links.slow_host": Sentence(
        "links",
        Status.FAIL,
        "{host} sends and receives {speed:.0f} Mbit/s, the hosts' median is {median:.0f}",
        "its network card runs at a lower speed, or others use it",
        "look at `ethtool` and the cable of {host}, or take it out of the job",
    ),
    "links.slower_host": Sentence(
        "links",
        Status.WARN,
        "{host} sends and receives {speed:.0f} Mbit/s, the hosts' median is {median:.0f}",
        "its network card runs at a lower speed, or others use it",
        "look at `ethtool` and the load of {host}",
    ),
    "links.slow_link": Sentence(
        "links",
        Status.FAIL,
        "between {host} and {peer} {speed:.0f} Mbit/s pass, the links' median is {median:.0f}",
        "a cable or switch port between them is faulty or loaded; each of them is fast with the other hosts",
        "have the way between them looked at, or take one of them out of the job",
    ),
    "gpus.health": Sentence(
        "gpus",
        Status.FAIL,
        "{host}, GPU {index}: {what}",
        "the GPU is faulty, too hot or short of power",
        "take {host} out of the job; the administrator resets or replaces the GPU",
    ),
    "gpus.power": Sentence(
        "gpus",
        Status.WARN,
        "{host}, GPU {index}: {what}",
        "the GPU is warm, or its power limit is low",
        "look at `nvidia-smi -q -d PERFORMANCE` on {host} while it trains",
    ),
    "gpus.unknown": Sentence(
        "gpus",
        Status.SKIP,
        "{host}: the GPUs' health was not read ({why})",
        "nvidia-smi is not there, or does not answer",
        "nvidia-smi -q on {host}",
    ),
    "gpus.peers": Sentence(
        "gpus",
        Status.FAIL,
        "{host}: GPU {index} read {what} from GPU {peer}'s memory",
        "access control (ACS) or an IOMMU of the PCI bus changes what GPUs send each other",
        "NCCL_P2P_DISABLE=1 until the administrator has turned ACS off (`lspci -vvv | grep ACSCtl`)",
    ),
    "gpus.transport": Sentence(
        "gpus",
        Status.FAIL,
        "{host}: NCCL uses TCP although an InfiniBand port is active",
        "NCCL's InfiniBand plugin was not found, or NCCL_IB_DISABLE or NCCL_NET is set",
        "look at NCCL_DEBUG=INFO; unset NCCL_IB_DISABLE and NCCL_NET; mount /dev/infiniband into the container",
    ),
    "kernel.errors": Sentence(
        "kernel log",
        Status.FAIL,
        "{host}: the kernel reports {count} errors of hardware, the last: {line}",
        "a GPU, memory or processor is faulty",
        "take {host} out of the job and have its hardware tested",
    ),
    "kernel.unread": Sentence(
        "kernel log",
        Status.SKIP,
        "on {num_hosts} hosts an ordinary user may not read it",
        "kernel.dmesg_restrict is 1",
        "for the administrator: dmesg --level=err,crit,alert,emerg | grep -iE 'xid|nvlink|mce|hardware error|ecc'",
    ),
    "alone.differs": Sentence(
        "alone",
        Status.FAIL,
        "{who}, training {model} by itself, differs from the other ranks from step {step} on: {kind} of {parameter}",
        "its processor, GPU or memory computes wrongly, or it has another library",
        "take this host out of the job and have its hardware tested; mnist-dist doctor compares the libraries",
    ),
    "start.differs": Sentence(
        "together",
        Status.FAIL,
        "{who} begins {model} with other weights, first in {parameter}",
        "it draws its weights from another seed, or from another version of torch",
        "seed every rank alike; mnist-dist doctor compares the versions",
    ),
    "images.of_another": Sentence(
        "together",
        Status.FAIL,
        "{who} trains {model} on the images of {other} at step {step}",
        "the sampler was given another rank, or the batch was cut twice",
        "give the sampler this rank and the world size, and cut a batch once",
    ),
    "images.differ": Sentence(
        "together",
        Status.FAIL,
        "{who} trains {model} on other images than it should at step {step}",
        "the order of the images depends on something else than seed and epoch",
        "draw the order from the seed and the epoch alone, alike on all ranks",
    ),
    "order.repeats": Sentence(
        "together",
        Status.FAIL,
        "{who} repeats the order of an earlier epoch, {model}, step {step}",
        "the sampler was not told of the new epoch (set_epoch)",
        "tell the sampler of each epoch",
    ),
    "gradient.differs": Sentence(
        "together",
        Status.FAIL,
        "{who} computed another gradient of {parameter} than it did alone, {model}, step {step}, from the same weights "
        "and images",
        "its processor, GPU or memory computes wrongly now and then",
        "take this host out of the job and have its hardware tested",
    ),
    "exchange.skipped": Sentence(
        "together",
        Status.FAIL,
        "{who} went on with its own gradients at step {step} of {model}, not with the sum over the ranks",
        "an exchange was left out on this rank (no_sync, a condition on the rank)",
        "let every rank take part in each exchange, and use its result",
    ),
    "exchange.garbage": Sentence(
        "together",
        Status.FAIL,
        "{who} got a wrong sum over the ranks at step {step} of {model}, first in {parameter}; all that went into it "
        "was right",
        "a network card, driver or library changes what it carries",
        "try NCCL_P2P_DISABLE=1, then NCCL_IB_DISABLE=1; take this host out of the job",
    ),
    "weights.differ": Sentence(
        "together",
        Status.FAIL,
        "{who} holds another {parameter} after step {step} of {model}, though it was updated with the right gradients",
        "its memory changed a bit, or its optimizer differs",
        "take this host out of the job and have its memory tested",
    ),
    "losses.differ": Sentence(
        "together",
        Status.FAIL,
        "{who} has the loss {loss:.6f} at step {step} of {model}, one rank alone {usual:.6f}: more than rounding "
        "explains",
        "ranks train on other images, or an exchange is wrong",
        "run this on a power of two of ranks on hosts of one kind, where bits are compared and the step is named",
    ),
    "run.failed": Sentence(
        "together",
        Status.FAIL,
        "the run of {model} ended: {why}",
        "the training job itself found it",
        "do what the sentence says",
    ),
    "again.differs": Sentence(
        "again",
        Status.FAIL,
        "{who} got another {parameter} when the ranks trained {model} a second time ({step} steps)",
        "something computes or carries wrongly now and then, or is not deterministic",
        "run this again; if another rank is named each time, look at the network, else at that host",
    ),
    "resumed.differs": Sentence(
        "resumed",
        Status.FAIL,
        "{who} got another {parameter} after {model} was stopped, saved and gone on with ({step} steps)",
        "the checkpoint does not hold all that training depends on, or was changed on its way",
        "look at the file system of TMPDIR, and at the memory of that host",
    ),
    "images.not_once": Sentence(
        "images",
        Status.FAIL,
        "in epoch {epoch} of {model} {twice} images were used more than once and {never} never",
        "the ranks' shards overlap, or do not cover the dataset",
        "cut each global batch once, by rank and world size",
    ),
    "evaluation.not_once": Sentence(
        "images",
        Status.FAIL,
        "{who} counted {counted} test images of {images} when it evaluated {model}",
        "evaluation is sharded with padding, or an image is there twice",
        "evaluate each test image once, on one rank, or leave the padding out of the count",
    ),
    "rank.slow": Sentence(
        "pace",
        Status.WARN,
        "{who} takes {ratio:.0f} times as long as the ranks' median for forward and backward of {model}",
        "other processes use its cores, or it is throttled",
        "look at `top` on that host; mnist-dist doctor tells more",
    ),
    "planted.unnoticed": Sentence(
        "planted",
        Status.FAIL,
        "it was not noticed that {fault} ({who}, step {step}); found instead: {instead}",
        "verify would not notice this fault on this set-up",
        "do not trust a PASS of verify here, and report this",
    ),
}
