"""What versions.json says of what ran: libraries, commit and code, and nothing else of this machine."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from mnist_dist.versions import SOURCE, code_hash, commit, library_versions
from tests.conftest import REPOSITORY, clean_environment


def git(folder: Path, *arguments: str) -> str:
    """Run git there, with no settings of a user's."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("GIT_")}
    environment |= {"HOME": str(folder), "GIT_CONFIG_NOSYSTEM": "1"}
    name = ["-c", "user.name=Test", "-c", "user.email=test@example.org"]
    command = ["git", "-C", str(folder), *name, *arguments]
    return subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout.strip()


def copied(folder: Path) -> Path:
    """A copy of the package in a folder."""
    ignored = shutil.ignore_patterns("__pycache__")
    return Path(shutil.copytree(SOURCE, folder / "mnist_dist", ignore=ignored))


def ask(folder: Path, expression: str) -> object:
    """What a function of `versions` says in another process, for the copy of the package in a folder."""
    code = f"import json; from mnist_dist import versions; print(json.dumps([versions.SOURCE.parts, {expression}]))"
    environment = {k: v for k, v in clean_environment(PYTHONPATH=str(folder)).items() if not k.startswith("GIT_")}
    output = subprocess.check_output([sys.executable, "-c", code], env=environment, cwd=folder)
    parts, answer = json.loads(output)
    assert Path(*parts) == folder / "mnist_dist"
    return answer


def test_versions_name_what_runs_and_nothing_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MNIST_DIST_TEST_TOKEN", "do-not-record-this")
    found = library_versions()
    packages = {"mnist-dist", "torch", "torchvision", "accelerate", "numpy", "pydantic", "safetensors"}
    assert {"python", "mnist-dist", "torch", "accelerate"} <= found.keys() <= {"python", *packages}
    assert found["python"] == ".".join(map(str, sys.version_info[:3]))
    text = json.dumps(found)
    for name, value in os.environ.items():
        assert name not in text or len(name) < 6
        assert value not in found.values() or not value


def test_the_commit_of_this_checkout_is_known_where_there_is_git(monkeypatch: pytest.MonkeyPatch) -> None:
    if (REPOSITORY / ".git").exists():
        assert re.fullmatch(r"[0-9a-f]{12,40}(-dirty)?", commit() or "")
    monkeypatch.setenv("PATH", "")
    assert commit() is None


def test_a_checkout_has_its_own_commit(tmp_path: Path) -> None:
    package = copied(tmp_path)
    git(tmp_path, "init", "--quiet")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "--quiet", "--message=first")
    git(tmp_path, "tag", "v1")  # no name stands in for it
    expected = git(tmp_path, "rev-parse", "HEAD")[:12]
    assert ask(tmp_path, "versions.commit()") == expected
    (package / "errors.py").write_text("# changed\n")
    assert ask(tmp_path, "versions.commit()") == f"{expected}-dirty"


@pytest.mark.parametrize("tracked", [False, True])
def test_a_copy_below_another_repository_does_not_have_its_commit(tracked: bool, tmp_path: Path) -> None:
    git(tmp_path, "init", "--quiet")
    (tmp_path / "file").write_text("")
    folder = tmp_path / ".venv/lib/site-packages"
    copied(folder)
    git(tmp_path, "add", *(["file", ".venv"] if tracked else ["file"]))
    git(tmp_path, "commit", "--quiet", "--message=somebody else's")
    assert ask(folder, "versions.commit()") is None


def test_a_copy_in_no_repository_has_no_commit(tmp_path: Path) -> None:
    copied(tmp_path)
    assert ask(tmp_path, "versions.commit()") is None


def test_the_code_has_one_hash_wherever_it_lies_and_another_when_it_changes(tmp_path: Path) -> None:
    assert re.fullmatch("[0-9a-f]{12}", code_hash())
    package = copied(tmp_path)
    (package / "notes.txt").write_text("no code")
    assert ask(tmp_path, "versions.code_hash()") == code_hash()
    hashes = {code_hash()}
    (package / "models.py").rename(package / "model.py")
    hashes.add(str(ask(tmp_path, "versions.code_hash()")))
    with (package / "model.py").open("a") as file:
        file.write("\n")
    hashes.add(str(ask(tmp_path, "versions.code_hash()")))
    assert len(hashes) == 3
