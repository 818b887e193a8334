#!/usr/bin/env bash
# The tests. Without a flag: the fast tier. --all: also many ranks, faults, whole runs and SLURM (--no-slurm: without).
# --gpu: the tests marked so of operations, kernels, layers and training, on a GPU host. It runs no linters, and
# installs nothing where python has torch already (SLOPE_VENV=none, which it sets itself if SLOPE_VENV is unset).
# Other flags go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."

tier=(-m "not slow")
slurm=${SLOPE_TEST_SLURM:-} gpu=
arguments=()
for argument in "$@"; do
  case $argument in
    --all) tier=() slurm=${slurm:-1} ;;
    --no-slurm) slurm=0 ;;
    --gpu) gpu=1 ;;
    -h | --help)
      sed -n '2,5s/^# //p' "$0"
      exit 0
      ;;
    *) arguments+=("$argument") ;;
  esac
done

. launch/environment.sh
if [ "$gpu" ]; then
  if [ -z "${SLOPE_VENV:-}" ] && python -c "import torch" 2>/dev/null; then SLOPE_VENV=none; fi
  slope_environment "$PWD"
  python -c "import sys, torch; sys.exit(not torch.cuda.is_available())" || {
    echo "tests/run.sh: error: --gpu: torch finds no GPU here: leave the flag out, or see slope doctor" >&2
    exit 2
  }
  exec python -m pytest --durations=15 -m gpu tests/ops tests/kernels tests/layers tests/training "${arguments[@]}"
fi
slope_environment "$PWD"

# With --all: a real SLURM on this machine, where there can be one (root, Debian), for some minutes.
export SLOPE_TEST_SLURM=${slurm:-0}

ruff check .
ruff format --check --quiet .
mypy slope_megatron kernels
exec python -m pytest --durations=15 "${tier[@]}" "${arguments[@]}"
