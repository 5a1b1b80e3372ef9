#!/usr/bin/env bash
# What srun starts, once for each task. SLURM's variables become torch's in here, inside the task: in the job script
# they would be those of the first node.
#
#   task.sh rank COMMAND ...    one rank
#   task.sh node COMMAND ...    one node, whose launcher starts the ranks
set -euo pipefail

if [ "$1" = rank ]; then
  # A signal must not kill the process before Python has its handlers. (Python takes the signals back.)
  trap "" USR1 TERM
  export RANK=$SLURM_PROCID WORLD_SIZE=$SLURM_NTASKS LOCAL_RANK=$SLURM_LOCALID LOCAL_WORLD_SIZE=$NPROC
else
  export NNODES=$SLURM_JOB_NUM_NODES NODE_RANK=$SLURM_NODEID
  # Without this the launcher dies of USR1 and leaves its ranks behind.
  export PET_SIGNALS_TO_HANDLE=SIGTERM,SIGINT,SIGUSR1
fi
exec "${@:2}"
