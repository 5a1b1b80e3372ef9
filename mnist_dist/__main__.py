"""The entry of `python -m mnist_dist`, of the command `mnist-dist` and of train.py: arguments in, exit code out."""

import os
import sys
from typing import NoReturn

from mnist_dist.run import stop


def main(default_verb: str = "") -> NoReturn:
    """Run the verb on the command line, and end the process with its exit code."""
    arguments = sys.argv[1:]
    stop.install()  # before torch is imported: a signal must not find the process without a handler
    from mnist_dist.cli import VERBS, run_process

    if default_verb and not (arguments and arguments[0] in VERBS):
        arguments.insert(0, default_verb)
    code = run_process(arguments)  # which has written everything out
    if os.environ.get("RANK"):
        # Not sys.exit: with the threads of collectives about, taking the interpreter down aborts now and then.
        os._exit(code)
    sys.exit(code)


if __name__ == "__main__":
    main()
