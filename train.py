"""The entry that `accelerate launch`, torchrun, srun and plain python start: arguments in, exit code out."""

import sys

from mnist_dist import stop

if __name__ == "__main__":
    stop.install()  # before torch is imported: a signal must not find the process without a handler
    from mnist_dist.cli import main

    sys.exit(main(["train", *sys.argv[1:]]))
