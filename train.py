"""The entry that `accelerate launch`, torchrun, srun and plain python start; a verb may be the first word."""

from mnist_dist.__main__ import main

if __name__ == "__main__":
    main(default_verb="train")
