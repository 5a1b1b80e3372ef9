"""`make train` on a machine that cannot set up a virtual environment: a sentence, and nothing left in the way."""

import subprocess
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY


@pytest.mark.parametrize(
    ("script", "sentence"),
    [
        ("exit 1", "is older than Python 3.11; name a newer one, as make PYTHON=python3.11"),
        ('[ "$1" = -c ] && exit 0; mkdir -p "$3/bin"; touch "$3/bin/python"; exit 1', "-m venv failed; on Debian"),
    ],
    ids=["old Python", "no python3-venv"],
)
def test_a_virtual_environment_that_cannot_be_made_leaves_nothing(script: str, sentence: str, tmp_path: Path) -> None:
    python, venv = tmp_path / "python", tmp_path / "venv"
    python.write_text(f"#!/bin/sh\n{script}\n")
    python.chmod(0o755)
    command = ["make", "--no-print-directory", "train", f"PYTHON={python}", f"VENV={venv}"]
    result = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert result.returncode == 2
    assert f"make: {python} {sentence}" in result.stderr
    assert not venv.exists()
