"""The entry that `accelerate launch`, torchrun, srun and plain python start: arguments in, exit code out."""

import os
import sys

from mnist_dist.run import stop

if __name__ == "__main__":
    stop.install()  # before torch is imported: a signal must not find the process without a handler
    from mnist_dist.cli import main
    from mnist_dist.distributed.launch_env import answer

    code = answer(os.environ, main(["train", *sys.argv[1:]]))  # which has written everything out
    if os.environ.get("RANK"):
        # Not sys.exit: with the threads of collectives about, taking the interpreter down aborts now and then.
        os._exit(code)
    sys.exit(code)
