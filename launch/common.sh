# What launch/local.sh and launch/node.sh share: the launcher's flags, its signals and its exit code.
# shellcheck shell=bash

python=${PYTHON:-python}
train=$(realpath "$(dirname "${BASH_SOURCE[0]}")/../train.py")

refuse() {
  echo "$(basename "$0"): $1" >&2
  exit 2
}

# Sets nproc, the ranks of this machine, and num_gpus.
count_ranks() {
  num_gpus=$("$python" -c 'import torch; print(torch.accelerator.device_count())')
  nproc=${NPROC:-$num_gpus}
  [[ $nproc =~ ^[0-9]+$ ]] || refuse "NPROC=$nproc is not a number of ranks"
  [ "$nproc" -gt 0 ] || nproc=1
}

# Refuse a wrong request before a launcher is started: it would wrap one sentence in a traceback.
check_request() { # world-size, arguments of train.py
  local code=0
  RANK=0 WORLD_SIZE=$1 "$python" "$train" --check "${@:2}" || code=$?
  [ "$code" = 0 ] || exit "$code"
}

# Sets run_dir and arguments. A restart by the launcher must find the run, so its directory is chosen here unless given.
choose_run_dir() { # arguments of train.py
  local argument recipe=run
  run_dir=""
  arguments=("$@")
  for argument in "$@"; do
    case $argument in
      run_dir=*) run_dir=${argument#*=} ;;
      *=*) ;;
      *.yaml | *.yml) recipe=$(basename "${argument%.*}") ;;
    esac
  done
  if [ -z "$run_dir" ]; then
    run_dir=runs/$recipe-$(date +%Y%m%d-%H%M%S)-$$
    arguments+=("run_dir=$run_dir")
  fi
}

# Start `accelerate launch` with every flag given, so that no default configuration of the user's leaks in.
# It runs in a session of its own: the terminal's Ctrl-C and a scheduler's signals reach only this script, which turns
# the first into a STOP file, the one way of stopping that every rank hears, and the second into an end at once.
launch() { # flags of accelerate launch
  local flags=(--multi_gpu --mixed_precision no --dynamo_backend no --max_restarts "${MAX_RESTARTS:-0}" "$@")
  if [ "$num_gpus" = 0 ]; then export ACCELERATE_USE_CPU=true; fi
  # A launcher starts a rank that ends with 3 again; the ranks end with 0 instead, and the exit code is found below.
  export MNIST_DIST_EXIT_CODE_WHEN_STOPPED=0
  set +e
  setsid "$python" -m accelerate.commands.launch "${flags[@]}" "$train" "${arguments[@]}" &
  launcher=$!
  trap stop_run TERM INT USR1 USR2 HUP
  local code
  while :; do
    wait "$launcher"
    code=$?
    kill -0 "$launcher" 2>/dev/null || break # a trap interrupts wait: go on until the launcher is really gone
  done
  if [ "$code" = 0 ] && [ -e "$run_dir/metrics.jsonl" ] && [ ! -e "$run_dir/DONE" ]; then exit 3; fi
  exit "$code"
}

stop_run() {
  if [ -n "${stopping:-}" ]; then
    kill -KILL -- "-$launcher"
  else
    stopping=1
    mkdir -p "$run_dir" && touch "$run_dir/STOP"
    echo "$(basename "$0"): asked the ranks to stop; once more ends them at once" >&2
  fi
}
