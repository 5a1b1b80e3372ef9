"""The run directory: each start has its own, one process at a time is in it, and its small files are whole."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from mnist_dist.errors import RequestError, RunError
from mnist_dist.run import run_dir as rundir
from mnist_dist.run.run_dir import Lock, create, done_step, point_latest, versions, write_atomically, write_json
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
    path = create("cnn")
    assert re.fullmatch(r"runs/cnn-\d{8}-\d{6}", str(path))
    assert list(path.iterdir()) == []
    assert list(Path("runs").iterdir()) == [path]


def test_starts_in_the_same_second_have_directories_of_their_own(cwd: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rundir.time, "strftime", lambda _: "20250102-030405")
    created = []
    for name in ("cnn-20250102-030405", "cnn-20250102-030405-2", "cnn-20250102-030405-3"):
        created.append(create("cnn"))
        assert created[-1] == Path("runs", name)
    assert create("mlp") == Path("runs/mlp-20250102-030405")


def test_processes_that_start_at_once_have_directories_of_their_own(cwd: Path) -> None:
    code = "from mnist_dist.run.run_dir import create\nfor _ in range(20): print(create('cnn'))"
    processes = [python(code, cwd=cwd) for _ in range(4)]
    created = [line for process in processes for line in process.communicate()[0].splitlines()]
    assert [process.returncode for process in processes] == [0] * 4
    assert len(created) == len(set(created)) == 80
    assert len(list(Path("runs").iterdir())) == 80  # nothing else is left over


def test_latest_points_to_the_latest_run_in_runs(cwd: Path) -> None:
    Path("runs").mkdir()
    Path(f"runs/.latest-{os.getpid()}").symlink_to("gone")  # a crash's; in containers process ids come again
    for path in (create("cnn"), cwd / "runs" / "absolute"):
        point_latest(path)
        assert str(Path("runs/latest").readlink()) == path.name  # relative, so that the folder can be moved
    for elsewhere in (Path("run"), Path("runs/sweep/0"), Path("other/runs/x")):
        point_latest(elsewhere)
        assert str(Path("runs/latest").readlink()) == "absolute"


def test_a_folder_called_latest_is_named(cwd: Path) -> None:
    Path("runs/latest").mkdir(parents=True)
    with pytest.raises(OSError, match="runs/latest"):
        point_latest(create("cnn"))
    assert not list(Path("runs").glob(".latest*"))


@pytest.mark.timeout(5)
@pytest.mark.parametrize("obstacle", ["file", "dangling link", "name too long"])
def test_a_directory_that_cannot_be_made_is_one_sentence(cwd: Path, obstacle: str) -> None:
    if obstacle == "file":
        Path("runs").write_text("")
    elif obstacle == "dangling link":  # to a file system that is not mounted here, say
        Path("runs").symlink_to(cwd / "scratch" / "runs")
    with pytest.raises(RunError, match=r"^no run directory can be made in /.*/runs: .*; give run_dir=$"):
        create("x" * 300 if obstacle == "name too long" else "cnn")


HOLD = """
import sys, time
from pathlib import Path
from mnist_dist.run.run_dir import Lock
lock = Lock(Path(sys.argv[1]))
print("locked", flush=True)
time.sleep(600)
"""


def test_a_second_process_is_refused_until_the_first_is_gone_even_by_sigkill(tmp_path: Path) -> None:
    run_dir = tmp_path / "deep" / "run"
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
    assert (run_dir / "lock").read_text() == f"pid {os.getpid()} on {socket.gethostname()}\n"


def test_a_released_lock_is_free(tmp_path: Path) -> None:
    first = Lock(tmp_path)
    with pytest.raises(RequestError, match=f"in use by pid {os.getpid()} on"):
        Lock(tmp_path)
    first.release()
    Lock(tmp_path).release()


def test_two_run_directories_have_two_locks(tmp_path: Path) -> None:
    first, second = Lock(tmp_path / "a"), Lock(tmp_path / "b")
    first.release()
    second.release()


def test_a_started_process_does_not_inherit_the_lock(tmp_path: Path) -> None:
    lock = Lock(tmp_path)
    with subprocess.Popen(["sleep", "600"], close_fds=False) as child:
        try:
            lock.release()
            Lock(tmp_path).release()
        finally:
            child.kill()


@pytest.mark.parametrize("name", ["file", "file/run"])
def test_a_run_directory_that_cannot_be_is_one_sentence(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match=r"^run_dir=/\S+ cannot be written: [A-Z][a-z ]+; choose another$"):
        Lock(tmp_path / name)


def test_done_step_is_what_was_written(tmp_path: Path) -> None:
    assert done_step(tmp_path) is None
    write_json(tmp_path / "DONE", {"step": 938, "accuracy": 0.99})
    assert done_step(tmp_path) == 938


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", "null", '{"step": null}', '{"step": "many"}', "\udcff"])
def test_a_damaged_done_is_none(tmp_path: Path, content: str) -> None:
    (tmp_path / "DONE").write_text(content, errors="surrogateescape")
    assert done_step(tmp_path) is None


def test_a_file_is_replaced_in_one_step(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    write_atomically(path, "old\n")
    with path.open() as reader:
        write_atomically(path, "neü\n")
        assert reader.read() == "old\n"  # who had it open sees all of the old one
    assert path.read_text(encoding="utf-8") == "neü\n"
    assert [p.name for p in tmp_path.iterdir()] == ["config.yaml"]


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_file_that_could_not_be_written_is_as_it_was(
    tmp_path: Path, step: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    path = tmp_path / "DONE"
    write_atomically(path, "old\n")
    monkeypatch.setattr(*((os, "fsync") if step == "fsync" else (Path, "replace")), fail)
    with pytest.raises(OSError, match="No space left"):
        write_atomically(path, "new\n")
    assert path.read_text() == "old\n"
    assert [p.name for p in tmp_path.iterdir()] == ["DONE"]


def test_a_file_is_on_the_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[str, bool]] = []
    fsync = os.fsync

    def record(descriptor: int) -> None:
        content = Path(f"/proc/self/fd/{descriptor}").read_text()
        seen.append((content, (tmp_path / "DONE").exists()))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", record)
    write_json(tmp_path / "DONE", {"step": 1})
    assert seen == [('{\n  "step": 1\n}\n', False)]
    assert json.loads((tmp_path / "DONE").read_text()) == {"step": 1}


def test_versions_name_what_runs_and_nothing_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MNIST_DIST_TEST_TOKEN", "do-not-record-this")
    found = versions()
    assert found.keys() <= {
        *("python", "commit"),
        *("mnist-dist", "torch", "torchvision", "accelerate", "numpy", "pydantic", "safetensors"),
    }
    assert found.keys() >= {"python", "commit", "mnist-dist", "torch", "accelerate"}
    assert found["python"] == ".".join(map(str, sys.version_info[:3]))
    text = json.dumps(found)
    recorded = {value for value in found.values() if value}
    for name, value in os.environ.items():
        assert name not in text or len(name) < 6
        assert value not in recorded or not value


def test_versions_have_the_commit_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    commit = versions()["commit"]
    if (REPOSITORY / ".git").exists():
        assert re.fullmatch(r"[0-9a-f]{12,40}(-dirty)?", commit)
    monkeypatch.setenv("PATH", "")
    assert versions()["commit"] is None
