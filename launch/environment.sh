# Sourced by launch/quickstart.sh and tests/run.sh: makes (or finds) the virtual environment with pinned versions.
#
#   SLOPE_VENV    where the environment is (default: .venv in the repository); none: use the python on PATH as it is
#   PYTHON        the interpreter that makes it (default: python3)
#
# It is made anew when setup.cfg, constraints.txt or the interpreter has changed, and left alone otherwise.

slope_environment() {
  local root=$1
  if [ "${SLOPE_VENV:-}" = none ]; then
    export PYTHONPATH="$root:$root/kernels${PYTHONPATH:+:$PYTHONPATH}"
    return
  fi
  local venv=${SLOPE_VENV:-$root/.venv}
  local python=${PYTHON:-python3}
  local stamp
  stamp=$({ cat "$root/setup.cfg" "$root/constraints.txt"; "$python" --version; } | sha256sum | cut -d' ' -f1)
  if [ "$(cat "$venv/.stamp" 2>/dev/null)" != "$stamp" ]; then
    echo "environment: installing pinned versions into $venv" >&2
    rm -rf "$venv"
    "$python" -m venv "$venv" || {
      echo "slope: error: '$python -m venv' failed: install the venv module (Debian: python3-venv) or set PYTHON" >&2
      return 1
    }
    local pip=("$venv/bin/python" -m pip --disable-pip-version-check install --quiet)
    pip+=(--constraint "$root/constraints.txt")
    # torch alone first: packages that build from source against it must find this one, not the newest.
    "${pip[@]}" "$(grep '^torch==' "$root/constraints.txt")" &&
      "${pip[@]}" --editable "$root[test]" || {
      echo "slope: error: installing into $venv failed, see above: check registry and disk, run this again" >&2
      return 1
    }
    echo "$stamp" > "$venv/.stamp"
  fi
  export PATH="$venv/bin:$PATH" VIRTUAL_ENV="$venv"
}
