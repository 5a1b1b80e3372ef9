#!/usr/bin/env bash
# Train several configurations or seeds as one job array. Call it on the login node, in the project's folder.
#
#   slurm/sweep.sh [--sbatch-option=value ...] [RECIPE ...] [key=value ...] [key=value,value,... ...]
#   slurm/sweep.sh --gpus-per-node=1 configs/mlp.yaml configs/cnn.yaml seed=0,1,2,3      eight runs
#
# A key with commas takes each of its values in turn, and so do several RECIPEs: the runs are all combinations.
# The array's jobs are slurm/train.sh, so each comes back by itself. The last to end leaves the whole table in the
# sweep's folder; python slurm/table.py FOLDER shows it at any time. DRY_RUN=1 only prints what would be submitted.
set -euo pipefail
root=$(realpath "$(dirname "${BASH_SOURCE[0]}")/..")
# shellcheck source=slurm/common.sh
source "$root/slurm/common.sh"
need_project_folder

runs=("") names=("") # of each run: its arguments, quoted, and what sets it apart
combine() { # words: each run so far, once with each of them
  local i word mark more=() more_names=()
  for i in "${!runs[@]}"; do
    for word in "$@"; do
      mark=""
      [ $# = 1 ] || mark=-$(basename "${word%.y*ml}")
      more+=("${runs[i]} $(printf %q "$word")")
      more_names+=("${names[i]}$mark")
    done
  done
  runs=("${more[@]}") names=("${more_names[@]}")
}

options=() configs=() pairs=()
for argument in "$@"; do
  case $argument in
    -*) options+=("$argument") ;;
    run_dir=*) refuse "run_dir= is not for a sweep, whose runs get a folder each" ;;
    *=*) pairs+=("$argument") ;;
    *.yaml | *.yml) configs+=("$argument") ;;
    *)
      [ -f "$root/configs/$argument.yaml" ] || refuse "'$argument' is no --sbatch-option=value, no RECIPE and no key=value"
      configs+=("$argument")
      ;;
  esac
done
[ "${#configs[@]}" = 0 ] || combine "${configs[@]}"
for pair in "${pairs[@]}"; do
  if [[ $pair == *=*,* && $pair != *=\[* ]]; then
    IFS=, read -ra values <<<"${pair#*=}"
    combine "${values[@]/#/${pair%%=*}=}"
  else
    combine "$pair"
  fi
done

folder=runs/sweep-$(date +%Y%m%d-%H%M%S)
list=""
for i in "${!runs[@]}"; do
  run_dir=$folder/$(printf %03d "$i")${names[i]}
  list+="${runs[i]:1} $(printf %q "run_dir=$run_dir")"$'\n'
  [ -n "${DRY_RUN:-}" ] || mkdir -p "$run_dir"
done
if [ -n "${DRY_RUN:-}" ]; then
  printf %s "$list"
else
  printf %s "$list" >"$folder/list"
fi
submit --job-name=sweep --output="$folder/%a.log" --array="0-$((${#runs[@]} - 1))" \
  --export="ALL,SWEEP_LIST=$folder/list,TABLE_DIR=$folder" "${options[@]}" "$root/slurm/train.sh"
say "job $job_id: ${#runs[@]} runs, logs in $folder/0.log and so on; the table will be in $folder/table.txt"
