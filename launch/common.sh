# What launch/local.sh and launch/node.sh share: the launcher's flags, its signals and its exit code.
# shellcheck shell=bash

python=${PYTHON:-python}
train=$(realpath "$(dirname "${BASH_SOURCE[0]}")/../train.py")

refuse() {
  echo "$(basename "$0"): $1" >&2
  exit 2
}

# Sets verb, and arguments without it. The verbs that need no ranks, a file of commands/ each, are answered here.
take_verb() { # arguments of the script
  verb=train
  case ${1:-} in
    train | doctor | verify | bench) verb=$1 && shift ;;
    *)
      if [[ ${1:-} =~ ^[a-z]+$ && -f $(dirname "$train")/mnist_dist/commands/$1.py ]]; then
        exec "$python" "$train" "$@"
      fi
      ;;
  esac
  arguments=("$@")
}

# Sets nproc, the ranks of this machine, and num_gpus; and looks at the other variables.
count_ranks() {
  num_gpus=$("$python" -c 'import torch; print(torch.accelerator.device_count())' 2>&1) ||
    refuse "PYTHON=$python does not import torch (${num_gpus##*$'\n'}); activate the environment in which it is installed"
  num_gpus=${num_gpus##*$'\n'} # behind a warning
  nproc=${NPROC:-$num_gpus}
  [[ $nproc =~ ^[0-9]{1,6}$ ]] || refuse "NPROC=$nproc is not a number of ranks"
  [ "$nproc" -gt 0 ] || nproc=1
  if [ "$num_gpus" -gt 0 ] && [ "$nproc" -gt "$num_gpus" ] && [ -z "${ACCELERATE_USE_CPU:-}" ]; then
    refuse "NPROC=$nproc is more than the GPUs here, $num_gpus; each rank needs one of its own"
  fi
  restarts=${MAX_RESTARTS:-0}
  [ "$verb" = train ] || restarts=0 # a verdict is final, and a measurement begins anew
  [[ $restarts =~ ^[0-9]{1,6}$ ]] || refuse "MAX_RESTARTS=$restarts is not a number of restarts"
  [[ ${MASTER_PORT:-0} =~ ^[0-9]{1,5}$ && ${MASTER_PORT:-0} -le 65535 ]] || refuse "MASTER_PORT=$MASTER_PORT is not a port, 1 to 65535"
}

# Refuse a wrong request before a launcher is started: it would wrap one sentence in a traceback. Answer here what
# asks for no training. Sets timeout_s, and run_dir, which it adds to the arguments: a stop and a restart must find the
# run, so its directory is chosen here, unless it is given.
check_request() { # world-size
  export RANK=0 WORLD_SIZE=$1
  local argument checked recipe
  for argument in "${arguments[@]}"; do
    case $argument in
      -h | --help | --dry-run | --check) exec "$python" "$train" "$verb" "${arguments[@]}" ;;
    esac
  done
  checked=$("$python" "$train" "$verb" --check "${arguments[@]}") || exit
  unset RANK WORLD_SIZE
  { read -r recipe && read -r run_dir && read -r timeout_s; } <<<"$checked"
  if [ -z "$run_dir" ] && [ "$verb" = train ]; then
    run_dir=runs/$recipe-$(date +%Y%m%d-%H%M%S)-$$
    arguments+=("run_dir=$run_dir")
  fi
}

# Start the ranks and end with the job's own exit code.
launch() { # ranks in all, flags of accelerate launch
  # Every flag is given, so that no default configuration of the user's leaks in.
  local command=(accelerate.commands.launch --multi_gpu --mixed_precision no --dynamo_backend no
    --max_restarts "$restarts" "${@:2}")
  if [ "$1" = 1 ]; then # which Accelerate starts without torchrun, and so never again
    command=(torch.distributed.run --standalone --nproc_per_node 1 --max_restarts "$restarts")
  fi
  if [ "$num_gpus" = 0 ]; then export ACCELERATE_USE_CPU=true; fi
  # A launcher takes every exit code but 0 for a failure: the ranks end with 0, and rank 0 leaves its code there.
  MNIST_DIST_EXIT_CODE_FILE=$(mktemp) || refuse "no temporary file can be made; look at TMPDIR"
  export MNIST_DIST_EXIT_CODE_FILE
  if [ "${NODE_RANK:-0}" = 0 ] && [ "$verb" = train ]; then rm -f "$run_dir/STOP"; fi # an earlier start's, which never got ranks
  set +e
  # It runs in a session of its own: the terminal's Ctrl-C and a scheduler's signals reach only this script, which turns
  # the first into a STOP file, the one way of stopping that every rank hears, and the second into an end at once.
  setsid "$python" -m "${command[@]}" "$train" "$verb" "${arguments[@]}" &
  launcher=$!
  trap stop_run TERM INT USR1 USR2 HUP
  await_ranks
  local code
  while :; do
    wait "$launcher" 2>/dev/null # the shell would announce a kill
    code=$?
    kill -0 "$launcher" 2>/dev/null || break # a trap interrupts wait: go on until the launcher is really gone
  done
  if [ "$code" = 0 ]; then code=$(cat "$MNIST_DIST_EXIT_CODE_FILE"); fi # empty on machines without rank 0
  code=${ended_early:-$code}
  rm -f "$MNIST_DIST_EXIT_CODE_FILE"
  exit "${code:-0}"
}

# The processes that the launcher has started.
find_ranks() { grep -l "^PPid:[[:space:]]$launcher\$" /proc/[0-9]*/status 2>/dev/null | tr -cd '0-9\n'; }

# Wait until the launcher has started its ranks, which needs the launchers of all machines, and say so.
await_ranks() {
  local began=$SECONDS said=$SECONDS waiting
  [ "${NNODES:-1}" -gt 1 ] || return 0
  waiting="waiting for the launchers of all $NNODES machines to meet at $MASTER_ADDR:$MASTER_PORT"
  while kill -0 "$launcher" 2>/dev/null && [ -z "$(find_ranks)" ]; do
    if [ $((SECONDS - began)) -gt "$timeout_s" ]; then
      echo "$(basename "$0"): a machine did not come to $MASTER_ADDR:$MASTER_PORT within $timeout_s s (timeout_s); start this on each of the $NNODES machines, with NODE_RANK 0 to $((NNODES - 1))" >&2
      ended_early=1
      kill -KILL "$launcher"
    elif [ $((SECONDS - said)) -ge 5 ]; then
      said=$SECONDS
      echo "$(basename "$0"): $waiting, since $((SECONDS - began)) s of at most $timeout_s" >&2
    fi
    sleep 1 &
    wait "$!"
  done
}

stop_run() {
  if [ "${NNODES:-1}" -gt 1 ] && [ -z "$(find_ranks)" ]; then
    echo "$(basename "$0"): stopped before its ranks had started; nothing is lost, start it again" >&2
    ended_early=3
    kill -KILL "$launcher"
    return
  fi
  if [ "$verb" != train ]; then # there is nothing to be saved
    # shellcheck disable=SC2046 # several words
    kill -KILL "$launcher" $(find_ranks)
    return
  fi
  local now=${EPOCHREALTIME//[.,]/} # microseconds
  if [ -z "${stopped:-}" ]; then
    stopped=$now
    mkdir -p "$run_dir" && touch "$run_dir/STOP"
    echo "$(basename "$0"): asked the ranks to stop; once more ends them at once" >&2
  elif [ $((now - stopped)) -gt 1000000 ]; then # what comes sooner is the same wish: schedulers send two signals
    # The ranks have sessions of their own: without their launcher they would go on.
    # shellcheck disable=SC2046 # several words
    kill -KILL "$launcher" $(find_ranks)
  fi
}
