"""Training images/s of this code beside another commit's, or beside this code with a patch, in alternating runs.

    python -m benchmarks.other_code (--commit COMMIT | --patch FILE) [--ranks 2] [--rounds 5] [--json FILE] [CASE ...]

A CASE is MODEL:BATCH:STEPS. Each rank has one thread; precision fp32. The patch of DDP is docs/own_job/ddp.diff.
"""

import argparse
import statistics
import subprocess
import tempfile
from pathlib import Path

from benchmarks.common import REPOSITORY, train, write
from mnist_dist.distributed.device import processor_name

CASES = ["mlp:64:900", "mlp:512:300", "cnn:256:150"]


def check_out(folder: Path, commit: str, patch: str) -> None:
    """Put the files of a commit into a folder, and apply a patch to them if one is named."""
    archive = subprocess.run(["git", "archive", commit], cwd=REPOSITORY, check=True, capture_output=True).stdout
    subprocess.run(["tar", "-x"], cwd=folder, input=archive, check=True)
    if patch:
        subprocess.run(["git", "apply", str(Path(patch).absolute())], cwd=folder, check=True)


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("cases", nargs="*", default=CASES, metavar="CASE")
    other = parser.add_mutually_exclusive_group(required=True)
    other.add_argument("--commit", default="HEAD")
    other.add_argument("--patch", default="", metavar="FILE")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", default="", metavar="FILE")
    options = parser.parse_args()
    print(processor_name())
    rows = []
    with tempfile.TemporaryDirectory() as name:
        check_out(Path(name), options.commit, options.patch)
        for case in options.cases:
            model, batch_size, steps = case.split(":")
            arguments = [f"model={model}", f"batch_size={batch_size}", f"max_steps={steps}", "epochs=100"]
            arguments += ["precision=no", "threads=1"]
            seconds: dict[Path, list[float]] = {REPOSITORY: [], Path(name): []}
            for _ in range(options.rounds):
                for repository, measured in seconds.items():
                    measured.append(train(arguments, options.ranks, repository)["seconds"] / int(steps))
            here, there = seconds.values()
            ratio = statistics.median(there) / statistics.median(here)
            shown = [" ".join(f"{1e3 * s:.2f}" for s in measured) for measured in (here, there)]
            print(f"{case}, {options.ranks} ranks, ms of a step: here {shown[0]}; there {shown[1]}; ratio {ratio:.3f}")
            rows.append({"case": case, "ranks": options.ranks, "here_s": here, "there_s": there, "ratio": ratio})
    write(options.json, {"rows": rows})


if __name__ == "__main__":
    main()
