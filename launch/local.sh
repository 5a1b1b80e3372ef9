#!/usr/bin/env bash
# Train on this machine: every GPU, or the CPU with all its cores.
#
#   launch/local.sh [VERB] [RECIPE] [key=value ...]        VERB is train, unless it is given
#
# From the environment:
#   NPROC         ranks to start (default: one per GPU, or 1 without GPUs); NPROC=2 makes two CPU ranks, on gloo
#   MAX_RESTARTS  how often to start all ranks again, from the last checkpoint, after one was lost (default 0)
#   MASTER_PORT   port on which the ranks meet (default: a free one)
#   PYTHON        the interpreter (default: python)
#
# Ends with the job's own exit code: 0 finished, 1 it went wrong, 2 the request is wrong, 3 stopped and resumable.
set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname "$(realpath "${BASH_SOURCE[0]}")")/common.sh"

take_verb "$@"
count_ranks
check_request "$nproc"
# One rank needs no launcher, and without one it gets its signals itself.
if [ "$nproc" = 1 ] && [ "$restarts" = 0 ]; then
  exec "$python" "$train" "$@"
fi
launch "$nproc" --num_machines 1 --num_processes "$nproc" --main_process_port "${MASTER_PORT:-0}"
