"""The entry of `python -m mnist_dist`, of the command `mnist-dist` and of train.py: arguments in, exit code out."""

import importlib.util
import os
import sys
from typing import NoReturn

OLDEST_PYTHON = (3, 11)
# What the verbs import. "PIL" is pillow, and "yaml" pyyaml.
PACKAGES = (
    "accelerate",
    "jinja2",
    "matplotlib",
    "PIL",
    "psutil",
    "pydantic",
    "yaml",
    "rich",
    "safetensors",
    "torch",
    "torchvision",
)


def main(default_verb: str = "") -> NoReturn:
    """Run the verb on the command line, and end the process with its exit code."""
    arguments = sys.argv[1:]
    problem = environment_problem()
    if problem:
        print("mnist-dist: " + problem, file=sys.stderr)
        sys.exit(2)
    from mnist_dist.run import stop

    stop.install()  # before torch is imported: a signal must not find the process without a handler
    from mnist_dist.cli import VERBS, run_process

    if default_verb and not (arguments and arguments[0] in VERBS):
        arguments.insert(0, default_verb)
    code = run_process(arguments)  # which has written everything out
    if os.environ.get("RANK"):
        # Not sys.exit: with the threads of collectives about, taking the interpreter down aborts now and then.
        os._exit(code)
    sys.exit(code)


def environment_problem() -> str:
    """Why this interpreter cannot run the job, or the empty string. Looks for the packages, and imports none.

    Python 3.6 must be able to read this file, train.py and mnist_dist/__init__.py.
    """
    if sys.version_info < OLDEST_PYTHON:
        version, oldest = (".".join(map(str, numbers[:2])) for numbers in (sys.version_info, OLDEST_PYTHON))
        return f"{sys.executable} is Python {version}; {oldest} or later is needed"
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        return (
            f"{sys.executable} has no package {', '.join(missing)}; use the Python of the environment in which "
            "mnist-dist was installed, or install it here: pip install ."
        )
    return ""


if __name__ == "__main__":
    main()
