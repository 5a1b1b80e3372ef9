"""A checkpoint is whole or it is not there, whatever happens to its files; and nothing in it is ever run."""

import hashlib
import io
import json
import os
import pickle
import random
import shutil
import struct
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from mnist_dist.errors import RequestError, StorageError
from mnist_dist.run import checkpoint
from mnist_dist.run.checkpoint import MANIFEST, MODEL, TRAINING, Checkpoint, DamagedError, parse_training
from mnist_dist.run.weights import parse_weights, read_about

FILES = [MODEL, TRAINING, MANIFEST]
OLD, NEW = "step-00000016", "step-00000032"
NUM_DAMAGES = 500


def weights(step: int) -> dict[str, Tensor]:
    return {"conv.weight": torch.full((3, 4), float(step)), "conv.bias": torch.arange(3.0)}


def training(step: int) -> dict[str, Any]:
    moments = {0: {"step": torch.tensor(float(step)), "exp_avg": torch.ones(3, 4)}}
    return {"format": 1, "step": step, "network": weights(step), "optimizer": {"state": moments}, "ema": None}


def save(folder: Path, step: int, keep: int = 10) -> Path:
    return checkpoint.save(folder, step, weights(step), training(step), keep)


def content(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in path.iterdir()}


def forge(path: Path, **contents: bytes) -> None:
    """Change files of a checkpoint and write the manifest that is right for them."""
    for name, data in zip((MODEL, TRAINING), (contents.get("model"), contents.get("training")), strict=True):
        if data is not None:
            (path / name).write_bytes(data)
    files = {}
    for name in (MODEL, TRAINING):
        data = (path / name).read_bytes()
        files[name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    step = int(path.name.removeprefix("step-"))
    (path / MANIFEST).write_text(json.dumps({"format": 1, "step": step, "files": files}))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "checkpoints"


@pytest.fixture
def two(folder: Path) -> Path:
    """A folder with two checkpoints."""
    save(folder, 16)
    save(folder, 32)
    return folder


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("originals") / "checkpoints"
    save(folder, 16)
    save(folder, 32)
    return folder


# --- what is written is what is read ---


def test_what_is_saved_is_read_again(folder: Path) -> None:
    path = save(folder, 16)
    assert path == folder / OLD
    assert sorted(content(path)) == sorted(FILES)
    found = checkpoint.newest(folder, pytest.fail)
    assert found
    assert (found.path, found.step) == (path, 16)
    mine = weights(16)
    for read in (parse_weights(found.model, path / MODEL), parse_training(found.training, path)["network"]):
        assert mine.keys() == read.keys()
        assert all(torch.equal(mine[key], read[key]) for key in mine)
    manifest = json.loads((path / MANIFEST).read_text())
    assert manifest["format"] == 1
    assert manifest["step"] == 16
    for name in (MODEL, TRAINING):
        data = (path / name).read_bytes()
        assert manifest["files"][name] == {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def test_a_file_of_weights_says_what_it_was_trained_on(folder: Path) -> None:
    about = {"model": "mlp", "dataset": "mnist", "step": 16}
    path = checkpoint.save(folder, 16, weights(16), training(16), keep=2, about=about)
    assert read_about(path / MODEL) == about
    assert read_about(save(folder, 32) / MODEL) == {}


def test_the_same_weights_are_the_same_file(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    about = {"model": "mlp", "dataset": "mnist", "step": 16}
    paths = [checkpoint.save(f, 16, weights(16), training(16), 2, about) for f in (folder, tmp_path / "other/c")]
    assert (paths[0] / MODEL).read_bytes() == (paths[1] / MODEL).read_bytes()


def test_an_empty_or_missing_folder_has_none(folder: Path) -> None:
    assert checkpoint.newest(folder, pytest.fail) is None
    folder.mkdir()
    assert checkpoint.newest(folder, pytest.fail) is None


def test_the_newest_is_the_largest_step_in_numbers_not_in_letters(folder: Path) -> None:
    for step in (99_999_999, 100_000_000, 5):
        save(folder, step)
    found = checkpoint.newest(folder, pytest.fail)
    assert found
    assert found.step == 100_000_000


def test_only_the_newest_are_kept(folder: Path) -> None:
    for step in range(1, 8):
        save(folder, step, keep=3)
    assert sorted(path.name for path in folder.iterdir()) == [f"step-{step:08d}" for step in (5, 6, 7)]


def test_a_step_that_has_a_whole_checkpoint_stays_as_it_is(two: Path) -> None:
    before = content(two / NEW)
    inode = (two / NEW).stat().st_ino
    assert checkpoint.save(two, 32, weights(0), training(0), keep=10) == two / NEW
    assert content(two / NEW) == before
    assert (two / NEW).stat().st_ino == inode


@pytest.mark.parametrize("kind", ["damaged", "a link to nothing", "a file"])
def test_a_step_whose_checkpoint_is_damaged_is_saved_anew(kind: str, two: Path) -> None:
    if kind == "damaged":
        (two / NEW / MODEL).write_bytes(b"")
    else:
        shutil.rmtree(two / NEW)
        (two / NEW).symlink_to("nowhere") if kind == "a link to nothing" else (two / NEW).write_text("")
    save(two, 32)
    found = checkpoint.newest(two, pytest.fail)
    assert found
    assert found.step == 32
    assert os.path.lexists(two / f"damaged-{NEW}")


def test_a_checkpoint_is_not_written_where_the_run_directory_has_gone(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        save(tmp_path / "run/checkpoints", 16)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("number", range(1, 6))
def test_a_save_that_fails_loses_nothing(number: int, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(folder, 16)
    before = content(folder / OLD)
    calls, fsync = 0, os.fsync

    def fail(descriptor: int) -> None:
        nonlocal calls
        calls += 1
        if calls == number:
            raise OSError(28, "No space left on device")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="No space left"):
        save(folder, 32, keep=1)
    assert content(folder / OLD) == before
    assert not list(folder.glob(".tmp-*"))
    found = checkpoint.newest(folder, pytest.fail)
    assert found
    assert found.step == (32 if number == 5 else 16)  # the last is after the rename
    save(folder, 32, keep=1)
    assert [path.name for path in folder.iterdir() if path.name != OLD] == [NEW]


def test_an_old_one_that_cannot_be_pruned_is_pruned_after_the_next(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(folder, 16)
    rename = Path.rename

    def refuse(path: Path, target: Path) -> Path:
        if path.name == OLD:
            raise PermissionError(13, "Permission denied", str(path))
        return rename(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", refuse)
        assert save(folder, 32, keep=1) == folder / NEW
    assert sorted(path.name for path in folder.iterdir()) == [OLD, NEW]
    save(folder, 48, keep=1)
    assert [path.name for path in folder.iterdir()] == ["step-00000048"]


# --- what is left over ---


def test_leftovers_of_a_crash_are_swept_and_nothing_else(two: Path) -> None:
    (two / ".tmp-step-00000048").mkdir()
    (two / ".tmp-step-00000048" / MODEL).write_bytes(b"half")
    (two / ".tmp-step-00000064").write_text("a file")
    (two / ".tmp-step-00000080").symlink_to(OLD)
    (two / ".tmp-step-00000096").symlink_to("nowhere")
    (two / "notes.txt").write_text("keep me")
    (two / f"damaged-{OLD}").mkdir()
    before = {name: content(two / name) for name in (OLD, NEW)}
    checkpoint.sweep(two)
    assert sorted(path.name for path in two.iterdir()) == sorted([OLD, NEW, "notes.txt", f"damaged-{OLD}"])
    assert {name: content(two / name) for name in (OLD, NEW)} == before
    checkpoint.sweep(two / "missing")


@pytest.mark.parametrize("kind", ["folder", "file", "link"])
def test_a_leftover_in_the_way_does_not_stop_a_save(kind: str, two: Path) -> None:
    leftover = two / ".tmp-step-00000048"
    if kind == "folder":
        leftover.mkdir()
        (leftover / MODEL).write_bytes(b"half")
    elif kind == "file":
        leftover.write_text("")
    else:
        leftover.symlink_to(OLD)
    save(two, 48)
    found = checkpoint.newest(two, pytest.fail)
    assert found
    assert found.step == 48
    assert (two / OLD / MODEL).exists()


def test_a_checkpoint_that_is_a_link_is_pruned_without_what_it_points_to(two: Path, tmp_path: Path) -> None:
    shutil.move(two / OLD, tmp_path / OLD)
    (two / OLD).symlink_to(tmp_path / OLD)
    save(two, 48, keep=1)
    assert [path.name for path in two.iterdir()] == ["step-00000048"]
    assert sorted(content(tmp_path / OLD)) == sorted(FILES)


def test_a_folder_that_cannot_be_written_is_noticed_before_training(tmp_path: Path) -> None:
    checkpoint.check_writable(tmp_path / "run/checkpoints")
    assert list((tmp_path / "run/checkpoints").iterdir()) == []
    (tmp_path / "file").write_text("")
    with pytest.raises(
        StorageError, match="file/checkpoints cannot be written: Not a directory; choose another run_dir"
    ):
        checkpoint.check_writable(tmp_path / "file/checkpoints")


# --- damage ---


def test_a_damaged_one_is_named_set_aside_and_passed_over(two: Path) -> None:
    said: list[str] = []
    (two / NEW / TRAINING).write_bytes(b"garbage")
    damaged = content(two / NEW)
    found = checkpoint.newest(two, said.append)
    assert found
    assert found.step == 16
    assert said == [
        f"WARNING: checkpoint {NEW} is damaged ({TRAINING} is not what was written); it was set aside as damaged-{NEW}"
    ]
    assert content(two / f"damaged-{NEW}") == damaged
    assert not (two / NEW).exists()


def test_each_damaged_one_is_set_aside_under_a_name_of_its_own(two: Path) -> None:
    for count in range(1, 4):
        save(two, 32)
        (two / NEW / MODEL).write_bytes(bytes(count))
        checkpoint.newest(two, lambda _: None)
        assert len(list(two.glob(f"damaged-{NEW}*"))) == count
    assert {len((path / MODEL).read_bytes()) for path in two.glob("damaged-*")} == {1, 2, 3}


class Damage:
    """What can happen to the files of two checkpoints, each chosen by `draw`."""

    def __init__(self, folder: Path, draw: Callable[[st.SearchStrategy[Any]], Any]) -> None:
        self.folder, self.draw = folder, draw
        self.step = draw(st.sampled_from([OLD, NEW]))
        self.path = folder / self.step / draw(st.sampled_from(FILES))
        self.data = self.path.read_bytes() if self.path.is_file() else b""

    def flip_bits(self) -> None:
        data = bytearray(self.data)
        for _ in range(self.draw(st.integers(1, 4)) if data else 0):
            data[self.draw(st.integers(0, len(data) - 1))] ^= self.draw(st.integers(1, 255))
        self.write(bytes(data))

    def truncate(self) -> None:
        self.write(self.data[: self.draw(st.integers(0, max(len(self.data) - 1, 0)))])

    def extend(self) -> None:
        self.write(self.data + self.draw(st.binary(min_size=1, max_size=9)))

    def insert(self) -> None:
        where = self.draw(st.integers(0, len(self.data)))
        self.write(self.data[:where] + self.draw(st.binary(min_size=1, max_size=3)) + self.data[where:])

    def zero_a_sector(self) -> None:
        start = self.draw(st.integers(0, len(self.data) // 512)) * 512
        self.write(self.data[:start] + bytes(len(self.data[start : start + 512])) + self.data[start + 512 :])

    def replace(self) -> None:
        self.write(self.draw(st.binary(max_size=64)))

    def replace_by_json(self) -> None:
        scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
        values = st.recursive(
            scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3)
        )
        self.write(json.dumps(self.draw(values)).encode())

    def remove(self) -> None:
        self.clear()

    def replace_by_folder(self) -> None:
        self.clear()
        self.path.mkdir()

    def replace_by_link(self) -> None:
        self.clear()
        target = self.draw(st.sampled_from(["nowhere", self.path.name, f"../{OLD}/{self.path.name}", "/dev/zero"]))
        self.path.symlink_to(target)

    def replace_by_pipe(self) -> None:
        self.clear()
        os.mkfifo(self.path)

    def swap_between_checkpoints(self) -> None:
        other = self.folder / (OLD if self.step == NEW else NEW) / self.path.name
        self.swap(self.path, other)

    def swap_within_a_checkpoint(self) -> None:
        self.swap(self.path, self.path.parent / self.draw(st.sampled_from(FILES)))

    def swap_checkpoints(self) -> None:
        self.swap(self.folder / OLD, self.folder / NEW)

    def copy_over_the_other(self) -> None:
        other = self.folder / (OLD if self.step == NEW else NEW)
        if other.is_dir() and self.path.parent.is_dir():
            shutil.rmtree(other)
            shutil.copytree(self.path.parent, other, symlinks=True, copy_function=os.link)  # pipes too

    def empty_the_folder(self) -> None:
        if self.path.parent.is_dir():
            shutil.rmtree(self.path.parent)
            self.path.parent.mkdir()

    def replace_the_folder(self) -> None:
        if self.path.parent.is_dir():
            shutil.rmtree(self.path.parent)
        if not os.path.lexists(self.path.parent):
            if self.draw(st.booleans()):
                self.path.parent.write_bytes(self.draw(st.binary(max_size=9)))
            else:
                self.path.parent.symlink_to(self.draw(st.sampled_from([OLD, NEW, "nowhere", "/"])))

    def swap(self, one: Path, other: Path) -> None:
        if os.path.lexists(one) and os.path.lexists(other) and one != other:
            aside = self.folder / "aside"
            one.rename(aside)
            other.rename(one)
            aside.rename(other)

    def clear(self) -> None:
        if self.path.is_dir() and not self.path.is_symlink():
            self.path.rmdir()
        else:
            self.path.unlink(missing_ok=True)

    def write(self, data: bytes) -> None:
        self.clear()
        self.path.write_bytes(data)


DAMAGES = [name for name, value in vars(Damage).items() if callable(value) and name[0] != "_"][:-3]
_outcomes: Counter[str] = Counter()


def inventory(folder: Path) -> list[tuple[int, int]]:
    """Every file, folder and link at or below the checkpoints, whatever its name: none may be deleted."""
    found = (path.lstat() for path in folder.rglob("*"))
    return sorted((status.st_ino, status.st_size) for status in found)


@given(st.data())
@settings(
    max_examples=NUM_DAMAGES, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
)
def test_whatever_happens_to_its_files_a_checkpoint_is_one_that_was_written_or_none(
    originals: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    folder = originals.parent / "damaged"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(originals, folder)
    for _ in range(data.draw(st.sampled_from([1, 1, 2, 3]))):
        damage = Damage(folder, data.draw)
        if damage.path.parent.is_dir() and not damage.path.parent.is_symlink():
            getattr(damage, data.draw(st.sampled_from(DAMAGES)))()
    before = inventory(folder)

    said: list[str] = []
    found = checkpoint.newest(folder, said.append)

    assert inventory(folder) == before, "something was deleted or changed"
    names = sorted(line.split()[2] for line in said)
    assert all(line.startswith("WARNING: checkpoint step-") for line in said)
    aside = sorted(path.name for path in folder.iterdir() if path.name.startswith("damaged-"))
    assert aside == [f"damaged-{name}" for name in names]
    assert not any(os.path.lexists(folder / name) for name in names)
    if found:
        original = originals / found.path.name
        assert (found.model, found.training) == ((original / MODEL).read_bytes(), (original / TRAINING).read_bytes())
        assert found.step == int(original.name.removeprefix("step-"))
        assert parse_training(found.training, original)["step"] == found.step
        assert found.path.name not in names
    else:
        assert not list(folder.glob("step-*"))
    _outcomes[found.path.name if found else "none"] += 1
    if names:
        _outcomes["damaged"] += 1


def test_the_damages_were_of_all_sorts() -> None:
    """The campaign above would also pass if it damaged nothing."""
    print(dict(_outcomes))
    if _outcomes:  # it ran in this process
        assert _outcomes["damaged"] > NUM_DAMAGES / 2
        assert min(_outcomes[outcome] for outcome in (OLD, NEW, "none")) > NUM_DAMAGES / 20


@pytest.mark.parametrize("name", FILES)
def test_every_single_byte_counts(name: str, two: Path) -> None:
    path = two / NEW / name
    good = path.read_bytes()
    original = checkpoint.read(two / NEW)
    harmless = []
    for position in range(len(good)):
        path.write_bytes(good[:position] + bytes([good[position] ^ 0x20]) + good[position + 1 :])
        problem = ""
        try:
            found = checkpoint.read(two / NEW)
        except DamagedError as error:
            problem = str(error)
        if problem:
            assert name in problem or name == MANIFEST
        else:
            assert found == original
            harmless.append(position)
    # All that may change is what is not looked at: the manifest's key "format".
    assert harmless == (list(range(good.index(b"format"), good.index(b"format") + 6)) if name == MANIFEST else [])


def manifest(**changes: object) -> str:
    """A manifest of step 32 in which keys are changed."""
    entry = {"bytes": 5, "sha256": hashlib.sha256(b"hello").hexdigest()}
    whole: dict[str, object] = {"format": 1, "step": 32, "files": {MODEL: entry, TRAINING: entry}}
    return json.dumps(whole | changes)


FORGERIES = {
    "no JSON": "format: 1",
    "nothing": "",
    "no text": "\xff\xfe\x00",
    "null": "null",
    "a number": "32",
    "a list": "[[]]",
    "a deep list": "[" * 60_000,
    "deep objects": '{"a":' * 10_000,
    "a long list": "[" + "1," * 30_000 + "1]",
    "a billion spaces": " " * (1 << 20),
    "a huge number": manifest().replace("32", "1" + "0" * 4000, 1),
    "a number too huge to read": manifest().replace("32", "1" + "0" * 5000, 1),
    "a number out of range": manifest().replace("32", "1e999", 1),
    "NaN": manifest(step=float("nan")),
    "infinity": manifest(step=float("inf")),
    "negative": manifest(step=-32),
    "a fraction": manifest(step=32.0),
    "text": manifest(step="32"),
    "true": manifest(step=True),
    "a list of steps": manifest(step=[32]),
    "no step": json.dumps({"files": {}}),
    "another step": manifest(step=33),
    "no files": manifest(files=None),
    "files in a list": manifest(files=[MODEL, TRAINING]),
    "text for files": manifest(files=MODEL),
    "one file": manifest(files={MODEL: {"bytes": 5, "sha256": ""}}),
    "no sum": manifest(files={name: {"bytes": 5} for name in (MODEL, TRAINING)}),
    "null for a sum": manifest(files={name: {"bytes": 5, "sha256": None} for name in (MODEL, TRAINING)}),
    "NaN bytes": manifest(files={name: {"bytes": float("nan"), "sha256": ""} for name in (MODEL, TRAINING)}),
    "negative bytes": manifest(files={name: {"bytes": -5, "sha256": ""} for name in (MODEL, TRAINING)}),
}


@pytest.mark.parametrize("forgery", FORGERIES)
def test_a_manifest_that_was_never_written_is_damage(forgery: str, two: Path) -> None:
    for name in (MODEL, TRAINING):
        (two / NEW / name).write_bytes(b"hello")
    (two / NEW / MANIFEST).write_text(FORGERIES[forgery], encoding="latin-1")
    said: list[str] = []
    found = checkpoint.newest(two, said.append)
    assert found
    assert found.step == 16
    assert len(said) == 1
    assert f"checkpoint {NEW} is damaged (" in said[0]


def test_the_forged_manifests_differ_from_a_right_one_in_one_thing(two: Path) -> None:
    for name in (MODEL, TRAINING):
        (two / NEW / name).write_bytes(b"hello")
    (two / NEW / MANIFEST).write_text(manifest())
    assert checkpoint.read(two / NEW).model == b"hello"
    (two / "step-00000001").mkdir()
    (two / "step-00000001" / MANIFEST).write_text(manifest(step=True))
    with pytest.raises(DamagedError, match="another step"):
        checkpoint.read(two / "step-00000001")


def test_a_file_far_too_large_is_not_read(two: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "read_bytes", lambda path: pytest.fail(f"{path} was read"))
    for name in FILES:
        with (two / NEW / name).open("r+b") as file:
            file.truncate(1 << 40)  # it takes no room
        with pytest.raises(DamagedError, match=f"{name} is far too large"):
            checkpoint._read_regular(two / NEW / name)


# --- a checkpoint that a user names ---


def test_a_checkpoint_or_a_run_can_be_named(two: Path) -> None:
    assert checkpoint.find(two / OLD, pytest.fail).step == 16
    assert checkpoint.find(two.parent, pytest.fail).step == 32
    assert checkpoint.find(two, pytest.fail).step == 32


def test_a_named_checkpoint_may_be_called_otherwise_by_now(two: Path) -> None:
    (two / OLD).rename(two.parent / "best")
    assert checkpoint.find(two.parent / "best", pytest.fail).step == 16
    with pytest.raises(DamagedError, match="another step"):  # a run's own must have its step's name
        checkpoint.read(two.parent / "best")


def test_what_a_user_names_is_never_changed(two: Path) -> None:
    (two / NEW / MODEL).write_bytes(b"")
    before = inventory(two)
    said: list[str] = []
    assert checkpoint.find(two.parent, said.append).step == 16
    assert len(said) == 1
    assert said[0].startswith(f"WARNING: checkpoint {two / NEW} is damaged ({MODEL} is not what was written)")
    with pytest.raises(RequestError, match="there is no whole checkpoint in"):
        checkpoint.find(two / NEW, said.append)
    assert inventory(two) == before


@pytest.mark.parametrize("name", ["", "missing", f"checkpoints/{OLD}/{MODEL}", "x" * 300])
def test_a_path_without_a_checkpoint_is_one_sentence(name: str, two: Path) -> None:
    shutil.rmtree(two / NEW)
    (two / OLD).rename(two / "elsewhere")
    with pytest.raises(RequestError) as refused:
        checkpoint.find(two.parent / name, pytest.fail)
    assert "\n" not in str(refused.value)


# --- nothing is run, and nothing but a sentence comes of a forged file ---


class Bomb:
    """Runs a command when it is unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch '{self.target}'",)


def bombs(target: Path) -> Iterator[bytes]:
    """The same bomb as a plain pickle, in a zip file as torch writes it, in torch's old format, and in a state."""
    yield pickle.dumps(Bomb(target))
    for value in (Bomb(target), {"step": Bomb(target)}, {"network": {"weight": [torch.zeros(2), Bomb(target)]}}):
        for as_zip in (True, False):
            buffer = io.BytesIO()
            torch.save(value, buffer, _use_new_zipfile_serialization=as_zip)
            yield buffer.getvalue()


def test_a_pickle_bomb_is_refused_without_running(two: Path, tmp_path: Path) -> None:
    target = tmp_path / "ran"
    pickle.loads(pickle.dumps(Bomb(target)))
    assert target.exists(), "the bomb is none"
    target.unlink()
    for bomb in bombs(target):
        forge(two / NEW, training=bomb)
        found = checkpoint.newest(two, pytest.fail)  # the manifest is right: as far as that goes it is whole
        assert found
        assert found.step == 32
        with pytest.raises(RequestError, match=f"{TRAINING} is refused: ") as refused:
            parse_training(found.training, two / NEW / TRAINING)
        assert "\n" not in str(refused.value)
        assert not target.exists()


def mutated(data: bytes, random: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(random.choice((1, 1, 2, 5))):
        where = random.randrange(len(changed))
        how = random.randrange(4)
        if how == 0:
            changed[where] = random.randrange(256)
        elif how == 1:
            del changed[where:]
        elif how == 2:
            del changed[where : where + random.randrange(1, 5)]
        else:
            changed[where:where] = random.randbytes(3)
        changed = changed or bytearray(1)
    return bytes(changed)


def test_a_forged_training_state_is_loaded_or_refused_in_one_sentence() -> None:
    """Damage that the manifest does not show, as of someone who computes it anew."""
    archive, old_format = io.BytesIO(), io.BytesIO()
    torch.save(training(16), archive)
    torch.save(training(16), old_format, _use_new_zipfile_serialization=False)
    with zipfile.ZipFile(archive) as file:
        entries = {name: file.read(name) for name in file.namelist()}
    name = next(name for name in entries if name.endswith("/data.pkl"))

    def rezipped(data: bytes) -> bytes:
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w") as file:
            for entry in entries:
                file.writestr(entry, data if entry == name else entries[entry])
        return buffer.getvalue()

    assert parse_training(rezipped(entries[name]), Path(TRAINING))["step"] == 16
    chance = random.Random(0)
    refusals = []
    for number in range(900):
        kind = number % 3
        data = mutated((archive.getvalue(), old_format.getvalue(), entries[name])[kind], chance)
        try:
            assert isinstance(parse_training(rezipped(data) if kind == 2 else data, Path(TRAINING)), dict)
        except RequestError as error:
            refusals.append(str(error))
    assert 700 < len(refusals) < 900
    assert all(text.startswith(f"{TRAINING} is refused: ") and "\n" not in text for text in refusals)


@pytest.mark.parametrize("value", [None, 5, [1], torch.zeros(3), "state"], ids=lambda value: type(value).__name__)
def test_a_training_state_that_is_none_is_refused(value: object) -> None:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    with pytest.raises(RequestError, match="it holds no training state"):
        parse_training(buffer.getvalue(), Path(TRAINING))


def safetensors(header: object, body: bytes = bytes(48)) -> bytes:
    head = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(head)) + head + body


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\0" * 7,
        b"\x89PNG\r\n\x1a\n" * 10,
        b"\xff" * 64,
        pickle.dumps({"weight": [1.0]}),
        struct.pack("<Q", 1 << 62) + b"{}",
        safetensors(b"{"),
        safetensors(b"[" * 10_000),
        safetensors([]),
        safetensors({"w": 1}),
        safetensors({"w": {"dtype": "F32", "shape": [12], "data_offsets": [0, 99]}}),
        safetensors({"w": {"dtype": "F32", "shape": [13], "data_offsets": [0, 48]}}),
        safetensors({"w": {"dtype": "F32", "shape": [-12], "data_offsets": [0, 48]}}),
        safetensors({"w": {"dtype": "F32", "shape": [1 << 63, 2], "data_offsets": [0, 48]}}),
        safetensors({"w": {"dtype": "F32", "shape": [12], "data_offsets": [48, 0]}}),
        safetensors({"w": {"dtype": "PYTHON", "shape": [12], "data_offsets": [0, 48]}}),
        safetensors({"w": {"dtype": "F4", "shape": [96], "data_offsets": [0, 48]}}),  # safetensors knows it, torch not
    ],
    ids=lambda data: repr(data[:24]),
)
def test_weights_that_are_no_safetensors_are_one_sentence(data: bytes, two: Path) -> None:
    with pytest.raises(RequestError, match=f"{MODEL} is not a safetensors file of weights: ") as refused:
        parse_weights(data, Path(MODEL))
    assert "\n" not in str(refused.value)
    forge(two / NEW, model=data)
    found = checkpoint.newest(two, pytest.fail)
    assert found
    assert found == Checkpoint(two / NEW, 32, data, found.training)
    with pytest.raises(RequestError, match=f"^{two / NEW / MODEL} is not a safetensors file of weights: "):
        parse_weights(found.model, found.path / MODEL)
