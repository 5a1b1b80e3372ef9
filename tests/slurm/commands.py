"""The golden file of the commands that the scripts of slurm/ start, from real jobs.

    python -m tests.slurm.commands      writes tests/golden/slurm-commands.txt anew; needs what tests/slurm needs

A `+` line is what DRY_RUN=1 prints. The lines below it are what really arrived on the nodes, written by a stand-in for
Python: a rank's, or its launcher's, variables and command line.
"""

import itertools
import os
import re
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path

from tests.conftest import REPOSITORY, clean_environment, wait_for
from tests.slurm.cluster import Cluster
from tests.slurm.conftest import ENDED, Job, make_project

GOLDEN = REPOSITORY / "tests" / "golden" / "slurm-commands.txt"
ARGUMENTS = ("configs/mlp.yaml", "lr=2e-3", "run_dir=runs/two words")
# All that the scripts need to show what they would do. None of SLURM's commands is among them.
TOOLS = ("awk", "basename", "bash", "date", "dirname", "env", "head", "hostname", "realpath", "sed", "sort")
_VARIABLES = (
    "RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE MASTER_ADDR MASTER_PORT NNODES NODE_RANK NPROC CUDA_VISIBLE_DEVICES "
    "ACCELERATE_USE_CPU PET_SIGNALS_TO_HANDLE MNIST_DIST_EXIT_CODE_FILE"
)
_STAND_IN = f"""\
#!/bin/bash
case "$*" in
  -c*) awk -F, '{{ print NF }}' <<<"${{CUDA_VISIBLE_DEVICES:-}}"; exit ;; # how many GPUs torch sees
  *--check*) printf 'mlp\\nruns/two words\\n300\\n'; exit ;;
esac
line="$SLURMD_NODENAME, task $SLURM_PROCID:"
for name in {_VARIABLES}; do
  [ -z "${{!name:-}}" ] || line+=" $name=${{!name}}"
done
printf '%s %s%s\\n' "$line" "$0" "$(printf ' %q' "$@")"
"""


def commands(cluster: Cluster, folder: Path) -> str:
    """What runs on one and two nodes, with and without GPUs, under both launchers; then what is said without SLURM."""
    project = make_project(folder / "project", folder)
    python = project / "python"
    python.write_text(_STAND_IN)
    python.chmod(0o755)
    kinds = {"no GPUs": ["--ntasks-per-node=2"], "2 GPUs each": ["--gpus-per-node=2", "--cpus-per-gpu=2"]}
    jobs: list[tuple[str, Job, Job]] = []
    for nodes, kind, launcher in itertools.product((1, 2), kinds, ("srun", "accelerate")):
        options = [f"--nodes={nodes}", *kinds[kind]]
        title = (
            f"== {'one node' if nodes == 1 else 'two nodes'}, {kind}, LAUNCHER={launcher}: sbatch {' '.join(options)}"
        )
        environment = {"PYTHON": str(python), "LAUNCHER": launcher, "MAX_REQUEUES": "0"}
        pair: list[Job] = []
        for extra in ({"DRY_RUN": "1"}, {}):
            where = [] if nodes == 2 else ["--nodelist=n1"]  # always the same one
            command = ["sbatch", "--parsable", "--output=%j.log", *where, *options, "slurm/train.sh", *ARGUMENTS]
            job_id = cluster.client(*command, cwd=project, **environment, **extra).strip()
            pair.append(Job(cluster, project, job_id))
        jobs.append((title, pair[0], pair[1]))
    sections = []
    for title, dry, real in jobs:
        wait_for(lambda pair=(dry, real): all(job.show("JobState") in ENDED for job in pair))
        planned = [line for line in dry.log.splitlines() if line.startswith("+")]
        arrived = sorted(line for line in real.log.splitlines() if line.startswith("n"))
        sections.append("\n".join([title, *planned, *arrived]))
    sections += [_without_slurm(project, folder / "tools", command, **extra) for command, extra in DRY]
    return _normal("\n\n".join(sections) + "\n", project)


DRY: tuple[tuple[tuple[str, ...], dict[str, str]], ...] = (
    (("slurm/train.sh", *ARGUMENTS), {}),
    (("slurm/train.sh", "configs/mlp.yaml"), {"CONTAINER": "apptainer exec --nv image.sif"}),
    (("slurm/train.sh", "configs/mlp.yaml", "missing=synthetic"), {"SRUN_OPTIONS": "--container-image=image.sqsh"}),
    (("slurm/sweep.sh", "--gpus-per-node=1", "configs/mlp.yaml", "configs/cnn.yaml", "lr=2e-3", "seed=0,1"), {}),
    (("slurm/scaling.sh", "3", "--gpus-per-node=2", "configs/mlp.yaml", "lr=2e-3"), {}),
)


def _without_slurm(project: Path, tools: Path, command: tuple[str, ...], **extra: str) -> str:
    """DRY_RUN=1 on a machine that has only TOOLS."""
    tools.mkdir(exist_ok=True)
    for name in TOOLS:
        if not (tools / name).exists():
            (tools / name).symlink_to(shutil.which(name) or name)
    environment = clean_environment(PATH=str(tools), DRY_RUN="1", PYTHON=str(project / "python"), **extra)
    result = subprocess.run(
        ["bash", *command], cwd=project, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    settings = [f"{name}={shlex.quote(value)}" for name, value in ({"DRY_RUN": "1"} | extra).items()]
    return f"== without SLURM: {' '.join(settings)} {shlex.join(command)}\n{result.stdout}exit code {result.returncode}"


def _normal(text: str, project: Path) -> str:
    """The same text at any time, in any folder, on any host, whatever the job's number."""
    for place in (project, project.resolve(), REPOSITORY):
        text = text.replace(str(place), "PROJECT")
    text = text.replace(f" {os.uname().nodename};", " HOST;")
    text = re.sub(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d", "DATE", text)
    text = re.sub(r"(\.exit-code)-\d+", r"\1-JOB", text)
    text = re.sub(r"(_EXIT_CODE_FILE=)\S*/tmp\.\w+", r"\1TEMPORARY", text)
    text = re.sub(r"(sweep|scaling)-\d{8}-\d{6}", r"\1-TIME", text)
    return re.sub(r"(MASTER_PORT=|_port |meet at 127.0.0.1:)\d+", r"\1PORT", text)


def main() -> None:
    """Write it."""
    with Cluster() as cluster, tempfile.TemporaryDirectory() as folder:
        GOLDEN.write_text(commands(cluster, Path(folder)))
    print(GOLDEN)


if __name__ == "__main__":
    main()
