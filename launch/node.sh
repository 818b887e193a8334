#!/usr/bin/env bash
# One task of one node: start this node's ranks under torchrun or deepspeed, and pass "save and stop" on to them.
#   node.sh torchrun|deepspeed  MODULE arguments ...
#
# Neither launcher passes USR1 on: torchrun and deepspeed die of it (the ranks miss them, save and end). Signals go to
# the ranks themselves: the descendants that have a RANK.
# shellcheck disable=SC2317 # functions are called by the trap
set -uo pipefail
launcher=$1
shift
place=(--master_addr "$MASTER_ADDR" --master_port "$MASTER_PORT")
case $launcher in
  torchrun)
    start=(
      python -u -m torch.distributed.run --nnodes "$SLURM_JOB_NUM_NODES" --nproc-per-node "$SLOPE_RANKS_PER_NODE"
      --node-rank "$SLURM_NODEID" "${place[@]/_/-}" -m "$@"
    )
    ;;
  deepspeed)
    # A file of this job and node: a shared one is a race.
    hostfile=$SLOPE_HOSTFILE.$SLURM_NODEID
    scontrol show hostnames "$SLURM_JOB_NODELIST" | sed "s/\$/ slots=$SLOPE_RANKS_PER_NODE/" > "$hostfile"
    start=(
      python -u -m deepspeed.launcher.runner --hostfile "$hostfile" --no_ssh --node_rank "$SLURM_NODEID" "${place[@]}"
      --no_local_rank --module "$@"
    )
    ;;
  *)
    echo "node.sh: error: launcher '$launcher' is neither torchrun nor deepspeed" >&2
    exit 2
    ;;
esac
"${start[@]}" &
pid=$!

descendants() {
  local child
  for child in $(pgrep -P "$1"); do
    echo "$child"
    descendants "$child"
  done
}
has_rank() { tr '\0' '\n' < "/proc/$1/environ" 2> /dev/null | grep -q '^RANK='; }
save_and_stop() {
  local process
  for process in $(descendants "$pid"); do
    has_rank "$process" && ! has_rank "$(ps -o ppid= -p "$process" | tr -d ' ')" && kill -USR1 "$process"
  done
}
trap save_and_stop USR1 TERM HUP INT
code=0
while kill -0 "$pid" 2> /dev/null; do
  wait "$pid"
  code=$?
done
exit "$code"
