#!/usr/bin/env bash
# Stage 10: SLURM starts the ranks, asks them to stop before the time limit, and starts the job again.
#
#   sbatch docs/tutorial/10_slurm.sh
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=2
#SBATCH --time=00:10:00
#SBATCH --signal=TERM@60
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_PORT=$((10000 + SLURM_JOB_ID % 20000))
export MASTER_ADDR MASTER_PORT

# One task a rank. A variable of a task is read inside the task, hence the single quotes.
code=0
# shellcheck disable=SC2016
srun bash -c '
  export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS
  export LOCAL_WORLD_SIZE=$SLURM_NTASKS_PER_NODE OMP_NUM_THREADS=${SLURM_CPUS_PER_TASK:-1}
  exec python docs/tutorial/09_stop.py
' || code=$?
if [ "$code" = 3 ]; then scontrol requeue "$SLURM_JOB_ID"; fi
exit "$code"
