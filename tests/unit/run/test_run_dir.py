"""The run directory: each start has its own, one process at a time is in it, and runs/latest is the latest."""

import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from mnist_dist.errors import RequestError, StorageError
from mnist_dist.files import write_json
from mnist_dist.run import run_dir as module
from mnist_dist.run.run_dir import LATEST, Lock, RunDir, create
from tests.conftest import REPOSITORY, clean_environment


def python(code: str, *arguments: object, **options: object) -> subprocess.Popen[str]:
    """Another process with this package."""
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        env=clean_environment(PYTHONPATH=str(REPOSITORY)),
        stdout=subprocess.PIPE,
        text=True,
        **options,  # type: ignore[call-overload]
    )


def test_a_run_directory_is_named_after_recipe_and_time(cwd: Path) -> None:
    path = create("cnn").path
    assert re.fullmatch(r"runs/cnn-\d{8}-\d{6}", str(path))
    assert list(path.iterdir()) == []
    assert list(Path("runs").iterdir()) == [path]


def test_starts_in_the_same_second_have_directories_of_their_own(cwd: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.time, "strftime", lambda _: "20250102-030405")
    created = []
    for name in ("cnn-20250102-030405", "cnn-20250102-030405-2", "cnn-20250102-030405-3"):
        created.append(create("cnn").path)
        assert created[-1] == Path("runs", name)
    assert create("mlp").path == Path("runs/mlp-20250102-030405")


def test_processes_that_start_at_once_have_directories_of_their_own(cwd: Path) -> None:
    code = "from mnist_dist.run.run_dir import create\nfor _ in range(20): print(create('cnn'))"
    processes = [python(code, cwd=cwd) for _ in range(4)]
    created = [line for process in processes for line in process.communicate()[0].splitlines()]
    assert [process.returncode for process in processes] == [0] * 4
    assert len(created) == len(set(created)) == 80
    assert len(list(Path("runs").iterdir())) == 80  # nothing else is left over


def test_every_path_lies_in_the_run_directory(tmp_path: Path) -> None:
    run_dir = RunDir(tmp_path)
    assert str(run_dir) == str(run_dir.path) == str(tmp_path)
    paths = {name: path for name, path in vars(run_dir).items() if name != "path"}
    assert {name: path.name for name, path in paths.items()} == {
        "config": "config.yaml",
        "versions": "versions.json",
        "metrics": "metrics.jsonl",
        "console": "console.log",
        "checkpoints": "checkpoints",
        "lock": "lock",
        "stop": "STOP",
        "done": "DONE",
        "report": "report.html",
    }
    assert {path.parent for path in paths.values()} == {tmp_path}
    assert list(tmp_path.iterdir()) == []  # to name a run makes nothing


def test_latest_points_to_the_latest_run_in_runs(cwd: Path) -> None:
    Path("runs").mkdir()
    Path(f"runs/.latest-{os.getpid()}").symlink_to("gone")  # a crash's; in containers process ids come again
    for run_dir in (create("cnn"), RunDir(cwd / "runs/absolute")):
        assert run_dir.make_latest() == ""
        assert str(LATEST.readlink()) == run_dir.path.name  # relative, so that the folder can be moved
    for elsewhere in (Path("run"), Path("runs/sweep/0"), Path("other/runs/x"), Path("runs/latest")):
        assert RunDir(elsewhere).make_latest() == ""
        assert str(LATEST.readlink()) == "absolute"


@pytest.mark.parametrize("absolute", [False, True])
def test_latest_stands_for_the_run_that_it_points_to_now(absolute: bool, cwd: Path) -> None:
    first, second = create("first"), create("second")
    first.make_latest()
    found = RunDir(cwd / LATEST if absolute else LATEST)
    second.make_latest()  # another run starts
    assert found.path.absolute() == first.path.absolute()
    assert found.done.absolute() == first.done.absolute()
    assert found.make_latest() == ""
    assert RunDir(LATEST).path == first.path


def test_another_link_stands_for_itself(cwd: Path) -> None:
    Path("scratch").mkdir()
    Path("link").symlink_to("scratch")
    assert RunDir(Path("link")).path == Path("link")
    Path("runs").symlink_to("scratch")
    assert RunDir(Path("runs/latest")).path == Path("runs/latest")  # not there yet


def test_a_folder_called_latest_is_named(cwd: Path) -> None:
    Path("runs/latest").mkdir(parents=True)
    assert create("cnn").make_latest() == "runs/latest still points elsewhere, or is no link: Is a directory"
    assert not list(Path("runs").glob(".latest*"))


@pytest.mark.timeout(5)
@pytest.mark.parametrize("obstacle", ["file", "dangling link", "name too long"])
def test_a_directory_that_cannot_be_made_is_one_sentence(cwd: Path, obstacle: str) -> None:
    if obstacle == "file":
        Path("runs").write_text("")
    elif obstacle == "dangling link":  # to a file system that is not mounted here, say
        Path("runs").symlink_to(cwd / "scratch" / "runs")
    with pytest.raises(StorageError, match=r"^no run directory can be made in /.*/runs: .*; give run_dir=$"):
        create("x" * 300 if obstacle == "name too long" else "cnn")


HOLD = """
import sys, time
from pathlib import Path
from mnist_dist.run.run_dir import Lock, RunDir
lock = Lock(RunDir(Path(sys.argv[1])))
print("locked", flush=True)
time.sleep(600)
"""


def test_a_second_process_is_refused_until_the_first_is_gone_even_by_sigkill(tmp_path: Path) -> None:
    run_dir = RunDir(tmp_path / "deep" / "run")
    with python(HOLD, run_dir) as owner:
        try:
            assert owner.stdout.readline() == "locked\n"  # type: ignore[union-attr]
            for _ in range(2):  # a refusal leaves the owner's name in place
                with pytest.raises(RequestError) as raised:
                    Lock(run_dir)
                assert str(raised.value) == (
                    f"run_dir={run_dir} is in use by pid {owner.pid} on {socket.gethostname()}; "
                    "stop that run or choose another"
                )
        finally:
            owner.kill()
        assert owner.wait() == -signal.SIGKILL
    Lock(run_dir).release()
    assert run_dir.lock.read_text() == f"pid {os.getpid()} on {socket.gethostname()}\n"


def test_a_released_lock_is_free(tmp_path: Path) -> None:
    first = Lock(RunDir(tmp_path))
    with pytest.raises(RequestError, match=f"in use by pid {os.getpid()} on"):
        Lock(RunDir(tmp_path))
    first.release()
    Lock(RunDir(tmp_path)).release()


def test_two_run_directories_have_two_locks(tmp_path: Path) -> None:
    first, second = Lock(RunDir(tmp_path / "a")), Lock(RunDir(tmp_path / "b"))
    first.release()
    second.release()


def test_a_started_process_does_not_inherit_the_lock(tmp_path: Path) -> None:
    lock = Lock(RunDir(tmp_path))
    with subprocess.Popen(["sleep", "600"], close_fds=False) as child:
        try:
            lock.release()
            Lock(RunDir(tmp_path)).release()
        finally:
            child.kill()


@pytest.mark.parametrize("name", ["file", "file/run"])
def test_a_run_directory_that_cannot_be_is_one_sentence(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match=r"^run_dir=/\S+ cannot be written: [A-Z][a-z ]+; choose another$"):
        Lock(RunDir(tmp_path / name))


def test_a_lock_on_a_full_disk_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "lock").symlink_to("/dev/full")
    with pytest.raises(StorageError, match=f"^run_dir={tmp_path} cannot be written: .*; choose another$"):
        Lock(RunDir(tmp_path))


def test_done_step_is_what_was_written(tmp_path: Path) -> None:
    run_dir = RunDir(tmp_path)
    assert run_dir.done_step() is None
    write_json(run_dir.done, {"step": 938, "accuracy": 0.99})
    assert run_dir.done_step() == 938


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", "null", '{"step": null}', '{"step": "many"}', "\udcff"])
def test_a_damaged_done_is_none(tmp_path: Path, content: str) -> None:
    run_dir = RunDir(tmp_path)
    run_dir.done.write_text(content, errors="surrogateescape")
    assert run_dir.done_step() is None
