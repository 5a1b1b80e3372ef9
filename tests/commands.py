"""The commands that documents and examples name: whether the files, verbs, recipes, keys and targets in them exist."""

import os
import re
import shlex

from mnist_dist.cli import RANKED, VERBS, make_parser, read_request
from mnist_dist.config.schema import Config
from mnist_dist.distributed.launch_env import LaunchEnv
from tests.conftest import REPOSITORY

OUR_PROGRAMS = ("train.py", "launch/local.sh", "launch/node.sh", "slurm/train.sh", "mnist-dist", "-m mnist_dist")
# Their arguments are theirs.
OTHERS = ("apptainer", "cp", "docker", "export", "git", "kubectl", "pip", "pytest", "touch")
_PROGRAM = re.compile(rf"(?:^|[ /])({'|'.join(map(re.escape, OUR_PROGRAMS))})(?= |$)")


def make_targets() -> set[str]:
    """What the Makefile makes, with its default folder of the virtual environment."""
    lines = (REPOSITORY / "Makefile").read_text().replace("$(VENV)", ".venv")
    return set(re.findall(r"^([\w./-]+):(?!=)", lines, re.MULTILINE))


def blocks(text: str) -> list[str]:
    """The commands of a text's blocks that have no language: one a line, without comments."""
    found = re.findall(r"^```\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    lines = [line.split(" # ")[0].strip() for block in found for line in block.splitlines()]
    return [line for line in lines if line]


def check_command(line: str) -> None:
    """Raise AssertionError or RequestError where a command names what there is not."""
    words = shlex.split(line)
    while words and re.match(r"[A-Z_]+=", words[0]):
        words = words[1:]
    if words[0] == "make":
        assert {word for word in words[1:] if "=" not in word} <= make_targets(), line
    elif words[0] in OTHERS:
        pass
    elif match := _PROGRAM.search(shlex.join(words)):
        check_arguments(shlex.split(shlex.join(words)[match.end() :]), line)
    else:
        assert "/" in words[0], f"{line}: not known, so not checked; name it in tests/commands.py"
        assert os.access(REPOSITORY / words[0], os.X_OK), line
    for word in words:
        if re.match(r"(configs|docs|examples|launch|slurm|tests)/", word):
            assert (REPOSITORY / word).exists(), line


def check_arguments(arguments: list[str], line: str) -> None:
    """Parse what one of our programs is given."""
    verb = arguments.pop(0) if arguments and arguments[0] in VERBS else "train"
    assert arguments or verb != "train" or "train.py" in line or "launch/" in line or "slurm/" in line, line
    if verb in RANKED:
        _, rest = make_parser().parse_known_args([verb, *(a for a in arguments if a != "...")])
        read_request(rest, LaunchEnv())
    elif verb == "fetch":
        assert {a.split("=")[0] for a in arguments if "=" in a} <= set(Config.model_fields), line
    else:
        make_parser().parse_known_args([verb, *arguments])
