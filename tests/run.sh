#!/usr/bin/env bash
# The tests. Without a flag: the fast tier. --all: also many ranks, faults, whole runs and SLURM (--no-slurm: without).
# Other flags go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/environment.sh
slope_environment "$PWD"

tier=(-m "not slow")
slurm=${SLOPE_TEST_SLURM:-}
arguments=()
for argument in "$@"; do
  case $argument in
    --all) tier=() slurm=${slurm:-1} ;;
    --no-slurm) slurm=0 ;;
    -h | --help)
      sed -n '2,3s/^# //p' "$0"
      exit 0
      ;;
    *) arguments+=("$argument") ;;
  esac
done

# With --all: a real SLURM on this machine, where there can be one (root, Debian), for some minutes.
export SLOPE_TEST_SLURM=${slurm:-0}

ruff check .
ruff format --check --quiet .
mypy slope_megatron kernels
exec python -m pytest --durations=15 "${tier[@]}" "${arguments[@]}"
