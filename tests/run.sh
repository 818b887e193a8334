#!/usr/bin/env bash
# The tests. Without a flag: the fast tier. --all: also many ranks, faults, whole runs and SLURM (--no-slurm: without).
# --gpu: the tests marked so of operations, kernels, layers and training, on a GPU host. It runs no linters, and
# installs nothing where python has torch already (SLOPE_VENV=none, which it sets itself if SLOPE_VENV is unset).
# --core 0.19: those fast tests alone that build models, train, load or export them, with the newest megatron-core that
# constraints.txt pins, on Python 3.12 (PYTHON, python3.12 or of pyenv), in .venv-core-0.19 (SLOPE_VENV_CORE); no linters.
# Other flags go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."

tier=(-m "not slow")
slurm=${SLOPE_TEST_SLURM:-} gpu= core=
arguments=()
while [ $# -gt 0 ]; do
  argument=$1
  shift
  case $argument in
    --all) tier=() slurm=${slurm:-1} ;;
    --no-slurm) slurm=0 ;;
    --gpu) gpu=1 ;;
    --core)
      core=${1:-}
      [ "$core" = 0.19 ] || {
        echo "tests/run.sh: error: --core is '$core': 0.19 is the one that has an environment of its own" >&2
        exit 2
      }
      shift
      ;;
    -h | --help)
      sed -n '2,7s/^# //p' "$0"
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
if [ "$core" ]; then
  # pyenv's own python3.12 on PATH is a stub that fails where another version is chosen.
  for PYTHON in "${PYTHON:-python3.12}" "$HOME"/.pyenv/versions/3.12.*/bin/python; do
    "$PYTHON" -c "import sys; sys.exit(sys.version_info < (3, 12))" 2>/dev/null && break
    PYTHON=
  done
  [ "$PYTHON" ] || {
    echo "tests/run.sh: error: --core $core wants Python 3.12, and none is there: install it, or set PYTHON" >&2
    exit 2
  }
  SLOPE_VENV=${SLOPE_VENV_CORE:-$PWD/.venv-core-$core}
  slope_environment "$PWD"
  exec python -m pytest --durations=15 "${tier[@]}" tests/models tests/layers tests/export tests/integrations \
    tests/training/test_{checkpoint,engine,pretrain,megatron_ddp,baselines,init_from}.py tests/test_versions.py \
    "${arguments[@]}"
fi
slope_environment "$PWD"

# With --all: a real SLURM on this machine, where there can be one (root, Debian), for some minutes.
export SLOPE_TEST_SLURM=${slurm:-0}

ruff check .
ruff format --check --quiet .
mypy slope_megatron kernels
exec python -m pytest --durations=15 "${tier[@]}" "${arguments[@]}"
