#!/usr/bin/env bash
# Train the same job on 1, 2, 4, ... N nodes, one after the other so that they share nothing, and compare their speed.
# Call it on the login node, in the project's folder.
#
#   slurm/scaling.sh N [--sbatch-option=value ...] [RECIPE] [key=value ...]
#   slurm/scaling.sh 8 --gpus-per-node=8 configs/cnn.yaml batch_size=4096
#
# The global batch stays the same, so it must be a multiple of the ranks of N nodes. The jobs are slurm/train.sh, so
# each comes back by itself. The last to end leaves the whole table in the folder; python slurm/table.py FOLDER shows
# it at any time. DRY_RUN=1 only prints what would be submitted.
set -euo pipefail
root=$(realpath "$(dirname "${BASH_SOURCE[0]}")/..")
# shellcheck source=slurm/common.sh
source "$root/slurm/common.sh"
need_project_folder

most=${1:-}
[[ $most =~ ^[1-9][0-9]*$ ]] || refuse "the first argument, '$most', is not a number of nodes"
options=() arguments=()
for argument in "${@:2}"; do
  case $argument in
    -*) options+=("$argument") ;;
    run_dir=*) refuse "run_dir= is not for a scaling run, whose runs get a folder each" ;;
    *=* | *.yaml | *.yml) arguments+=("$argument") ;;
    *)
      [ -f "$root/configs/$argument.yaml" ] || refuse "'$argument' is no --sbatch-option=value, no RECIPE and no key=value"
      arguments+=("$argument")
      ;;
  esac
done

folder=runs/scaling-$(date +%Y%m%d-%H%M%S)
after=() jobs=()
for ((nodes = 1; ; nodes = nodes * 2 < most ? nodes * 2 : most)); do
  run_dir=$folder/nodes-$(printf %03d "$nodes")
  [ -n "${DRY_RUN:-}" ] || mkdir -p "$run_dir"
  submit --job-name=scaling --output="$run_dir.log" --nodes="$nodes" --export="ALL,TABLE_DIR=$folder" "${after[@]}" \
    "${options[@]}" "$root/slurm/train.sh" "${arguments[@]}" "run_dir=$run_dir"
  after=("--dependency=afterany:$job_id") jobs+=("$job_id")
  [ "$nodes" -lt "$most" ] || break
done
say "jobs ${jobs[*]}: logs in $folder/nodes-001.log and so on; the table will be in $folder/table.txt"
