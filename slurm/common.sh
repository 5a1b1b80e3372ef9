# What the scripts of this folder share: the site's settings, messages, and how a job is submitted.
# The script that sources it has set `root`, the project's folder.
# shellcheck shell=bash

say() { echo "slurm: $(date '+%F %T') $*"; }

refuse() {
  echo "slurm: $*" >&2
  exit 2
}

show() { # a command line, as it could be typed
  printf '+'
  printf ' %q' "$@"
  printf '\n'
}

# Modules and virtual environments are not written for `set -eu`.
if [ -f "${root:?}/slurm/site.sh" ]; then
  set +eu
  # shellcheck source=slurm/site.sh.example
  source "$root/slurm/site.sh"
  set -eu
fi
PYTHON=${PYTHON:-python}

# The jobs start where they are submitted, and paths are relative to that.
need_project_folder() {
  [ -f slurm/train.sh ] || refuse "call this in the project's folder, $root: the jobs start where they are submitted"
}

# Sets job_id. With DRY_RUN it only prints the command.
submit() { # arguments of sbatch
  job_id=JOB
  if [ -n "${DRY_RUN:-}" ]; then
    show sbatch "$@"
  else
    job_id=$(sbatch --parsable "$@")
    job_id=${job_id%%;*} # a federation adds the cluster's name
  fi
}
