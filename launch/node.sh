#!/usr/bin/env bash
# Train on several machines without a scheduler: run this on each of them.
#
#   NNODES=2 NODE_RANK=0 MASTER_ADDR=host0 MASTER_PORT=29511 launch/node.sh [VERB] [RECIPE] run_dir=DIR [key=value ...]
#
# From the environment:
#   NNODES        how many machines; each starts the same number of ranks
#   NODE_RANK     which of them this is, from 0
#   MASTER_ADDR   host name or address of machine 0, as the others reach it
#   MASTER_PORT   a free port there, the same on all
#   NPROC         ranks to start on this machine (default: one per GPU, or 1 without GPUs)
#   MAX_RESTARTS  how often to start all ranks again, from the last checkpoint, after one was lost (default 0)
#   PYTHON        the interpreter (default: python)
#
# Exit codes as launch/local.sh on machine 0; on the others 0 or 1.
set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname "$(realpath "${BASH_SOURCE[0]}")")/common.sh"

take_verb "$@"
for name in NNODES NODE_RANK MASTER_ADDR MASTER_PORT; do
  [ -n "${!name:-}" ] || refuse "$name is not set; each machine needs NNODES, NODE_RANK, MASTER_ADDR and MASTER_PORT"
done
[[ $NNODES =~ ^[1-9][0-9]*$ ]] || refuse "NNODES=$NNODES is not a number of machines"
[[ $NODE_RANK =~ ^[0-9]+$ && $NODE_RANK -lt $NNODES ]] || refuse "NODE_RANK=$NODE_RANK is not one of 0 to $((NNODES - 1))"
getent ahosts "$MASTER_ADDR" >/dev/null || refuse "MASTER_ADDR=$MASTER_ADDR cannot be resolved on $(hostname)"
count_ranks
world_size=$((NNODES * nproc))
num_arguments=${#arguments[@]}
check_request "$world_size"
[ "$verb" != train ] || [ "${#arguments[@]}" = "$num_arguments" ] || refuse "run_dir= is missing; give the same one on each machine"
launch "$world_size" --num_machines "$NNODES" --machine_rank "$NODE_RANK" --num_processes "$world_size" \
  --main_process_ip "$MASTER_ADDR" --main_process_port "$MASTER_PORT" --same_network
