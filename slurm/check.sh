#!/usr/bin/env bash
# One node, before its ranks start: prints its name and its number of GPUs, and says what would only show later, as a
# hang. slurm/train.sh starts it once on each node.
set -euo pipefail
trap "" USR1 # there is nothing to be saved yet

complain() {
  echo "slurm: $SLURMD_NODENAME: $1" >&2
  exit 1
}

address_of() { getent ahosts "$1" | awk 'NR == 1 { print $1 }' || true; }

is_loopback() { [[ $1 == 127.* || $1 == ::1 ]]; }

if [ "$SLURM_JOB_NUM_NODES" -gt 1 ]; then
  master=$(address_of "$MASTER_ADDR")
  [ -n "$master" ] || complain "the name of the job's first node, $MASTER_ADDR, cannot be resolved here; mend DNS or /etc/hosts"
  if [ "$SLURM_NODEID" != 0 ] && is_loopback "$master"; then
    complain "the name of the job's first node, $MASTER_ADDR, leads to $master here, which is this node itself; mend DNS or /etc/hosts"
  fi
  # gloo tells the other nodes to connect to whatever address this node's own name has.
  own=$(address_of "$(hostname)")
  if [ -z "${GLOO_SOCKET_IFNAME:-}" ] && { [ -z "$own" ] || is_loopback "$own"; }; then
    interfaces=$(cd /sys/class/net && echo *)
    complain "its own name, $(hostname), leads to ${own:-no address}, where no other node can reach it; export GLOO_SOCKET_IFNAME in slurm/site.sh, one of: $interfaces"
  fi
fi
echo "$SLURMD_NODENAME ${SLURM_GPUS_ON_NODE:-0}"
