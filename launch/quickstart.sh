#!/usr/bin/env bash
# From a fresh machine to a 2:4 pretraining run beside its dense twin, and a report. `--help` lists the flags.
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/environment.sh
slope_environment "$PWD"
exec slope quickstart "$@"
