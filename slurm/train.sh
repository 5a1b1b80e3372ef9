#!/usr/bin/env bash
# Train under SLURM, on one node or many. The job comes back by itself after a preemption, a time limit or a lost node.
#
#   sbatch [--nodes=N] [--gpus-per-node=N | --ntasks-per-node=N] slurm/train.sh [VERB] [RECIPE] [key=value ...]
#   DRY_RUN=1 bash slurm/train.sh [VERB] [RECIPE] [key=value ...]   only prints the commands; needs no SLURM
#
# One rank per GPU, or one CPU rank per task where there are no GPUs. Submit it from the project's folder.
# The compute nodes use no network for data (missing=fail, unless missing= is given): run `mnist-dist fetch` before.
# From the environment, or from slurm/site.sh:
#   MAX_REQUEUES  how often the job may put itself back into the queue (default 20)
#   MASTER_PORT   port on which the ranks meet (default: from the job id, the next free one)
#   LAUNCHER      accelerate: one `accelerate launch` per node starts the ranks, not srun
#
# A site may edit these four, but slurm/site.sh is the better place (SBATCH_PARTITION and so on override them).
#SBATCH --job-name=mnist-dist
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --time=01:00:00
#
# Coming back needs these: an early signal to this script alone, a job that may be requeued, a log that is appended to.
#SBATCH --signal=B:USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail
# It would kill this script. Ranks that run already are asked to stop, below; what has not begun loses nothing, and
# the signals that matter are followed by SIGTERM.
trap 'echo "slurm: SIGUSR1 came before the ranks were started; going on"' USR1
root=$(realpath "$(dirname "${BASH_SOURCE[0]}")/..")
[ -f "$root/slurm/common.sh" ] || root=$PWD # sbatch runs a copy of this file, in the folder where it was called
if [ ! -f "$root/slurm/common.sh" ]; then
  echo "slurm: $PWD is not the project's folder; call sbatch slurm/train.sh there" >&2
  exit 2
fi
# shellcheck source=slurm/common.sh
source "$root/slurm/common.sh"
[ -n "${SLURM_JOB_ID:-}${DRY_RUN:-}" ] || refuse "this is no SLURM job; submit it with sbatch, or give DRY_RUN=1"
max_requeues=${MAX_REQUEUES:-20}
[[ $max_requeues =~ ^[0-9]+$ ]] || refuse "MAX_REQUEUES=$max_requeues is not a number of requeues"
launcher=${LAUNCHER:-srun}
[[ $launcher == srun || $launcher == accelerate ]] || refuse "LAUNCHER=$launcher is neither srun nor accelerate"
job=${SLURM_JOB_ID:-0} # of an array's task the own one, but scontrol would take it for the whole array
self=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
self=${self:-$job}
restarts=${SLURM_RESTART_COUNT:-0} nodes=${SLURM_JOB_NUM_NODES:-1}

# --- what is asked for. An array's task takes its arguments from its line of the list that slurm/sweep.sh wrote.
if [ -n "${SWEEP_LIST:-}" ]; then
  line=$(sed -n "$((${SLURM_ARRAY_TASK_ID:-0} + 1))p" "$SWEEP_LIST" || true)
  [ -n "$line" ] || refuse "there is no line $((${SLURM_ARRAY_TASK_ID:-0} + 1)) in SWEEP_LIST=$SWEEP_LIST; the array is larger than the sweep"
  eval "set -- $line"
fi
verb=train
case ${1:-} in
  train) shift ;;
  doctor | verify | bench) verb=$1 ;;
  *)
    if [[ ${1:-} =~ ^[a-z]+$ && -f $(dirname "$(realpath "$root/train.py")")/mnist_dist/commands/$1.py ]]; then
      verb=$1
    fi
    ;;
esac
case $verb in
  train) kind=run ;;
  doctor | verify | bench) kind=verdict ;; # of all ranks, on nothing that needs to be kept
  *) kind=alone ;;                 # without ranks
esac
run_dir=""
for argument in "$@"; do
  [[ $argument != run_dir=* ]] || run_dir=${argument#*=}
done
arguments=("$@")
if [ -z "$run_dir" ] && [ $kind = run ]; then # the same after a requeue
  run_dir=runs/${SLURM_JOB_NAME:-mnist-dist}-$job
  arguments+=("run_dir=$run_dir")
fi
if [[ $verb =~ ^(train|evaluate|doctor)$ && " $*" != *" missing="* ]]; then arguments+=(missing=fail); fi

# --- what SLURM gave: nodes, ranks per node, where they meet
read -ra srun_options <<<"${SRUN_OPTIONS:-}"
read -ra container <<<"${CONTAINER:-}"
# The ranks of one node need no name that resolves. Of several, this script runs on the first.
MASTER_ADDR=127.0.0.1
if [ "$nodes" -gt 1 ]; then
  MASTER_ADDR=${SLURMD_NODENAME:-$(hostname)}
  if ! getent hosts "$MASTER_ADDR" >/dev/null; then
    MASTER_ADDR=$(scontrol show node "$MASTER_ADDR" | sed -n 's/.*NodeAddr=\([^ ]*\).*/\1/p')
  fi
fi
if [ -z "${MASTER_PORT:-}" ]; then
  MASTER_PORT=$((10000 + job % 20000)) # below the ports that systems give to outgoing connections
  while (: <"/dev/tcp/$MASTER_ADDR/$MASTER_PORT") 2>/dev/null; do MASTER_PORT=$((MASTER_PORT + 1)); done
fi
export MASTER_ADDR MASTER_PORT

# What these say goes to srun as --cpus-per-task; some versions of srun refuse to hear it twice.
unset SLURM_CPUS_PER_TASK SLURM_CPUS_PER_GPU SLURM_TRES_PER_TASK
check=(srun --nodes="$nodes" --ntasks="$nodes" --ntasks-per-node=1 --export=ALL "${srun_options[@]}"
  bash "$root/slurm/check.sh")
gpus="$(hostname) 0"
if [ -n "${SLURM_JOB_ID:-}" ]; then
  gpus=$("${check[@]}") || refuse "a node is not fit for this job, see above; nothing was started"
fi
num_gpus=$(awk '{ print $2 }' <<<"$gpus" | sort -u)
[[ $num_gpus =~ ^[0-9]+$ ]] || refuse "the nodes differ in GPUs (${gpus//$'\n'/, }), but each must have as many ranks as the others; ask for --gpus-per-node"
tasks="${SLURM_NTASKS:-1} on $nodes nodes"
if [ "$num_gpus" -gt 0 ]; then
  NPROC=$num_gpus
elif [ $((${SLURM_NTASKS:-1} % nodes)) = 0 ]; then
  NPROC=$((${SLURM_NTASKS:-1} / nodes))
else # SLURM_TASKS_PER_NODE is no help: it says 2(x2) for three tasks, two on each node
  refuse "the nodes differ in tasks ($tasks), but each must have as many ranks as the others; ask for --ntasks-per-node"
fi
export NPROC
world_size=$((nodes * NPROC))
cpus=$(sed 's/(x[0-9]*)//g; s/,/\n/g' <<<"${SLURM_JOB_CPUS_PER_NODE:-$NPROC}" | sort -n | head -n 1)
[ "$cpus" -ge "$NPROC" ] || refuse "a node's CPUs for this job ($cpus) are fewer than its ranks ($NPROC); ask for --cpus-per-gpu, or for --ntasks-per-node=$NPROC"

# --- the command: one task per rank, so that rank order is fixed and exit codes survive; or one launcher per node
if [ "$launcher" = srun ]; then
  # A rank that fails ends the others; they get KillWait, SLURM's, to say their last words.
  step=(--ntasks="$world_size" --ntasks-per-node="$NPROC" --cpus-per-task=$((cpus / NPROC)) --kill-on-bad-exit=1)
  command=(rank "$PYTHON" "$root/train.py")
else
  # A launcher ends its own ranks, and they watch those of the other nodes.
  step=(--ntasks="$nodes" --ntasks-per-node=1 --cpus-per-task="$cpus" --kill-on-bad-exit=0)
  command=(node "$root/launch/node.sh")
fi
step=(srun --nodes="$nodes" "${step[@]}" --distribution=block --export=ALL "${srun_options[@]}"
  "${container[@]}" bash "$root/slurm/task.sh" "${command[@]}" "${arguments[@]}")
# Python alone, once, on this node: where srun's options say what is in a container, only srun can start it.
once=("${container[@]}")
if [ -n "${SRUN_OPTIONS:-}" ]; then
  once=(srun --nodes=1 --ntasks=1 --ntasks-per-node=1 --export=ALL "${srun_options[@]}" "${container[@]}")
fi
if [ $kind = alone ]; then
  "${once[@]}" "$PYTHON" "$root/train.py" "${arguments[@]}"
  exit
fi
request=("${once[@]}" env RANK=0 WORLD_SIZE="$world_size" "$PYTHON" "$root/train.py" --check "${arguments[@]}")
say "job $job, restart $restarts, on ${SLURM_JOB_NODELIST:-$(hostname)}; ranks: $world_size, $NPROC on each node; they meet at $MASTER_ADDR:$MASTER_PORT; run_dir=${run_dir:-none}"
if [ $kind = verdict ] && [ -z "${DRY_RUN:-}" ]; then
  "${step[@]}"
  exit
fi
if [ -n "${DRY_RUN:-}" ]; then
  show "${check[@]}"
  [ $kind = verdict ] || show "${request[@]}"
  show "${step[@]}"
  exit 0
fi

# --- run. A wrong request is refused before anything starts: one sentence, and no requeue.
"${request[@]}" >/dev/null || exit

stop_ranks() { # the one way of stopping that every rank hears, under every launcher
  say "SIG$1: asking the ranks to save and stop"
  stopping=1
  touch "$run_dir/STOP" || true # the disk may be full; this script must see the ranks' end
}
stopping=""
mkdir -p "$run_dir" || refuse "run_dir=$run_dir cannot be made; choose another"
trap 'stop_ranks USR1' USR1
trap 'stop_ranks TERM' TERM

# The ranks of a lost node may train on until the node is back, and hold the run. They hear the STOP file as well.
if [ "$restarts" -gt 0 ] && [ -e "$run_dir/lock" ] && ! flock --nonblock "$run_dir/lock" true; then
  say "$(cat "$run_dir/lock"), of an earlier start, still trains here: asking it to stop"
  touch "$run_dir/STOP"
  flock --wait 300 "$run_dir/lock" true || refuse "$(cat "$run_dir/lock") still holds run_dir=$run_dir; end it and submit again"
fi
[ -n "$stopping" ] || rm -f "$run_dir/STOP"
# srun would take 3 for a failure, and end ranks that are about to leave: they end with 0, and rank 0 leaves it there.
export MNIST_DIST_EXIT_CODE_FILE=$run_dir/.exit-code-$job-$restarts
num_lines=$(grep -c "" "$run_dir/metrics.jsonl" 2>/dev/null || true)

"${step[@]}" &
srun=$!
while kill -0 "$srun" 2>/dev/null; do
  wait "$srun" || true # a trap interrupts this: go on until srun is really gone
done
code=0
wait "$srun" || code=$?
if [ "$code" = 0 ]; then code=$(cat "$MNIST_DIST_EXIT_CODE_FILE" 2>/dev/null || echo 0); fi
rm -f "$MNIST_DIST_EXIT_CODE_FILE"
trap "" USR1 TERM # nothing is left to be stopped

# --- what has happened? The run's own last word says it best: an exit status may be that of the clearing up.
finish() { # exit code, message
  say "$2"
  if [ -n "${TABLE_DIR:-}" ]; then # one at a time, so that the last one's table has them all
    flock "$TABLE_DIR/lock" "${once[@]}" "$PYTHON" "$root/slurm/table.py" "$TABLE_DIR" || true
  fi
  exit "$1"
}

again="submit it again with run_dir=$run_dir to go on from its last checkpoint"
last=$(tail -n "+$((${num_lines:-0} + 1))" "$run_dir/metrics.jsonl" 2>/dev/null | tail -n 1 || true)
cause=""
case $last in
  '{"event": "done"'*)
    rm -f "$run_dir/STOP" # it came when there was nothing left to be stopped
    finish 0 "finished"
    ;;
  '{"event": "stop"'*) cause="it was asked to stop" ;;
  '{"event": "failed"'*'"cause": "rank_lost"'*) cause="a rank was lost" ;;
  '{"event": "failed"'*) code=1 ;; # srun may say 143, from ending a rank that was about to leave
  *)
    if [ "$code" = 0 ] && [ -e "$run_dir/DONE" ]; then finish 0 "finished before; there was nothing to do"; fi
    # It broke off without a word. A launcher ends with 1 where rank 0, which writes them, was killed.
    if [ "$code" = 137 ] || [ "$code" = 134 ]; then cause="a rank was killed"; fi # 134: by an abort of its own, as NCCL's
    if [ "$code" = 3 ]; then cause="it was asked to stop"; fi # as its ranks were starting
    if [ "$launcher$code" = accelerate1 ] && [ -n "$last" ] && [ "$world_size" -gt 1 ]; then cause="a rank was killed"; fi
    if [ "$code" = 0 ]; then cause="srun left its ranks"; fi # it does so where a node is lost
    if [ "$code" = 138 ] || [ -n "$stopping" ]; then cause="it was asked to stop"; fi # 138: by SIGUSR1 as they started
    ;;
esac
if [ -z "$cause" ]; then
  finish "$((code ? code : 1))" "failed by itself with exit code $code, so it is not requeued; once that is mended, $again"
fi

# --- back into the queue
if [ "$restarts" -ge "$max_requeues" ]; then
  finish 3 "not finished, since $cause; MAX_REQUEUES=$max_requeues is used up, so $again"
fi
# A requeue would also revive a job that somebody has cancelled, and one that SLURM has long started elsewhere, if this
# is the script of a lost node. A job that ran out of time is SLURM's to end, but ours to bring back.
state=$(scontrol --oneliner show job "$self") ||
  finish 3 "not finished, since $cause; scontrol does not answer on $(hostname), so $again"
if [[ $state != *" Restarts=$restarts "* || ! $state =~ " JobState=RUNNING "|" Reason=TimeLimit " ]]; then
  finish 3 "not finished, since $cause; SLURM itself ends this job, and brings it back unless it was cancelled"
fi
say "not finished, since $cause; back into the queue, requeue $((restarts + 1)) of at most $max_requeues"
scontrol requeue "$self" || finish 3 "the requeue was refused, so $again"
