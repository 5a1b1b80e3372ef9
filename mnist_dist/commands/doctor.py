"""The verb `doctor`: can this set-up train at all? Under any launcher, with all ranks, in seconds.

Each rank gathers facts and tries things, each within a deadline; rank 0 judges them and speaks. What may hang is done
in a child process. Whatever is broken, all ranks end, and the verdict names what was found.
"""

import argparse
import contextlib
import functools
import os
import sys
import time
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist
from rich.console import Console

from mnist_dist.checks import compute, judge, network, storage
from mnist_dist.checks.board import Board, RankZeroLostError
from mnist_dist.checks.facts import describe_place, gather_facts
from mnist_dist.checks.findings import CHECKS, Finding, Status, find, worst
from mnist_dist.checks.guard import Guarded, run_guarded
from mnist_dist.checks.rows import (
    count_ranks,
    print_findings,
    print_row,
    print_verdict,
    sort_findings,
    write_json_verdict,
)
from mnist_dist.config.schema import Config
from mnist_dist.distributed.launch_env import LaunchEnv
from mnist_dist.distributed.preflight import choose_peers
from mnist_dist.distributed.rendezvous import connect_store
from mnist_dist.errors import RunError
from mnist_dist.run.run_dir import RUNS

JOIN_S = 30.0  # in which all ranks must have come: they import torch, from a slow file server perhaps
ANSWER_S = 6.0  # for what takes a moment
STORAGE_S = 6.0  # for a file server
DATA_S = 12.0  # for reading a dataset
DEVICE_S = 20.0  # for a device, its start included
EXCHANGE_S = 15.0  # for a group of collectives, its start included
LEAVE_S = 2.0  # how long rank 0 keeps its store for the others
BETWEEN_HOSTS = ("reachability", "mtu", "clock", "links")


def run(options: argparse.Namespace, config: Config, env: LaunchEnv) -> int:
    """Check the set-up for a request: 0, or 1 where a check failed. Raises RequestError, RunError."""
    began_s = time.monotonic()
    store = None
    if env.world_size > 1:
        store = connect_store(env, JOIN_S, hosting=env.rank == 0 and not env.launcher_hosts_store)
        store = dist.PrefixStore("doctor", store)
    doctor = Doctor(config, env, Board(store, env.rank, env.world_size))
    try:
        doctor.examine()  # collective
        if env.rank == 0:  # before the others leave: a launcher ends the rest where one ends with 1
            doctor.print_result(time.monotonic() - began_s, as_json=options.json)
            sys.stdout.flush()
        codes = doctor.board.gather("verdict", int(worst(doctor.findings) == Status.FAIL), ANSWER_S)
    except RankZeroLostError:
        raise RunError(f"rank 0, at {':'.join(map(str, env.master()))}, does not answer: look at its host") from None
    doctor.board.leave(LEAVE_S if env.rank == 0 else 0)
    return int(codes[0])


class Doctor:
    """One rank's part of the examination, and on rank 0 what was found."""

    def __init__(self, config: Config, env: LaunchEnv, board: Board) -> None:
        """`board` is where the ranks leave their results."""
        self.config, self.env, self.board = config, env, board
        self.findings: list[Finding] = []
        self.facts: list[dict[str, Any] | None] = []  # of each rank; None where it did not come
        self.places: list[dict[str, Any] | None] = []  # the same, of what it told first; on rank 0
        self.hosts: list[str | None] = []  # of each rank
        self.leaders: list[int] = []  # the first rank of each host
        self.devices: list[str] = []
        self.figures: list[str] = []
        self.not_needed: dict[str, str] = {}  # checks, and why

    def examine(self) -> None:
        """All checks, in an order in which each may rely on those before. Collective. Raises RankZeroLostError."""
        responder = network.Responder()
        place = describe_place(self.env) | {"port": responder.port}
        if self.env.world_size > 1 and self.must_stop_at_once(place):  # collective
            return
        mine = place | gather_facts(self.config, self.env)
        self.facts = self.board.gather("facts", mine, JOIN_S)  # collective
        self.hosts = [one["host"] if one else None for one in self.facts]
        self.leaders = network.leaders(self.hosts)
        self.findings += judge.judge_requests(self.facts)
        self.findings += judge.judge_sameness(self.facts)
        self.findings += judge.judge_names(self.facts)
        self.findings += judge.judge_cores(self.facts)
        self.findings += judge.judge_limits(self.facts)
        self.findings += judge.judge_gpus(self.facts)
        self.findings += judge.judge_kernel_log(self.facts)
        if len(self.leaders) > 1:
            if why := self.what_failed("names", "request"):
                self.skip(("reachability", "mtu", "clock"), why)
            else:
                self.examine_network()  # collective
        else:
            self.not_needed |= dict.fromkeys(BETWEEN_HOSTS, "one host")
        if not any(one["gpus"] or one["gpu_problem"] for one in self.facts if one):
            self.not_needed["gpus"] = "no GPU"
        self.examine_run_directory()  # collective
        self.examine_data()  # collective
        if any(finding.name == "request.refused" for finding in self.findings):
            self.skip(("compute", "speed"), "request failed")
        else:
            self.examine_devices()  # collective
        if self.env.world_size == 1:
            self.not_needed |= dict.fromkeys(("exchange", "speed"), "one rank")
        elif why := self.what_failed("names", "reachability", "mtu", "compute", "request"):
            self.skip(("exchange",), why)
        else:
            self.examine_exchange()  # collective
        if len(self.leaders) > 1:
            if why := self.what_failed("names", "reachability", "mtu", "request"):
                self.skip(("links",), why)
            else:
                self.examine_links()  # collective
        self.findings += self.judge_ranks()
        responder.close()

    def must_stop_at_once(self, place: dict[str, Any]) -> bool:
        """Whether large packets get lost between a rank and rank 0: then nothing else would come through. Collective.

        So all that the ranks tell each other before is small.
        """
        if self.env.rank == 0:
            self.board.show("first", place)
        first = self.board.read("first", JOIN_S)
        self.facts = [first]
        place["stalls"] = self.find_stalls(0) if self.env.rank else []
        places = self.board.collect("place", place, JOIN_S)  # collective
        if self.env.rank == 0:
            stalls = [one["stalls"] if one else [] for one in places]
            self.facts = self.places = places
            self.board.show("stalls", any(stalls))
        if not self.board.read("stalls", JOIN_S + ANSWER_S):
            return False
        if self.env.rank == 0:
            self.hosts = [one["host"] if one else None for one in places]
            self.findings += judge.judge_mtu(places, stalls) + self.judge_ranks()
        self.skip([check for check in CHECKS if check not in ("ranks", "mtu")], "mtu failed")
        return True

    def find_stalls(self, peer: int) -> list[tuple[int, int]]:
        """Between this rank and another, the way (sender, receiver) on which large packets get lost, if any."""
        where, rank = self.try_peer(peer, network.find_stall), self.env.rank
        return [(rank, peer) if where == "sending" else (peer, rank)] if where else []

    def skip(self, checks: Sequence[str], why: str) -> None:
        """Note that checks cannot be done."""
        self.findings.append(find("skipped", check=", ".join(checks), why=why))

    def what_failed(self, *checks: str) -> str:
        """Why a check cannot be done, in words, or the empty string. The same on every rank."""
        if self.board.silent:
            return "a rank did not come"
        failed = {f.check for f in self.findings if f.status == Status.FAIL}
        return next((f"{check} failed" for check in checks if check in failed), "")

    def examine_network(self) -> None:
        """Reachability of ranks, large packets and clocks of hosts. Collective."""
        tries, facts = [], self.facts
        for peer in choose_peers(self.env.rank, self.env.world_size):
            other = facts[peer]
            if other and other["address"]:
                why, answering = network.find_ways(other, other["address"])
                if why:
                    tries.append([peer, other["address"], why, answering])
        deadline_s = ANSWER_S + 2 * len(choose_peers(0, self.env.world_size))
        self.findings += judge.judge_reachability(facts, self.board.gather("reachability", tries, deadline_s))
        stalls, clock = [], None
        if self.env.rank in self.leaders:
            blocked = {peer for peer, *_ in tries}
            place = self.leaders.index(self.env.rank)
            peers = [self.leaders[i] for i in choose_peers(place, len(self.leaders))]
            for peer in peers:
                if peer not in blocked:
                    stalls += self.find_stalls(peer)
            if place and 0 not in blocked:
                clock = self.try_peer(0, network.read_clock)
        self.findings += judge.judge_mtu(facts, self.board.gather("mtu", stalls, 2 * ANSWER_S))
        self.findings += judge.judge_clocks(facts, self.board.gather("clock", clock, ANSWER_S))

    def try_peer(self, peer: int, measure: Any) -> Any:
        """Measure something over a connection to a rank; None where there is none."""
        other = self.facts[peer]
        if not other:
            return None
        try:
            with network.connect(other["address"], other["port"]) as connection:
                return measure(connection)
        except OSError:
            return None

    def examine_run_directory(self) -> None:
        """Can rank 0 write there, and do the other hosts see it? Collective."""
        folder, nonce = self.config.run_dir or RUNS, uuid.uuid4().hex
        is_holder, mine, seen = self.env.rank == 0, None, None
        with contextlib.ExitStack() as stack:
            if is_holder:
                holder = stack.enter_context(Guarded(functools.partial(storage.hold_nonce, folder, nonce)))
                mine = holder.collect(STORAGE_S, until="free") | {"nonce": nonce}
            held = self.board.gather("held", mine, STORAGE_S + ANSWER_S)[0]  # collective
            if self.env.rank in self.leaders and not is_holder and "free" in held:
                read = functools.partial(storage.read_nonce, Path(held["path"]), held["nonce"])
                seen = run_guarded(read, STORAGE_S)
            results = self.board.gather("seen", seen, STORAGE_S + ANSWER_S)  # collective
        if is_holder and "path" in held:
            run_guarded(functools.partial(storage.remove_nonce, Path(held["path"])), STORAGE_S)
        parent = str(Path(held["path"]).parent) if "path" in held else str(folder)
        self.findings += judge.judge_run_directory(self.facts, held, results, parent, STORAGE_S)

    def examine_data(self) -> None:
        """Has each host the same dataset? Collective."""
        data = None
        if self.env.rank in self.leaders:
            data = run_guarded(functools.partial(storage.read_data, self.config), DATA_S)
        results = self.board.gather("data", data, DATA_S + ANSWER_S)
        dataset, folder = self.config.dataset, str(self.config.data_dir)
        self.findings += judge.judge_data(self.facts, results, dataset, folder, DATA_S)

    def examine_devices(self) -> None:
        """Does each device compute right, and as fast as the others? Collective."""
        self.board.gather("devices begin", None, ANSWER_S)  # so that all measure at the same time
        reports = run_guarded(functools.partial(compute.check_device, self.env), DEVICE_S)
        results = self.board.gather("devices", reports, DEVICE_S + ANSWER_S)
        self.findings += judge.judge_devices(self.facts, results, DEVICE_S)
        self.devices = sorted({reports["device"] for reports in results if reports and "device" in reports})

    def examine_exchange(self) -> None:
        """Is a sum over the ranks one? Collective."""
        work = functools.partial(compute.check_exchange, self.env)
        reports = run_guarded(work, EXCHANGE_S)
        results = self.board.gather("exchange", reports, EXCHANGE_S + ANSWER_S)
        self.findings += judge.judge_exchange(self.facts, results, EXCHANGE_S)
        self.findings += judge.judge_transport(self.facts, results)

    def examine_links(self) -> None:
        """How fast are the hosts' connections? Collective."""
        links, latencies = {}, []
        for number, pairs in enumerate(network.pair_rounds(len(self.leaders))):
            mine = None
            for first, second in pairs:
                if self.leaders[first] == self.env.rank:
                    mine = self.try_peer(self.leaders[second], network.measure_link)
            results = self.board.gather(f"links {number}", mine, 3 * ANSWER_S)
            for first, second in pairs:
                one, other = self.hosts[self.leaders[first]], self.hosts[self.leaders[second]]
                if (measured := results[self.leaders[first]]) and one and other:
                    latencies.append(measured[0])
                    links[one, other] = measured[1]
        hosts = [host for host in dict.fromkeys(self.hosts) if host]
        self.findings += judge.judge_links(hosts, links)
        if links:
            slowest, fastest = min(links.values()) / 1e6, max(links.values()) / 1e6
            self.figures.append(
                f"links: {slowest:,.0f} to {fastest:,.0f} Mbit/s, {1e3 * min(latencies):.2f} to "
                f"{1e3 * max(latencies):.2f} ms there and back ({len(links)} pairs of hosts, TCP)"
            )

    def judge_ranks(self) -> list[Finding]:
        """Ranks that never came, or stopped answering."""
        absent = [rank for rank, where in self.board.silent.items() if where == "place"]
        findings = []
        if absent:
            host, port = self.env.master()
            words = {"size": self.env.world_size, "seconds": JOIN_S, "ranks": ", ".join(map(str, absent))}
            findings.append(find("ranks.missing", **words, place=f"{host}:{port}", host=host, port=port))
        for rank, where in self.board.silent.items():
            if self.places and (one := self.places[rank]):
                findings.append(find("ranks.silent", [one["host"]], who=judge.who(one), check=where))
        return findings

    def statuses(self) -> dict[str, Status]:
        """How each check ended, but for those that are not needed."""
        return {
            check: worst([f for f in self.findings if check in f.check.split(", ")])
            for check in CHECKS
            if check not in self.not_needed
        }

    def print_result(self, seconds: float, *, as_json: bool) -> None:
        """Print what was found, the guilty first and the verdict last."""
        statuses = self.statuses()
        if as_json:
            details = {"not_needed": self.not_needed, "figures": self.figures, "ranks": self.facts}
            write_json_verdict(statuses, self.findings, seconds, details)
            return
        console = Console(highlight=False, soft_wrap=not sys.stdout.isatty())
        hosts = list(dict.fromkeys(host for host in self.hosts if host))
        names = ", ".join(hosts[:8]) + (" ..." if len(hosts) > 8 else "")
        devices = ", ".join(self.devices) or "no device was tried, or none answered"
        console.print(f"doctor: {count_ranks(self.env.world_size, len(hosts))} ({names}), {devices}", markup=False)
        print_findings(console, self.findings)
        if passed := [check for check, status in statuses.items() if status == Status.PASS]:
            print_row(console, Status.PASS, ", ".join(passed))
        if self.not_needed:
            words = ", ".join(f"{check} ({why})" for check, why in self.not_needed.items())
            console.print(f"      not needed: {words}")
        for figure in self.figures:
            console.print(f"      {figure}")
        print_verdict(console, statuses, seconds)
        console.print(f"next: {self.advise(sort_findings(self.findings), hosts)}", markup=False)

    def advise(self, findings: list[Finding], hosts: list[str]) -> str:
        """What can be done now."""
        failed = [finding for finding in findings if finding.status == Status.FAIL]
        if not failed:
            return "mnist-dist verify, started in the same way, shows whether it trains right"
        guilty = list(dict.fromkeys(host for finding in failed if len(finding.hosts) == 1 for host in finding.hosts))
        healthy = [host for host in hosts if host not in guilty]
        if guilty and healthy and len(hosts) > 1:
            exclude = (
                f"sbatch --exclude={','.join(guilty)} slurm/train.sh ..., or " if "SLURM_JOB_ID" in os.environ else ""
            )
            return f"without {', '.join(guilty)} it can train: {exclude}start it on {', '.join(healthy)} alone"
        return "mend the first row, and run this again"
