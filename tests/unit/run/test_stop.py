"""Signals, the STOP file and a dead launcher become one flag, in real processes."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from mnist_dist.run import stop
from tests.conftest import REPOSITORY, clean_environment
from tests.processes import is_alive

# Installs, says so, says the reason when there is one, and lives on until its input ends.
RANK = """
import os, sys, time
from pathlib import Path
from mnist_dist.run import stop
stop.install()
assert "torch" not in sys.modules
print("ready", os.getpid(), flush=True)
while not (reason := stop.reason(Path(sys.argv[1]) if len(sys.argv) > 1 else None)):
    time.sleep(0.01)
print(reason, flush=True)
sys.stdin.read()
print("left in order", flush=True)
"""

# The parent of a rank, whose command line has a launcher's name in it, or has not.
LAUNCHER = """
import subprocess, sys
sys.exit(subprocess.call([sys.executable, "-c", *sys.argv[2:]]))
"""
LAUNCHER_NAMES = ["/usr/bin/torchrun", "torch.distributed.run", "accelerate", "slurmstepd: [12.0]", "/opt/bin/orted"]
OTHER_NAMES = ["run_sorted.sh", "/home/me/accelerate/imported.py", "nohup"]


class Started:
    """A started process, and its rank, which need not be the same one."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        word, self.pid = self.hear().split()
        assert word == "ready"

    def hear(self) -> str:
        """The next line that the rank says, or the empty string where it is gone."""
        return self.process.stdout.readline().removesuffix("\n")  # type: ignore[union-attr]

    def tell(self, line: str = "") -> None:
        """Give the rank a line of input."""
        self.process.stdin.write(f"{line}\n")  # type: ignore[union-attr]
        self.process.stdin.flush()  # type: ignore[union-attr]

    def send(self, number: int) -> None:
        os.kill(int(self.pid), number)

    def end(self) -> int:
        """End the rank's input, check that it still lived, and return its exit code."""
        self.process.stdin.close()  # type: ignore[union-attr]
        assert self.hear() == "left in order"
        return self.process.wait()


@contextmanager
def started(command: list[str], **environment: str) -> Iterator[Started]:
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # these tests themselves may run under nohup
    process = subprocess.Popen(
        command,
        env=clean_environment(PYTHONPATH=str(REPOSITORY), **environment),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    signal.signal(signal.SIGHUP, before)
    rank = None
    try:
        rank = Started(process)
        yield rank
    finally:
        process.kill()
        if rank and int(rank.pid) != process.pid and is_alive(int(rank.pid)):
            rank.send(signal.SIGKILL)
        for stream in (process.stdin, process.stdout):
            stream.close()  # type: ignore[union-attr]
        process.wait()


PYTHON = [sys.executable, "-c", RANK]
STOP_SIGNALS = ["SIGTERM", "SIGINT", "SIGUSR1", "SIGUSR2", "SIGHUP"]


@pytest.mark.parametrize("name", STOP_SIGNALS)
def test_a_signal_is_noted_and_ends_nothing(name: str) -> None:
    with started(PYTHON) as rank:
        rank.send(signal.Signals[name])
        assert rank.hear() == name
        assert rank.end() == 0


def test_the_first_of_several_reasons_is_given(tmp_path: Path) -> None:
    # The process is stopped, so all are there when it looks; the kernel hands over the lower signal number first.
    with started([*PYTHON, str(tmp_path / "STOP")]) as rank:
        rank.send(signal.SIGSTOP)
        (tmp_path / "STOP").touch()
        rank.send(signal.SIGUSR1)
        rank.send(signal.SIGTERM)
        rank.send(signal.SIGCONT)
        assert rank.hear() == "SIGUSR1"
        assert rank.end() == 0


def test_a_stop_file_is_a_reason(tmp_path: Path) -> None:
    with started([*PYTHON, str(tmp_path / "STOP")]) as rank:
        (tmp_path / "STOP").touch()
        assert rank.hear() == "STOP"
        assert rank.end() == 0


def test_a_rank_without_a_run_directory_looks_for_no_stop_file(tmp_path: Path) -> None:
    code = "from mnist_dist.run import stop; stop.install(); print(repr(stop.reason(None)))"
    (tmp_path / "STOP").touch()
    environment = clean_environment(PYTHONPATH=str(REPOSITORY))
    assert subprocess.check_output([sys.executable, "-c", code], cwd=tmp_path, env=environment) == b"''\n"


def test_an_interrupt_that_comes_twice_within_milliseconds_counts_once() -> None:
    with started(PYTHON) as rank:
        for _ in range(3):  # the terminal's own, and those that launchers pass on
            rank.send(signal.SIGINT)
            time.sleep(0.005)
        assert rank.hear() == "SIGINT"
        assert rank.end() == 0


def test_a_second_interrupt_a_second_later_ends_the_process() -> None:
    with started(PYTHON) as rank:
        rank.send(signal.SIGINT)
        assert rank.hear() == "SIGINT"
        time.sleep(1.1)
        rank.send(signal.SIGINT)
        assert rank.hear() == ""
        assert rank.process.wait() != 0


def test_a_second_interrupt_ends_a_process_that_is_stuck_outside_python() -> None:
    # As in a collective whose other ranks are gone: there Python runs no handlers.
    stuck = RANK.replace(
        "sys.stdin.read()",
        "import ctypes; libc = ctypes.CDLL(None); mutex = ctypes.create_string_buffer(64)\n"
        "while True: libc.pthread_mutex_lock(mutex)",
    )
    with started([sys.executable, "-c", stuck]) as rank:
        rank.send(signal.SIGINT)
        assert rank.hear() == "SIGINT"
        time.sleep(1.1)
        rank.send(signal.SIGINT)
        try:
            assert rank.process.wait(timeout=5) != 0
        except subprocess.TimeoutExpired:
            pytest.fail("the process goes on")


def test_other_signals_may_come_again_and_after_an_interrupt() -> None:
    with started(PYTHON) as rank:
        rank.send(signal.SIGTERM)
        rank.send(signal.SIGINT)
        assert rank.hear() in ("SIGTERM", "SIGINT")
        time.sleep(1.1)
        rank.send(signal.SIGTERM)
        rank.send(signal.SIGUSR1)
        time.sleep(0.1)
        assert rank.end() == 0


def test_nohup_stays_in_force() -> None:
    with started(["nohup", *PYTHON]) as rank:
        rank.send(signal.SIGHUP)
        rank.send(signal.SIGTERM)
        assert rank.hear() == "SIGTERM"
        assert rank.end() == 0


@pytest.mark.parametrize("name", ["USR1", "TERM", "INT"])
def test_another_signal_that_was_ignored_at_the_start_is_noted(name: str) -> None:
    # A batch script ignores them so that they do no harm before we are ready.
    with started(["sh", "-c", f"trap '' {name}; exec \"$@\"", "sh", *PYTHON]) as rank:
        rank.send(signal.Signals[f"SIG{name}"])
        assert rank.hear() == f"SIG{name}"
        assert rank.end() == 0


def launched(name: str, code: str = RANK, *arguments: object) -> list[str]:
    """The command of a rank under a launcher of that name."""
    return [sys.executable, "-c", LAUNCHER, name, code, *map(str, arguments)]


@pytest.mark.parametrize("name", LAUNCHER_NAMES)
def test_a_rank_stops_when_its_launcher_is_gone(name: str) -> None:
    with started(launched(name)) as rank:
        rank.process.kill()
        rank.process.wait()
        assert rank.hear() == "the launcher is gone"
        rank.process.stdin.close()  # type: ignore[union-attr]
        assert rank.hear() == "left in order"


@pytest.mark.parametrize("name", OTHER_NAMES)
def test_a_rank_outlives_a_shell_that_started_it(name: str, tmp_path: Path) -> None:
    with started(launched(name, RANK, tmp_path / "STOP")) as rank:
        rank.process.kill()
        rank.process.wait()
        time.sleep(0.2)  # for what must not come
        (tmp_path / "STOP").touch()
        assert rank.hear() == "STOP"
        rank.process.stdin.close()  # type: ignore[union-attr]
        assert rank.hear() == "left in order"


def test_a_launcher_that_goes_while_the_program_is_loading_is_missed_too(tmp_path: Path) -> None:
    # train.py installs before the imports, the verb once more after them.
    loading = RANK.replace("while not", "sys.stdin.readline(); stop.install()\nwhile not", 1)
    (tmp_path / "STOP").touch()  # so that there is a reason at any rate
    with started(launched("torchrun", loading, tmp_path / "STOP")) as rank:
        rank.process.kill()
        rank.process.wait()
        rank.tell()
        assert rank.hear() == "the launcher is gone"


@pytest.mark.parametrize("variable", ["", "RANK", "ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID"])
def test_without_a_launcher_the_parent_may_go(variable: str, tmp_path: Path) -> None:
    # As with `mnist-dist train &` in a shell that is left; what is set in the environment may come from anywhere.
    with started(launched("sh", RANK, tmp_path / "STOP"), **({variable: "0"} if variable else {})) as rank:
        rank.process.kill()
        rank.process.wait()
        time.sleep(0.1)
        (tmp_path / "STOP").touch()
        assert rank.hear() == "STOP"
        rank.process.stdin.close()  # type: ignore[union-attr]
        assert rank.hear() == "left in order"


def run(code: str, *arguments: object, folder: Path) -> list[str]:
    """Run code in another process, and return the lines that it says."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    environment = clean_environment(PYTHONPATH=str(REPOSITORY))
    return subprocess.check_output(command, cwd=folder, env=environment, text=True).splitlines()


def test_signals_are_given_back(tmp_path: Path) -> None:
    code = """
import os, signal, threading
from mnist_dist.run import stop
heard = []
signal.signal(signal.SIGUSR1, lambda *_: heard.append("mine"))
before = [signal.getsignal(number) for number in stop.SIGNALS]
print(stop.install(), stop.install())
os.kill(os.getpid(), signal.SIGUSR1)
print(heard, stop.reason(None))
stop.uninstall()
print([signal.getsignal(number) for number in stop.SIGNALS] == before, repr(stop.reason(None)))
os.kill(os.getpid(), signal.SIGUSR1)
print(heard, signal.set_wakeup_fd(-1))
for thread in threading.enumerate():
    if thread.name == "stop":
        thread.join(60)
print(threading.active_count())
stop.uninstall()
print(stop.install(), repr(stop.reason(None)))
"""
    assert run(code, folder=tmp_path) == [
        "True False",
        "[] SIGUSR1",
        "True ''",
        "['mine'] -1",
        "1",
        "True ''",
    ]


def test_in_a_thread_nothing_is_installed(tmp_path: Path) -> None:
    code = """
import signal, threading
from mnist_dist.run import stop
before = [signal.getsignal(number) for number in stop.SIGNALS]
def work():
    print(stop.install())
    stop.uninstall()
    with stop.interruptible("working"):
        print(repr(stop.reason(None)))
thread = threading.Thread(target=work)
thread.start()
thread.join()
print([signal.getsignal(number) for number in stop.SIGNALS] == before)
"""
    assert run(code, folder=tmp_path) == ["False", "''", "True"]


@pytest.mark.parametrize("when", ["before", "inside"])
def test_where_there_is_nothing_to_save_a_signal_is_heard_at_once(when: str, tmp_path: Path) -> None:
    code = f"""
import os, signal, time
from mnist_dist.errors import StoppedEarlyError
from mnist_dist.run import stop
stop.install()
if {when!r} == "before":
    os.kill(os.getpid(), signal.SIGTERM)
try:
    with stop.interruptible("fetching the dataset"):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(600)
except StoppedEarlyError as error:
    print(error)
    print(error.exit_code)
os.kill(os.getpid(), signal.SIGUSR1)  # only noted again
print(stop.reason(None))
"""
    assert run(code, folder=tmp_path) == [
        "stopped by SIGTERM while fetching the dataset; nothing is lost, start it again",
        "3",
        "SIGTERM",
    ]


def test_what_is_raised_where_signals_are_heard_at_once_passes(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), stop.interruptible("dividing"):
        _ = 1 // 0
    with stop.interruptible("nothing"):
        pass


def test_a_signal_is_heard_where_a_library_makes_another_error_of_it(tmp_path: Path) -> None:
    """As pydantic does of whatever is raised while it calls Python code."""
    code = """
import os, signal, time
from mnist_dist.errors import StoppedEarlyError
from mnist_dist.run import stop
stop.install()
try:
    with stop.interruptible("fetching the dataset"):
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(600)
        except StoppedEarlyError as error:
            raise ValueError(f"a function failed: {error}") from error
except StoppedEarlyError as error:
    print(error)
"""
    assert run(code, folder=tmp_path) == [
        "stopped by SIGTERM while fetching the dataset; nothing is lost, start it again"
    ]


def test_a_stop_file_of_an_earlier_start_is_deleted_and_a_new_one_stays(tmp_path: Path) -> None:
    path = tmp_path / "STOP"
    path.touch()
    stop.remove_stale(path)
    assert path.exists()
    os.utime(path, (1e9, 1e9))
    stop.remove_stale(path)
    assert not path.exists()
    stop.remove_stale(path)
