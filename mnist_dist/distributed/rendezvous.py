"""Where the ranks meet: a store that all of them reach, before there is a group of collectives.

There they compare what they were asked for, and what they run; a rank that differs is named. From here on the watchdog
watches them.
"""

import datetime
import json
import socket
import sys
import time
from collections.abc import Sequence
from typing import NamedTuple

import torch.distributed as dist

from mnist_dist.config.schema import MAY_DIFFER, Config
from mnist_dist.distributed.device import choose_device
from mnist_dist.distributed.launch_env import LaunchEnv
from mnist_dist.distributed.watchdog import Watchdog
from mnist_dist.errors import JobError, RequestError, RunError
from mnist_dist.versions import code_hash, library_versions

TRY_S = 2.0  # for one try to connect
SAY_EVERY_S = 5.0  # what is waited for
HEARING_S = 3.0  # how long rank 0 waits for the others to hear that it is over


class Meeting(NamedTuple):
    """What several ranks have once they have met."""

    store: dist.Store
    watchdog: Watchdog


def meet_ranks(config: Config, env: LaunchEnv) -> Meeting | None:
    """Meet the other ranks, if there are any. Collective. Raises RequestError, RunError.

    It waits in short tries, which a signal can end.
    """
    refusal = ""
    try:
        choose_device(env)
    except RequestError as error:
        if env.world_size == 1:
            raise
        refusal = str(error)  # the others would wait for this rank: it tells them first
    if env.world_size == 1:
        return None
    store = connect_store(env, config.timeout_s, hosting=env.rank == 0 and not env.launcher_hosts_store)
    hosts = meet(store, config, env, refusal)  # collective
    own_store = connect_store(env, config.timeout_s, hosting=False)
    watchdog = Watchdog(own_store, env.rank, hosts, config.timeout_s, hosted_by_rank_0=not env.launcher_hosts_store)
    if missing := await_keys(store, watchdog.keys(), config.timeout_s):
        raise RunError(f"rank {env.rank} on {socket.gethostname()} lost these ranks at once: {', '.join(missing)}")
    watchdog.start()
    return Meeting(store, watchdog)


def connect_store(env: LaunchEnv, timeout_s: float, *, hosting: bool) -> dist.Store:
    """A new connection to the job's store, which rank 0 hosts unless the launcher does.

    Raises RequestError, RunError.
    """
    host, port = env.master()
    me = f"rank {env.rank} on {socket.gethostname()}"
    patience = datetime.timedelta(seconds=timeout_s)
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
            socket.create_connection((host, port), timeout=TRY_S).close()
            return
        except socket.gaierror:
            raise
        except OSError:
            now_s = time.monotonic()
            if now_s - began_s > timeout_s:
                raise
            if now_s - said_s > SAY_EVERY_S:
                said_s = now_s
                print(
                    f"mnist-dist: {waiting}, since {now_s - began_s:.0f} s of at most {timeout_s:g}",
                    file=sys.stderr,
                    flush=True,
                )
            time.sleep(0.1)


def say_waiting(what: str, age_s: float, timeout_s: float) -> None:
    """One line about a wait, on the standard error stream: there is no run directory yet."""
    print(f"mnist-dist: {what}, since {age_s:.0f} s of at most {timeout_s:g}", file=sys.stderr, flush=True)


def meet(store: dist.Store, config: Config, env: LaunchEnv, refusal: str) -> list[str]:
    """Wait for all ranks and compare what they run. Collective. Raises RequestError, RunError, on every rank.

    `refusal` is why this rank cannot take part, or empty. Returns the ranks' hosts.
    """
    request = {key: value for key, value in config.model_dump(mode="json").items() if key not in MAY_DIFFER}
    request |= {"code": code_hash(), **library_versions(), "host": socket.gethostname(), "refusal": refusal}
    store.set(f"here/{env.rank}", json.dumps(request))
    if env.rank > 0:
        try:
            if await_keys(store, ["met"], 2 * config.timeout_s):
                raise RunError(f"rank {env.rank} on {socket.gethostname()} waited in vain for rank 0 to go on")
            answer = json.loads(store.get("met"))
            store.add("told", 1)
        except RuntimeError:
            raise RunError(
                f"rank {env.rank} on {socket.gethostname()} lost rank 0, and its store, while the ranks were joining"
            ) from None
        if code := answer["code"]:
            raise (RequestError if code == RequestError.exit_code else RunError)("rank 0 says it", on_every_rank=True)
        return [str(host) for host in answer["hosts"]]
    keys = [f"here/{rank}" for rank in range(env.world_size)]
    error: JobError | None = None
    hosts: list[str] = []
    missing = await_keys(store, keys, config.timeout_s)
    if missing:
        error = RunError(
            f"of {env.world_size} ranks these did not come within {config.timeout_s:g} s (timeout_s): "
            f"{', '.join(missing)}; look at their logs, and whether their machines reach this one"
        )
    else:
        requests = [json.loads(data) for data in store.multi_get(keys)]
        hosts = [str(request["host"]) for request in requests]
        if sentence := difference(requests):
            error = RequestError(sentence, on_every_rank=True)
    store.set("met", json.dumps({"code": error.exit_code if error else 0, "hosts": hosts}))
    if error:
        deadline_s = time.monotonic() + HEARING_S  # the store may be this process's own: let the others read it
        while store.add("told", 0) < env.world_size - 1 and time.monotonic() < deadline_s:
            time.sleep(0.05)
        raise error
    return hosts


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
                print(
                    f"mnist-dist: {waiting}, since {now_s - began_s:.0f} s of at most {timeout_s:g}",
                    file=sys.stderr,
                    flush=True,
                )
        time.sleep(0.02)
    return []


def difference(requests: Sequence[dict[str, object]]) -> str:
    """Why these ranks cannot train together, in a sentence, or the empty string."""
    first = requests[0]
    for rank, request in enumerate(requests):
        if request["refusal"]:
            return f"rank {rank} on {request['host']}: {request['refusal']}"
    for rank, request in enumerate(requests):
        for key in first | request:
            if key != "host" and request.get(key) != first.get(key):
                return (
                    f"rank {rank} on {request['host']} has {key}={request.get(key)} and rank 0 on {first['host']} has "
                    f"{key}={first.get(key)}; start all ranks with the same request and the same code"
                )
    return ""
