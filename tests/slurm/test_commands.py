"""The exact command lines of srun and of the launcher, and scripts that a machine without SLURM can read and try."""

import re
import subprocess
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY
from tests.slurm.cluster import Cluster
from tests.slurm.commands import GOLDEN, commands

SCRIPTS = [*sorted((REPOSITORY / "slurm").glob("*.sh*")), *sorted((REPOSITORY / "launch").glob("*.sh"))]


def test_the_commands_are_the_golden_ones(cluster: Cluster, tmp_path: Path) -> None:
    assert commands(cluster, tmp_path).splitlines() == GOLDEN.read_text().splitlines()


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_a_script_can_be_parsed(script: Path) -> None:
    result = subprocess.run(["bash", "-n", str(script)], capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")


def test_every_message_is_in_the_documentation() -> None:
    table = (REPOSITORY / "docs" / "SLURM.md").read_text().split("## What the scripts say")[1].split("\n## ")[0]
    explained = re.findall(r"^\| `(.*?)` \|", table, re.MULTILINE)
    assert sorted(explained) == sorted(said())


def said() -> set[str]:
    """What the scripts of slurm/ may say, with ... for what differs."""
    speak = r"(?:refuse|complain|say|echo|finish \d|finish \"[^\"]*\"|trap 'echo)"
    command, variable = r"\$\((?:[^()]|\([^()]*\)|\(\([^()]*\)\))*\)", r"\$\{[^}]*\}|\$(?:\w+|\*)"
    found = set()
    for path in sorted((REPOSITORY / "slurm").glob("*.sh")):
        for text in re.findall(rf"\b{speak} \"((?:{command}|[^\"])*)\"", path.read_text()):
            found.add(re.sub(rf"{command}|{variable}", "...", text).removeprefix("slurm: "))
    # Not a sentence: the functions' own parameters, and what check.sh tells train.sh.
    return found - {"... ...", "...", "...: ..."}
