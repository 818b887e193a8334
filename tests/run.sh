#!/usr/bin/env bash
# The tests. Without a flag: the fast tier. --all: also many ranks, faults and whole runs. Other flags go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/environment.sh
slope_environment "$PWD"

tier=(-m "not slow")
arguments=()
for argument in "$@"; do
  case $argument in
    --all) tier=() ;;
    --slurm) export SLOPE_TEST_SLURM=1 ;; # with --all: a real SLURM on this machine (Debian, root)
    -h | --help)
      sed -n '2s/^# //p' "$0"
      exit 0
      ;;
    *) arguments+=("$argument") ;;
  esac
done

ruff check .
ruff format --check --quiet .
exec python -m pytest --durations=15 "${tier[@]}" "${arguments[@]}"
