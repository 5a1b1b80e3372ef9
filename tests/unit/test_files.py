"""A file is whole or as it was before, whatever fails in between."""

import json
import os
from pathlib import Path

import pytest

from mnist_dist.files import remove, sync_folder, write_atomically, write_json, write_synced


def test_a_file_is_replaced_in_one_step(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    write_atomically(path, b"old\n")
    with path.open() as reader:
        write_atomically(path, "neü\n".encode())
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
    write_atomically(path, b"old\n")
    monkeypatch.setattr(*((os, "fsync") if step == "fsync" else (Path, "replace")), fail)
    with pytest.raises(OSError, match="No space left") as raised:
        write_atomically(path, b"new\n")
    assert raised.value.filename == str(path)  # not the temporary file's name
    assert path.read_text() == "old\n"
    assert [p.name for p in tmp_path.iterdir()] == ["DONE"]


def test_a_file_in_a_folder_that_is_gone_is_named(tmp_path: Path) -> None:
    path = tmp_path / "gone/DONE"
    with pytest.raises(FileNotFoundError) as raised:
        write_json(path, {"step": 1})
    assert raised.value.filename == str(path)


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


def test_what_is_synced_is_written(tmp_path: Path) -> None:
    write_synced(tmp_path / "file", b"first, and longer")
    write_synced(tmp_path / "file", b"second")
    assert (tmp_path / "file").read_bytes() == b"second"
    sync_folder(tmp_path)
    with pytest.raises(FileNotFoundError):
        sync_folder(tmp_path / "gone")


def test_what_is_removed_is_gone_and_nothing_else(tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    kept.mkdir()
    (kept / "file").write_text("")
    (tmp_path / "folder/below").mkdir(parents=True)
    (tmp_path / "file").write_text("")
    (tmp_path / "link to a folder").symlink_to(kept)
    (tmp_path / "link to nothing").symlink_to("nowhere")
    for name in ("folder", "file", "link to a folder", "link to nothing", "gone"):
        remove(tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]
    assert (kept / "file").exists()


def test_what_cannot_be_removed_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path, **_: object) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    (tmp_path / "file").write_text("")
    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", refuse)
        remove(tmp_path / "file")
    assert (tmp_path / "file").exists()
