"""What the facts of all ranks mean. Nothing here measures: each function gets figures, and returns what is wrong.

`facts` has an entry for each rank, None for one that did not come.
"""

import statistics
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from mnist_dist.checks.findings import Finding, find
from mnist_dist.distributed.preflight import is_loopback

Facts = dict[str, Any]

SLOW_LOOKUP_S = 1.0
CLOCK_WARN_S, CLOCK_FAIL_S = 1.0, 10.0
STOLEN_PERCENT, THROTTLED_PERCENT = 5.0, 20.0
SHM_BYTES = 64 << 20  # a rank
OPEN_FILES = 1024
FREE_BYTES = 1 << 30
# Times as slow as the median, for a warning and for a failure. On a CPU the ranks share caches, and wait for cores: the
# processor's time tells a slow core, and only far more of the clock's tells a rank that does not get its core.
SLOW = {("cpu", "cpu_seconds"): (1.5, 2.5), ("cpu", "seconds"): (4.0, 8.0), ("gpu", "seconds"): (1.25, 2.0)}
LINK_WARN, LINK_FAIL = 0.8, 0.5  # of the median bandwidth
# nvidia-smi's clocks_event_reasons, as bits (nvml.h): what slows a GPU down.
SLOWDOWNS = {0x08: "hardware slowdown", 0x40: "hardware thermal slowdown", 0x80: "power brake slowdown"}
THERMAL = 0x20  # software thermal slowdown
UNLIMITED_KIB = 1 << 40


def who(facts: Facts) -> str:
    """A rank in words, with its host."""
    return f"rank {facts['rank']} on {facts['host']}"


def by_host(facts: Sequence[Facts | None]) -> dict[str, list[Facts]]:
    """The ranks that came, by their host."""
    hosts: dict[str, list[Facts]] = defaultdict(list)
    for one in facts:
        if one is not None:
            hosts[one["host"]].append(one)
    return hosts


def most(values: list[Any]) -> Any:
    """The value that most have; of equally many the first one's."""
    return max(values, key=values.count)


def judge_requests(facts: Sequence[Facts | None]) -> list[Finding]:
    """Ranks that were started with another request or other code, or cannot take part."""
    came = [one for one in facts if one]
    for one in came:
        if why := one["refusal"] or one["device_refusal"]:
            return [find("request.refused", [one["host"]], who=who(one), why=why)]
    findings = []
    for key in dict.fromkeys(key for one in came for key in one["request"]):
        values = [one["request"].get(key) for one in came]
        common = most(values)
        for one, value in zip(came, values, strict=True):
            if value != common:
                words = {"who": who(one), "key": key, "value": value, "other": common}
                findings.append(find("request.differs", [one["host"]], **words))
    return findings[:8]


def judge_sameness(facts: Sequence[Facts | None]) -> list[Finding]:
    """Hosts that are not like most others; only the first rank of a host is looked at."""
    first = [ranks[0] for ranks in by_host(facts).values()]
    findings = []
    for kind, name in (("same", "same.differs"), ("settings", "same.settings")):
        for key in dict.fromkeys(key for one in first for key in one[kind]):
            values = [one[kind].get(key, "nothing") for one in first]
            common = most(values)
            for one, value in zip(first, values, strict=True):
                if value != common:
                    words = {"who": one["host"], "key": key, "value": value, "other": common}
                    findings.append(find(name, [one["host"]], **words))
    return findings


def judge_names(facts: Sequence[Facts | None]) -> list[Finding]:
    """Names that lead to loopback, though there are other hosts; name servers that are slow."""
    hosts = by_host(facts)
    findings = []
    for host, ranks in hosts.items():
        one = ranks[0]
        if len(hosts) > 1 and is_loopback(one["address"]):
            names = ", ".join(dict.fromkeys(name for name, address, _ in one["interfaces"] if not is_loopback(address)))
            name = "names.loopback" if one["resolves"] else "names.unknown"
            findings.append(find(name, [host], host=host, address=one["address"], interfaces=names or "none"))
        if one["lookup_s"] > SLOW_LOOKUP_S:
            findings.append(find("names.slow", [host], host=host, name=one["master"], seconds=one["lookup_s"]))
    return findings


def judge_reachability(facts: Sequence[Facts | None], tries: Sequence[list[Any] | None]) -> list[Finding]:
    """Ranks that another could not reach; `tries` has (peer, address, why, interfaces that answer) of each rank."""
    findings, seen = [], set()
    for rank, failures in enumerate(tries):
        for peer, address, why, answering in failures or []:
            one, other = facts[rank], facts[peer]
            if not one or not other or (one["host"], other["host"]) in seen:
                continue
            seen.add((one["host"], other["host"]))
            cure = "open all ports between these hosts"
            if answering:
                cure = (
                    f"export GLOO_SOCKET_IFNAME={answering[0]} and NCCL_SOCKET_IFNAME={answering[0]}, which did connect"
                )
            findings.append(
                find(
                    "reachability.blocked",
                    [one["host"], other["host"]],
                    who=who(one),
                    peer=who(other),
                    address=address,
                    port=other["port"],
                    why=why,
                    cure=cure,
                )
            )
    return findings


def judge_mtu(facts: Sequence[Facts | None], stalls: Sequence[list[tuple[int, int]] | None]) -> list[Finding]:
    """Ways on which large packets get lost: `stalls` has what each rank found, as (sender, receiver)."""
    findings = []
    for sender, receiver in (way for ways in stalls for way in ways or []):
        one, other = facts[sender], facts[receiver]
        if one and other:
            places = {"host": one["host"], "peer": other["host"]}
            findings.append(find("mtu.stalls", places.values(), **places, mtu=one["mtu"], peer_mtu=other["mtu"]))
    first = [ranks[0] for ranks in by_host(facts).values() if not is_loopback(ranks[0]["address"])]
    common = most([one["mtu"] for one in first]) if first else 0
    for one in first:
        if one["mtu"] != common:
            names = {"host": one["host"], "interface": one["interface"]}
            findings.append(find("mtu.differs", [one["host"]], **names, mtu=one["mtu"], other=common))
    return findings


def judge_clocks(facts: Sequence[Facts | None], clocks: Sequence[Sequence[float] | None]) -> list[Finding]:
    """Hosts whose clock is off: `clocks` has (offset, error) of rank 0's clock as each rank sees it."""
    findings = []
    for one, clock in zip(facts, clocks, strict=True):
        if one and clock and facts[0]:
            offset_s, error_s = -clock[0], clock[1]
            if abs(offset_s) - error_s > CLOCK_WARN_S:
                name = "clock.far" if abs(offset_s) > CLOCK_FAIL_S else "clock.off"
                findings.append(find(name, [one["host"]], host=one["host"], offset=offset_s, first=facts[0]["host"]))
    return findings


def judge_cores(facts: Sequence[Facts | None]) -> list[Finding]:
    """Ranks that share cores, or do not get them."""
    findings = []
    for host, ranks in by_host(facts).items():
        cores = {core for one in ranks for core in one["cores"]}
        numbers = {"host": host, "num_ranks": len(ranks), "num_cores": len(cores)}
        if len(cores) < len(ranks):
            all_cores = ranks[0]["all_cores"]
            if len(cores) < all_cores:
                findings.append(find("cores.shared", [host], **numbers, all_cores=all_cores))
            else:
                findings.append(find("cores.few", [host], **numbers))
        for one in ranks:
            if one["throttled"] > THROTTLED_PERCENT:
                findings.append(find("cores.throttled", [host], who=who(one), percent=one["throttled"]))
        if ranks[0]["stolen_percent"] > STOLEN_PERCENT:
            findings.append(find("cores.stolen", [host], host=host, percent=ranks[0]["stolen_percent"]))
    return findings


def judge_limits(facts: Sequence[Facts | None]) -> list[Finding]:
    """Shared memory and limits that are too small."""
    findings = []
    for host, ranks in by_host(facts).items():
        one, num_ranks = ranks[0], len(ranks)
        if one["shm_free"] is not None and one["shm_free"] < SHM_BYTES * num_ranks:
            name = "shm.small" if one["gpus"] else "shm.tight"
            findings.append(find(name, [host], host=host, free=one["shm_free"] >> 20, num_ranks=num_ranks))
        if 0 <= one["open_files"] < OPEN_FILES:
            findings.append(find("limits.files", [host], host=host, limit=one["open_files"], wanted=OPEN_FILES))
        if one["infiniband"] and 0 <= one["locked_kib"] < UNLIMITED_KIB:
            findings.append(find("limits.memlock", [host], host=host, limit=one["locked_kib"]))
    return findings


def judge_run_directory(
    facts: Sequence[Facts | None], held: Facts, seen: Sequence[Facts | None], folder: str, deadline_s: float
) -> list[Finding]:
    """A run directory that rank 0 cannot use, or that other hosts do not see; `held` and `seen` are what they found."""
    first = facts[0]
    if not first:
        return []
    place = [first["host"]]
    if "failed" in held:
        return [find("run_dir.unwritable", place, who=who(first), folder=folder, why=held["failed"])]
    if "free" not in held:
        words = {"what": "writing a file", "folder": folder, "seconds": deadline_s}
        return [find("run_dir.hangs", place, who=who(first), **words)]
    findings = []
    if held["free"] < FREE_BYTES:
        findings.append(find("run_dir.full", place, who=who(first), folder=folder, free=held["free"] >> 20))
    for one, reports in zip(facts, seen, strict=True):
        if not one or reports is None:
            continue
        words = {"host": one["host"], "first": first["host"], "folder": folder}
        if "done" not in reports and "failed" not in reports:
            what = {"what": "reading a file", "folder": folder, "seconds": deadline_s}
            findings.append(find("run_dir.hangs", [one["host"]], who=who(one), **what))
        elif not reports.get("seen"):
            findings.append(find("run_dir.not_shared", [one["host"]], **words))
        elif not reports.get("holds"):
            findings.append(find("run_dir.no_locks", [one["host"]], **words))
    return findings


def judge_transport(facts: Sequence[Facts | None], results: Sequence[Facts | None]) -> list[Finding]:
    """NCCL over TCP though there is InfiniBand; `results` has what NCCL said it uses, "transport"."""
    findings = {}
    for one, reports in zip(facts, results, strict=True):
        if one and reports and one["infiniband"] and reports.get("transport") == "Socket":
            findings[one["host"]] = find("gpus.transport", [one["host"]], host=one["host"])
    return list(findings.values())


def judge_data(
    facts: Sequence[Facts | None], data: Sequence[Facts | None], dataset: str, folder: str, deadline_s: float
) -> list[Finding]:
    """Hosts without the dataset, or with another; `data` has what each host's first rank found."""
    findings, held = [], {}
    for one, reports in zip(facts, data, strict=True):
        if one is None or reports is None:
            continue
        if "unreadable" in reports or "failed" in reports:
            why = reports.get("unreadable") or reports["failed"]
            findings.append(find("data.unreadable", [one["host"]], who=who(one), why=why))
        elif "fingerprint" in reports:
            held[one["host"]] = reports["fingerprint"]
        else:
            words = {"who": who(one), "dataset": dataset, "folder": folder, "seconds": deadline_s}
            findings.append(find("data.hangs", [one["host"]], **words))
    having = [host for host, value in held.items() if value]
    if held and not having:
        return [*findings, find("data.absent", dataset=dataset, folder=folder)]
    common = most([held[host] for host in having]) if having else ""
    for host, value in held.items():
        names = {"host": host, "dataset": dataset, "folder": folder}
        if not value:
            findings.append(find("data.missing", [host], **names, first=having[0]))
        elif value != common:
            first = next(h for h in having if held[h] == common)
            hashes = {"value": value[:12], "other": common[:12]}
            findings.append(find("data.differs", [host], **names, first=first, **hashes))
    return findings


def judge_devices(facts: Sequence[Facts | None], results: Sequence[Facts | None], deadline_s: float) -> list[Finding]:
    """Devices that compute wrongly, do not answer, or are slow."""
    findings = []
    for one, reports in zip(facts, results, strict=True):
        if one is None or reports is None:
            continue
        names = {"who": who(one), "device": reports.get("device", "device")}
        if "failed" in reports:
            findings.append(find("compute.failed", [one["host"]], **names, why=reports["failed"]))
        elif "done" not in reports:
            findings.append(find("compute.hangs", [one["host"]], **names, seconds=deadline_s))
        elif reports["wrong"]:
            findings.append(find("compute.wrong", [one["host"]], **names, **reports["wrong"]))
        for peer in reports.get("peers", []):
            words = {"index": one["local_rank"], "peer": peer["peer"], "what": "changed numbers"}
            findings.append(find("gpus.peers", [one["host"]], host=one["host"], **words))
    slow: dict[int, tuple[float, str, str]] = {}  # of each slow rank the worse of its two ratios
    for (kind, measure), (warn, fail) in SLOW.items():
        taken = {
            rank: reports[measure]
            for rank, reports in enumerate(results)
            if reports and measure in reports and (reports["device"] == "cpu") == (kind == "cpu")
        }
        median = statistics.median_low(taken.values()) if taken else 0.0
        for rank, seconds in taken.items():
            if seconds > warn * median:
                name = "speed.slow" if seconds > fail * median else "speed.slower"
                slow[rank] = max(
                    slow.get(rank, (0.0, "", "")), (seconds / median, name, (results[rank] or {})["device"])
                )
    for rank, (ratio, name, device) in slow.items():
        if one := facts[rank]:
            findings.append(find(name, [one["host"]], who=who(one), device=device, ratio=ratio))
    return findings


def judge_exchange(facts: Sequence[Facts | None], results: Sequence[Facts | None], deadline_s: float) -> list[Finding]:
    """Sums over the ranks that are wrong, and ranks that did not get one."""
    findings, hashes = [], {}
    for one, reports in zip(facts, results, strict=True):
        if one is None or reports is None:
            continue
        if "failed" in reports:
            findings.append(find("exchange.failed", [one["host"]], who=who(one), why=reports["failed"]))
        elif "done" not in reports:
            findings.append(find("exchange.hangs", [one["host"]], who=who(one), seconds=deadline_s))
        else:
            hashes[one["rank"]] = reports["hash"]
    if findings or not hashes:
        return findings[:4]
    first = results[min(hashes)] or {}
    for rank, value in enumerate(first["slots"]):
        one = facts[rank]
        if one and value != rank + 1:
            what = {0: "nothing", 2 * (rank + 1): "twice the part"}.get(value, "a changed part")
            findings.append(find("exchange.wrong", [one["host"]], what=what, who=who(one)))
    common = most(list(hashes.values()))
    for rank, value in hashes.items():
        one = facts[rank]
        if one and value != common:
            findings.append(find("exchange.differs", [one["host"]], who=who(one)))
    if not findings and first["content"] is not None:
        findings.append(find("exchange.wrong", what=f"a wrong element, {first['content']},", who="the ranks"))
    return findings


def judge_links(hosts: Sequence[str], links: dict[tuple[str, str], float]) -> list[Finding]:
    """Hosts and links that are slow: `links` has the bandwidth of each measured pair, bit/s.

    A host that is slow with all its partners has a slow card; where it is slow with one, that link is.
    """
    if len(hosts) < 3 or not links:
        return []  # with a single link there is nothing to compare it with
    speeds_of = {host: [speed for pair, speed in links.items() if host in pair] for host in hosts}
    scores = {host: statistics.median(speeds) for host, speeds in speeds_of.items() if speeds}
    median = statistics.median_high(scores.values()) if len(scores) < 4 else statistics.median(scores.values())
    findings, guilty = [], set()
    for host, score in scores.items():
        if score < LINK_WARN * median and max(speeds_of[host]) < LINK_WARN * median:
            name = "links.slow_host" if score < LINK_FAIL * median else "links.slower_host"
            guilty.add(host)
            findings.append(find(name, [host], host=host, speed=score / 1e6, median=median / 1e6))
    for (host, peer), speed in links.items():
        if speed < LINK_FAIL * median and not {host, peer} & guilty:
            places = {"host": host, "peer": peer}
            findings.append(find("links.slow_link", places.values(), **places, speed=speed / 1e6, median=median / 1e6))
    return findings


def judge_gpus(facts: Sequence[Facts | None]) -> list[Finding]:
    """GPUs that report errors, or run slower than they could."""
    findings = []
    for host, ranks in by_host(facts).items():
        if ranks[0]["gpu_problem"]:
            findings.append(find("gpus.unknown", [host], host=host, why=ranks[0]["gpu_problem"]))
        for gpu in ranks[0]["gpus"]:
            place = {"host": host, "index": gpu["index"]}
            reasons = _number(gpu["clocks_event_reasons.active"])
            problems = [words for bit, words in SLOWDOWNS.items() if reasons & bit]
            if errors := _number(gpu["ecc.errors.uncorrected.volatile.total"]):
                problems.append(f"{errors} uncorrected memory errors")
            if problems:
                findings.append(find("gpus.health", [host], **place, what=", ".join(problems)))
            elif reasons & THERMAL:
                findings.append(find("gpus.power", [host], **place, what="software thermal slowdown"))
            width, widest = (_number(gpu[f"pcie.link.width.{end}"]) for end in ("current", "max"))
            if 0 < width < widest:
                what = f"its PCIe link has {width} lanes of {widest}"
                findings.append(find("gpus.power", [host], **place, what=what))
    return findings


def judge_kernel_log(facts: Sequence[Facts | None]) -> list[Finding]:
    """Errors of hardware in the kernel's log."""
    findings, unread = [], []
    for host, ranks in by_host(facts).items():
        lines = ranks[0]["kernel_errors"]
        if lines is None:
            unread.append(host)
        elif lines:
            findings.append(find("kernel.errors", [host], host=host, count=len(lines), line=lines[-1].strip()))
    if unread:
        findings.append(find("kernel.unread", unread, num_hosts=len(unread)))
    return findings


def _number(text: str) -> int:
    """A cell of nvidia-smi's table as a number; what it does not know, "[N/A]" for one, is 0."""
    try:
        return int(text, 0)
    except ValueError:
        return 0
