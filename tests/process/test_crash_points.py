"""A crash at any system call of a save leaves a directory from which the run goes on exactly.

A real process works on a run's checkpoints; strace kills it just before its first file-system call, in the next process
before the second, and so on until one comes through. After each crash `newest` must give exactly the checkpoint from
before or exactly the new one, and a start of the run from there must end with the undisturbed run's weights, bit for
bit. What a power cut may lose beside that, what was not synced yet, is read off the order of the calls.
"""

import contextlib
import ctypes
import functools
import os
import re
import resource
import shutil
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load

from mnist_dist.files import write_json
from mnist_dist.run import checkpoint
from mnist_dist.run.checkpoint import MANIFEST, MODEL, TRAINING
from mnist_dist.run.run_dir import RunDir
from mnist_dist.run.weights import read_about
from tests.conftest import (
    Result,
    become,
    losses,
    metrics,
    run_ranks,
    skip,
    start_ranks,
    start_verb,
    wait_for,
    wait_ranks,
)

# Four steps an epoch, a checkpoint after each.
RUN = ["dataset=synthetic", "precision=fp32", "threads=1", "log_every_steps=1", "run_dir=run", "model=mlp"]
RUN += ["batch_size=250", "epochs=3"]
FIRST, SECOND, LAST = 4, 8, 12
NAMES = {step: f"step-{step:08d}" for step in (FIRST, SECOND, LAST)}

# What changes a file system, and what may report that an earlier change failed. A "?" is for machines without the call.
CALLS = (
    "?open,openat,?creat,write,writev,pwrite64,ftruncate,?truncate,fsync,fdatasync,close,?mkdir,mkdirat,?rename,"
    "?renameat,renameat2,?unlink,unlinkat,?rmdir,?link,linkat,?symlink,symlinkat"
)
PR_SET_PTRACER, ANY = 0x59616D61, -1
FAILED = 28  # the exit code of a process whose save raised OSError

Work = Callable[[Path], Iterator[None]]  # on a run directory; it yields once, when it is prepared


@pytest.fixture(scope="module")
def straight(data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An undisturbed run that kept all of its checkpoints."""
    folder = tmp_path_factory.mktemp("straight")
    result = run_ranks([*RUN, f"data_dir={data_dir}", "keep=10"], folder)
    assert result.code == 0, result.output
    return folder / "run"


def save(step: int, source: Path, run_dir: Path) -> Iterator[None]:
    """Save what the undisturbed run had at a step, and keep only that."""
    found = checkpoint.read(source / "checkpoints" / NAMES[step])
    weights, training = load(found.model), checkpoint.parse_training(found.training, source)
    about = read_about(found.path / MODEL)
    checkpoint.save(run_dir.with_name("rehearsal"), step, weights, training, 1, about)  # so that all is imported
    yield
    checkpoint.save(run_dir / "checkpoints", step, weights, training, 1, about)


def look(run_dir: Path) -> Iterator[None]:
    """What a start does before it trains."""
    yield
    checkpoint.check_writable(run_dir / "checkpoints")
    checkpoint.sweep(run_dir / "checkpoints")
    checkpoint.newest(run_dir / "checkpoints", lambda _: None)


def finish(run_dir: Path) -> Iterator[None]:
    """Replace a small file."""
    yield
    write_json(run_dir / "DONE", {"step": LAST})


def _speak_into(log: Path) -> None:
    """Have what this process prints, a traceback at best, in a file."""
    for stream in (1, 2):
        os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)


def _behind_the_gate(work: Work, run_dir: Path, _arguments: object, _folder: Path, log: Path, _: object) -> None:
    """In a process of its own: prepare, wait until somebody traces this process, and do the work."""
    _speak_into(log)
    ctypes.CDLL(None).prctl(PR_SET_PTRACER, ANY, 0, 0, 0)  # where only a parent may trace
    steps = work(run_dir)
    next(steps)
    gate = run_dir.with_name("gate")
    run_dir.with_name("ready").touch()
    while not gate.exists():
        time.sleep(0.002)
    with contextlib.suppress(StopIteration):
        next(steps)
    os._exit(0)


def traced(work: Work, run_dir: Path, *options: str) -> tuple[int, list[str]]:
    """Do work on a run directory in a process under strace. Returns its exit code and its calls."""
    if not shutil.which("strace"):
        skip("strace", "strace is not installed")
    log, trace = run_dir.with_name("output.txt"), run_dir.with_name("trace")
    process = start_verb([], log, functools.partial(_behind_the_gate, work, run_dir))
    wait_for(lambda: run_dir.with_name("ready").exists() or not process.is_alive())
    assert process.is_alive(), log.read_text()
    command = ["strace", "-f", "-y", "-e", f"trace={CALLS}", "-o", str(trace), *options, "-p", str(process.pid)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as strace:
        assert strace.stderr
        said = strace.stderr.readline()
        if "attached" not in said:
            process.kill()
            process.join()
            skip("strace", f"strace cannot trace here: {said.strip()}")
        run_dir.with_name("gate").touch()
        result = wait_ranks([process], log)
        strace.communicate(timeout=60)
    lines = [line.split(maxsplit=1)[1] for line in trace.read_text().splitlines()]
    return result.code, [line for line in lines if not line.startswith(("+++", "---"))]


def name_of(call: str) -> str:
    return call.split("(", 1)[0]


def faults(work: Work, before: Path, folder: Path, fault: str) -> Iterator[tuple[Path, int, list[str]]]:
    """Do a fault at each call of a work in turn. Yields the run directory, the exit code and the calls up to that."""
    shutil.copytree(before, folder / "calm/run")
    code, calls = traced(work, folder / "calm/run")
    assert code == 0
    names = [name_of(call) for call in calls]
    for number, name in enumerate(names):
        run_dir = folder / f"{fault}-{number}/run"
        shutil.copytree(before, run_dir)
        occurrence = names[: number + 1].count(name)  # strace counts the calls of each name for themselves
        code, done = traced(work, run_dir, f"--inject={name}:{fault}:when={occurrence}")
        assert [name_of(call) for call in done[: number + 1]] == names[: number + 1]
        yield run_dir, code, done


def crashes(work: Work, before: Path, folder: Path) -> Iterator[tuple[Path, str]]:
    """Crash before each call of a work in turn. Yields the run directory and the call that did not happen any more."""
    for run_dir, code, calls in faults(work, before, folder, "signal=KILL"):
        assert code == -signal.SIGKILL
        assert re.search(r"= \?$", calls[-1]), calls[-1]  # it was killed before this call did anything
        yield run_dir, calls[-1]


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def outcome(run_dir: Path) -> str:
    """What a start finds: the checkpoints, which are whole or not of those names, and the names of all leftovers."""
    return " ".join(sorted(str(path.relative_to(run_dir)) for path in run_dir.rglob("*")))


def go_on(outcomes: dict[str, Path], straight: Path, data_dir: Path) -> None:
    """Start the run again in each of the directories, and compare its end with the undisturbed run's."""
    cases = [run_dir.parent for run_dir in outcomes.values()]
    while cases:
        batch = [cases.pop() for _ in range(min(4, len(cases)))]
        started = [start_ranks([*RUN, f"data_dir={data_dir}"], case / "log.txt") for case in batch]
        for case, processes in zip(batch, started, strict=True):
            check_end(wait_ranks(processes, case / "log.txt"), case / "run", straight)


def check_end(result: Result, run_dir: Path, straight: Path) -> None:
    assert result.code == 0, result.output
    assert "Traceback" not in result.output
    last = run_dir / "checkpoints" / NAMES[LAST]
    assert (last / MODEL).read_bytes() == (straight / "checkpoints" / NAMES[LAST] / MODEL).read_bytes()
    assert losses(run_dir) == losses(straight)
    assert RunDir(run_dir).done_step() == LAST
    assert not list((run_dir / "checkpoints").glob(".tmp-*"))


def copied(straight: Path, folder: Path, *steps: int) -> Path:
    """The run directory as it was when just these checkpoints were there."""
    run_dir = folder / "run"
    shutil.copytree(straight, run_dir, ignore=shutil.ignore_patterns("step-*", "DONE"))
    for step in steps:
        shutil.copytree(straight / "checkpoints" / NAMES[step], run_dir / "checkpoints" / NAMES[step])
    return run_dir


@pytest.mark.parametrize(("first", "second"), [(None, FIRST), (FIRST, SECOND)], ids=["first", "second"])
def test_a_crash_at_any_call_of_a_save(
    first: int | None, second: int, straight: Path, data_dir: Path, tmp_path: Path
) -> None:
    before = copied(straight, tmp_path / "before", *([first] if first else []))
    work = functools.partial(save, second, straight)
    originals = {step: content(straight / "checkpoints" / NAMES[step]) for step in (FIRST, SECOND)}
    outcomes: dict[str, Path] = {}
    seen, calls = [], []
    for run_dir, call in crashes(work, before, tmp_path):
        calls.append(call)
        found = checkpoint.newest(run_dir / "checkpoints", pytest.fail)
        seen.append(found.step if found else None)
        if found:
            whole = content(found.path)
            assert (whole[MODEL], whole[TRAINING]) == (originals[found.step][MODEL], originals[found.step][TRAINING])
        outcomes.setdefault(outcome(run_dir), run_dir)
    assert set(seen) == {first, second}
    # From the one call on that renames it into place, it is the new one for good.
    renamed = next(i for i, call in enumerate(calls) if call.startswith("rename") and f"/{NAMES[second]}" in call)
    assert seen == [first] * (renamed + 1) + [second] * (len(seen) - renamed - 1)
    print(f"{len(calls)} crash points, {len(outcomes)} different directories")
    go_on(outcomes, straight, data_dir)


@pytest.mark.parametrize("name", [MODEL, TRAINING, MANIFEST])
def test_a_crash_in_the_middle_of_a_write(name: str, straight: Path, data_dir: Path, tmp_path: Path) -> None:
    """The kernel takes a part of what is written, and the process dies before the rest."""
    whole = content(straight / "checkpoints" / NAMES[SECOND])
    outcomes = {}
    for num_bytes in (1, len(whole[name]) // 2, len(whole[name]) - 1):
        run_dir = copied(straight, tmp_path / str(num_bytes), FIRST)
        log = run_dir.with_name("output.txt")
        process = start_verb([], log, functools.partial(_torn_save, name, num_bytes, straight, run_dir))
        assert wait_ranks([process], log).code == -signal.SIGXFSZ
        torn = content(run_dir / "checkpoints" / f".tmp-{NAMES[SECOND]}")
        assert torn[name] == whole[name][:num_bytes]
        found = checkpoint.newest(run_dir / "checkpoints", pytest.fail)
        assert found
        assert found.step == FIRST
        outcomes[str(num_bytes)] = run_dir
    go_on(outcomes, straight, data_dir)


def save_or_fail(source: Path, run_dir: Path) -> Iterator[None]:
    try:
        yield from save(SECOND, source, run_dir)
    except OSError:
        os._exit(FAILED)


def test_an_error_at_any_call_of_a_save(straight: Path, tmp_path: Path) -> None:
    """The call fails and the process goes on: it hears of it, unless only tidying up failed, and nothing is lost."""
    before = copied(straight, tmp_path / "before", FIRST)
    work = functools.partial(save_or_fail, straight)
    counts: Counter[tuple[int, int]] = Counter()
    for run_dir, code, calls in faults(work, before, tmp_path, "error=EIO"):
        assert sum("(INJECTED)" in call for call in calls) == 1
        assert code in (0, FAILED), run_dir.with_name("output.txt").read_text()
        found = checkpoint.newest(run_dir / "checkpoints", pytest.fail)
        assert found
        assert found.training == checkpoint.read(straight / "checkpoints" / NAMES[found.step]).training
        assert found.step == SECOND or code == FAILED
        counts[code, found.step] += 1
    print(f"{counts.total()} calls: {dict(counts)}")
    assert counts[FAILED, FIRST] > 10
    assert counts[FAILED, SECOND] == 3  # the new one is there, but the folder could not be synced


def _torn_save(
    name: str, num_bytes: int, source: Path, run_dir: Path, _a: object, _f: Path, log: Path, *_: Any
) -> None:
    """In a process of its own: a save that is killed when it has written so many bytes of one of the files."""
    _speak_into(log)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)  # Python ignores it
    write_synced = checkpoint.write_synced

    def tear(path: Path, data: bytes) -> None:
        if path.name == name and run_dir in path.parents:
            resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, num_bytes))
        write_synced(path, data)

    checkpoint.write_synced = tear
    for _step in save(SECOND, source, run_dir):
        pass
    os._exit(0)


def test_a_crash_while_a_start_tidies_up(straight: Path, data_dir: Path, tmp_path: Path) -> None:
    """Half a checkpoint to sweep, and a damaged one to set aside."""
    before = copied(straight, tmp_path / "before", FIRST, SECOND)
    (before / "checkpoints" / NAMES[SECOND] / TRAINING).write_bytes(b"damaged")
    shutil.copytree(straight / "checkpoints" / NAMES[LAST], before / "checkpoints" / f".tmp-{NAMES[LAST]}")
    damaged = content(before / "checkpoints" / NAMES[SECOND])
    good = content(before / "checkpoints" / NAMES[FIRST])
    outcomes: dict[str, Path] = {}
    num_crashes = 0
    for run_dir, _ in crashes(look, before, tmp_path):
        outcomes.setdefault(outcome(run_dir), run_dir)
        num_crashes += 1
        copy = run_dir.with_name("copy")  # for this one must stay as the crash left it
        shutil.copytree(run_dir, copy)
        found = checkpoint.newest(copy / "checkpoints", lambda _: None)
        assert found
        assert found.step == FIRST
        assert content(found.path) == good
        assert content(copy / "checkpoints" / f"damaged-{NAMES[SECOND]}") == damaged
    print(f"{num_crashes} crash points, {len(outcomes)} different directories")
    go_on(outcomes, straight, data_dir)


def test_a_crash_at_any_call_that_replaces_a_small_file(straight: Path, tmp_path: Path) -> None:
    before = copied(straight, tmp_path / "before", LAST)
    write_json(before / "DONE", {"step": FIRST})
    old = (before / "DONE").read_bytes()
    steps = []
    for run_dir, _ in crashes(finish, before, tmp_path):
        steps.append(RunDir(run_dir).done_step())
        assert steps[-1] == LAST or (run_dir / "DONE").read_bytes() == old
    assert set(steps) == {FIRST} or set(steps) == {FIRST, LAST}
    assert steps == sorted(steps)  # type: ignore[type-var]


def _die_at_done(moment: str, *arguments: object) -> None:
    """Be a run that dies when it is about to say, or has just said, that it is done."""
    replace = os.replace

    def die(source: Path, target: Path) -> None:
        if Path(target).name == "DONE" and moment == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        replace(source, target)
        if Path(target).name == "DONE":
            os.kill(os.getpid(), signal.SIGKILL)

    os.replace = die  # type: ignore[assignment]
    become(*arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize("moment", ["before", "after"])
def test_a_crash_between_the_last_checkpoint_and_the_end(
    moment: str, straight: Path, data_dir: Path, tmp_path: Path
) -> None:
    arguments, log = [*RUN, f"data_dir={data_dir}"], tmp_path / "output.txt"
    assert wait_ranks(start_ranks(arguments, log, target=functools.partial(_die_at_done, moment)), log).code == -9
    assert (RunDir(tmp_path / "run").done_step() == LAST) == (moment == "after")
    assert metrics(tmp_path / "run", "done")
    result = run_ranks(arguments, tmp_path)
    check_end(result, tmp_path / "run", straight)
    assert ("nothing to do" in result.output) == (moment == "after")
    accuracies = {record["accuracy"] for record in metrics(tmp_path / "run", "done")}
    assert accuracies == {metrics(straight, "done")[0]["accuracy"]}


# --- what a power cut may lose ---


def replay(calls: list[str]) -> Iterator[tuple[str, list[str], set[str]]]:
    """Each call's name and paths, and which files and folders had changes before it that were not synced."""
    unsynced: set[str] = set()
    for line in calls:
        name, arguments = line.split("(", 1)
        paths = re.findall(r'"(/[^"]*)"|<(/[^>]*)>', arguments)
        named = [path or descriptor for path, descriptor in paths]
        yield name, named, set(unsynced)
        if " = -1" in line or not named:
            continue
        parents = {str(Path(path).parent) for path in named}
        if name in ("write", "pwrite64", "writev", "ftruncate"):
            unsynced.add(named[0])
        elif name in ("fsync", "fdatasync"):
            unsynced.discard(named[0])
        elif name.startswith(("mkdir", "rename", "unlink", "rmdir")) or "O_CREAT" in arguments:
            unsynced |= parents
    assert calls


def calls_of(work: Work, run_dir: Path) -> list[tuple[str, list[str], set[str]]]:
    code, calls = traced(work, run_dir)
    assert code == 0
    return list(replay(calls))


def test_a_checkpoint_is_on_the_disk_before_it_has_its_name_and_before_the_last_one_goes(
    straight: Path, tmp_path: Path
) -> None:
    run_dir = copied(straight, tmp_path, FIRST)
    folder = str(run_dir / "checkpoints")
    calls = calls_of(functools.partial(save, SECOND, straight), run_dir)
    renames = [(paths, unsynced) for name, paths, unsynced in calls if name.startswith("rename")]
    temporary = f"{folder}/.tmp-{NAMES[SECOND]}"
    assert [paths for paths, _ in renames] == [
        [temporary, f"{folder}/{NAMES[SECOND]}"],
        [f"{folder}/{NAMES[FIRST]}", f"{folder}/.tmp-{NAMES[FIRST]}"],
    ]
    written = {paths[0] for name, paths, _ in calls if name == "write"}
    assert written == {f"{temporary}/{name}" for name in (MODEL, TRAINING, MANIFEST)}
    assert not {path for path in renames[0][1] if path.startswith(temporary)}
    assert folder not in renames[1][1]
    removals = [paths[0] for name, paths, _ in calls if name.startswith(("unlink", "rmdir"))]
    assert removals
    assert all(f".tmp-{NAMES[FIRST]}" in path or "/" not in path for path in removals)


def test_a_small_file_is_on_the_disk_before_it_has_its_name(straight: Path, tmp_path: Path) -> None:
    run_dir = copied(straight, tmp_path, LAST)
    ((paths, unsynced),) = [
        (paths, unsynced) for name, paths, unsynced in calls_of(finish, run_dir) if name.startswith("rename")
    ]
    assert paths[1] == str(run_dir / "DONE")
    assert paths[0] not in unsynced
