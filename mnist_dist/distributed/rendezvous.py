"""Where the ranks meet: a store that all of them reach, before there is a group of collectives.

There they compare what they were asked for, and what they run; a rank that differs is named. From here on the watchdog
watches them.
"""

import datetime
import functools
import json
import socket
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch.distributed as dist

from mnist_dist.config.schema import MAY_DIFFER, Config
from mnist_dist.distributed.device import choose_device
from mnist_dist.distributed.launch_env import LaunchEnv
from mnist_dist.distributed.preflight import CONNECT_S, group_address, is_loopback, listen, time_lookup, try_peers
from mnist_dist.distributed.watchdog import Watchdog
from mnist_dist.errors import JobError, RankLostError, RequestError, RunError
from mnist_dist.versions import code_hash, library_versions

SAY_EVERY_S = 5.0  # what is waited for
SLOW_LOOKUP_S = 1.0  # of a name: more than that is said
FIRST = "here"  # what the ranks agree on first; whoever does not come then has never been there
HEARING_S = 3.0  # how long rank 0 waits for the others to hear that it is over


class Meeting(NamedTuple):
    """What several ranks have once they have met."""

    store: dist.Store
    watchdog: Watchdog


def meet_ranks(config: Config, env: LaunchEnv) -> Meeting | None:
    """Meet the other ranks, if there are any. Collective. Raises RequestError, RunError.

    It waits in short tries, which a signal can end.
    """
    refusal, address = "", ""
    try:
        choose_device(env)
        if env.world_size > 1:
            address = group_address()
    except RequestError as error:
        if env.world_size == 1:
            raise
        refusal = str(error)  # the others would wait for this rank: it tells them first
    if env.world_size == 1:
        return None
    warn_of_slow_lookup(env.master()[0])
    store = connect_store(env, config.timeout_s, hosting=env.rank == 0 and not env.launcher_hosts_store)
    with listen(address or "127.0.0.1") as listener:
        place = [address, listener.getsockname()[1]]
        request = describe_request(config) | {"host": socket.gethostname(), "refusal": refusal, "address": place}
        requests = agree(store, FIRST, request, refuse_difference, env, config.timeout_s)  # collective
        hosts, addresses = [r["host"] for r in requests], [r["address"] for r in requests]
        failures = try_peers(env.rank, addresses)
        refuse = functools.partial(refuse_unreachable, hosts, addresses)
        agree(store, "reached", failures, refuse, env, config.timeout_s)  # collective
    own_store = connect_store(env, config.timeout_s, hosting=False)
    watchdog = Watchdog(own_store, env.rank, hosts, config.timeout_s, hosted_by_rank_0=not env.launcher_hosts_store)
    if missing := await_keys(store, watchdog.keys(), config.timeout_s):
        raise lost(missing)
    watchdog.start()
    return Meeting(store, watchdog)


def warn_of_slow_lookup(host: str) -> None:
    """Say where a name server makes each connection slow: the store looks the address up, and its name."""
    if (took_s := time_lookup(host)) > SLOW_LOOKUP_S:
        print(
            f"mnist-dist: looking up MASTER_ADDR={host} took {took_s:.0f} s on {socket.gethostname()}; its name server "
            "is slow or does not answer: mend /etc/resolv.conf, or add the hosts to /etc/hosts",
            file=sys.stderr,
            flush=True,
        )


def connect_store(env: LaunchEnv, timeout_s: float, *, hosting: bool) -> dist.Store:
    """A new connection to the job's store, which rank 0 hosts unless the launcher does.

    Raises RequestError, RunError.
    """
    host, port = env.master()
    me = f"rank {env.rank} on {socket.gethostname()}"
    patience = datetime.timedelta(seconds=max(timeout_s, 60))  # a slow name server counts in it
    try:
        if not hosting:
            await_port(host, port, timeout_s, f"{me} waits for rank 0 at {host}:{port}")
        store = dist.TCPStore(host, port, is_master=hosting, timeout=patience, wait_for_workers=False)
    except socket.gaierror as error:
        raise RunError(f"{me} cannot resolve MASTER_ADDR={host}: {error.strerror}") from None
    except (OSError, RuntimeError, ValueError) as error:  # DistNetworkError and DistStoreError among them
        what = f"cannot listen on port {port}" if hosting else f"could not reach rank 0 at {host}:{port}"
        raise RunError(f"{me} {what} within {timeout_s:g} s (timeout_s): {str(error).splitlines()[0]}") from None
    return dist.PrefixStore(env.restart_count, store)


def await_port(host: str, port: int, timeout_s: float, waiting: str) -> None:
    """Wait until something listens there, in short tries that a signal can end, and say so. Raises OSError."""
    began_s = said_s = time.monotonic()
    while True:
        try:
            socket.create_connection((host, port), timeout=CONNECT_S).close()
            return
        except socket.gaierror:
            raise
        except OSError:
            now_s = time.monotonic()
            if now_s - began_s > timeout_s:
                raise
            if now_s - said_s > SAY_EVERY_S:
                said_s = now_s
                say_waiting(waiting, now_s - began_s, timeout_s)
            time.sleep(0.1)


def say_waiting(what: str, age_s: float, timeout_s: float) -> None:
    """One line about a wait, on the standard error stream: there is no run directory yet."""
    print(f"mnist-dist: {what}, since {age_s:.0f} s of at most {timeout_s:g}", file=sys.stderr, flush=True)


def describe_request(config: Config) -> dict[str, object]:
    """What all ranks must have in common: the configuration, but for what may differ, the code, the libraries."""
    request = {key: value for key, value in config.model_dump(mode="json").items() if key not in MAY_DIFFER}
    return request | {"code": code_hash(), **library_versions()}


def agree(
    store: dist.Store,
    name: str,
    mine: Any,
    refuse: Callable[[list[Any]], None],
    env: LaunchEnv,
    timeout_s: float,
) -> list[Any]:
    """Put down a value, wait for all ranks', and let rank 0 refuse to go on. Collective. Raises RequestError, RunError.

    `refuse` raises a JobError, which is raised on every rank then. Returns all ranks' values, in their order.
    """
    keys = [f"{name}/{rank}" for rank in range(env.world_size)]
    store.set(keys[env.rank], json.dumps(mine))
    me = f"rank {env.rank} on {socket.gethostname()}"
    if env.rank > 0:
        try:
            if await_keys(store, [f"{name}/answer"], 2 * timeout_s):
                raise RunError(f"{me} waited in vain for rank 0 to go on")
            code = int(store.get(f"{name}/answer"))
            values = [] if code else [json.loads(data) for data in store.multi_get(keys)]
            store.add(f"{name}/told", 1)
        except RuntimeError:
            raise RankLostError(f"{me} lost rank 0, and its store, while the ranks were joining") from None
        if code:
            raise (RequestError if code == RequestError.exit_code else RunError)("rank 0 says it", on_every_rank=True)
        return values
    try:
        if missing := await_keys(store, keys, timeout_s):
            if name != FIRST:
                raise lost(missing)
            raise RunError(
                f"of {env.world_size} ranks these did not come within {timeout_s:g} s (timeout_s): "
                f"{', '.join(missing)}; look at their logs, and whether their machines reach this one"
            )
        values = [json.loads(data) for data in store.multi_get(keys)]
        refuse(values)
    except JobError as error:
        store.set(f"{name}/answer", str(error.exit_code))
        deadline_s = time.monotonic() + HEARING_S  # the store may be this process's own: let the others read it
        while store.add(f"{name}/told", 0) < env.world_size - 1 and time.monotonic() < deadline_s:
            time.sleep(0.05)
        raise
    store.set(f"{name}/answer", "0")
    return values


def lost(ranks: list[str]) -> RankLostError:
    """The error of the ranks that came, and then went."""
    return RankLostError(f"these ranks were lost while the ranks were joining: {', '.join(ranks)}; look at their logs")


def await_keys(store: dist.Store, keys: list[str], timeout_s: float) -> list[str]:
    """Wait for all keys, in short tries that a signal can end, and say what is waited for.

    Returns the last words of the first 64 that did not come. Raises RuntimeError where the store is gone.
    """
    began_s = said_s = time.monotonic()
    while not store.check(keys):
        now_s = time.monotonic()
        late = now_s - began_s > timeout_s
        if late or now_s - said_s > SAY_EVERY_S:
            said_s = now_s
            missing = [key.rpartition("/")[2] for key in keys if not store.check([key])][:64]
            if late:
                return missing
            if len(keys) > 1:
                waiting = f"waiting for rank{'s' * (len(missing) > 1)} {', '.join(missing)} of {len(keys)}"
                say_waiting(waiting, now_s - began_s, timeout_s)
        time.sleep(0.02)
    return []


def refuse_difference(requests: Sequence[dict[str, Any]]) -> None:
    """Raises RequestError where these ranks cannot train together, and names the first that differs."""
    first, num_hosts = requests[0], len({request["host"] for request in requests})
    for rank, request in enumerate(requests):
        if request["refusal"]:
            raise RequestError(f"rank {rank} on {request['host']}: {request['refusal']}", on_every_rank=True)
    for rank, request in enumerate(requests):
        for key in first | request:
            if key not in ("host", "address") and request.get(key) != first.get(key):
                raise RequestError(
                    f"rank {rank} on {request['host']} has {key}={request.get(key)} and rank 0 on {first['host']} has "
                    f"{key}={first.get(key)}; start all ranks with the same request and the same code",
                    on_every_rank=True,
                )
    for rank, request in enumerate(requests):
        if num_hosts > 1 and is_loopback(request["address"][0]):
            raise RunError(
                f"rank {rank} on {request['host']}: the host's own name leads to {request['address'][0]}, where no "
                "other host can reach it; mend DNS or /etc/hosts, or set GLOO_SOCKET_IFNAME to an interface that the "
                "others reach",
                on_every_rank=True,
            )


def refuse_unreachable(
    hosts: Sequence[str], addresses: Sequence[tuple[str, int]], failures: Sequence[Sequence[tuple[int, str]]]
) -> None:
    """Raises RunError where a rank could not connect to another, and says why; `failures` are those of each rank."""
    for rank, failed in enumerate(failures):
        for peer, why in failed:
            address, port = addresses[peer]
            raise RunError(
                f"rank {rank} on {hosts[rank]} cannot connect to rank {peer} on {hosts[peer]} at {address}:{port} "
                f"({why}); ranks need each other's ports, all of them and not MASTER_PORT alone: open the firewall "
                "between these hosts, or set GLOO_SOCKET_IFNAME to an interface that they share; `mnist-dist doctor` "
                "says more",
                on_every_rank=True,
            )
