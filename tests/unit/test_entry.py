"""The entry in an environment that cannot run the job: one sentence and exit code 2, before anything is imported."""

import ast
import importlib.metadata
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from mnist_dist import __main__ as entry
from tests.conftest import REPOSITORY


@pytest.fixture
def bare_python(tmp_path: Path) -> str:
    """An interpreter without any installed package."""
    path = tmp_path / "python"
    path.write_text(f'#!/bin/sh\nexec {sys.executable} -S "$@"\n')
    path.chmod(0o755)
    return str(path)


def test_the_packages_that_are_looked_for_are_the_declared_ones() -> None:
    declared = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["dependencies"]
    names = {canonicalize_name(Requirement(line).name) for line in declared}
    distributions = importlib.metadata.packages_distributions()
    assert {canonicalize_name(distributions[package][0]) for package in entry.PACKAGES} == names


@pytest.mark.parametrize("arguments", [["train.py", "smoke"], ["-m", "mnist_dist", "report", "x"], ["train.py", "-h"]])
def test_missing_packages_are_named(bare_python: str, arguments: list[str]) -> None:
    result = subprocess.run([bare_python, *arguments], cwd=REPOSITORY, capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1
    assert "has no package accelerate, jinja2, matplotlib, PIL, " in result.stderr
    assert "torch, torchvision; use the Python of the environment" in result.stderr


@pytest.mark.parametrize(
    ("verb", "words"),
    [
        ("train", "does not import torch (ModuleNotFoundError: No module named 'torch')"),
        ("doctor", "does not import torch (ModuleNotFoundError: No module named 'torch')"),
        ("evaluate", "has no package"),
    ],
)
def test_a_launch_script_says_that_torch_is_missing(bare_python: str, verb: str, words: str) -> None:
    command = [REPOSITORY / "launch/local.sh", verb]
    environment = {"PATH": "/usr/bin:/bin", "PYTHON": bare_python}
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1
    assert words in result.stderr


def test_a_launch_script_says_that_python_is_missing(tmp_path: Path) -> None:
    command = [REPOSITORY / "launch/local.sh"]
    environment = {"PATH": "/usr/bin:/bin", "PYTHON": str(tmp_path / "none")}
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 2
    assert f"local.sh: PYTHON={tmp_path}/none does not import torch (" in result.stderr


def test_an_old_python_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(entry, "OLDEST_PYTHON", (99, 1))
    version = f"{sys.version_info[0]}.{sys.version_info[1]}"
    assert entry.environment_problem() == f"{sys.executable} is Python {version}; 99.1 or later is needed"


@pytest.mark.parametrize("name", ["train.py", "mnist_dist/__init__.py", "mnist_dist/__main__.py"])
def test_an_old_python_reads_as_far_as_that_sentence(name: str) -> None:
    ast.parse((REPOSITORY / name).read_text(), feature_version=(3, 6))
