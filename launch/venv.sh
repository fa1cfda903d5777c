#!/usr/bin/env bash
# Make .venv with everything a target needs, with whatever Python from 3.11 to 3.14 this machine can really run.
#   launch/venv.sh [EXTRA ...]      e.g. launch/venv.sh dev ; EXTRAS cuda/tpu are added from the hardware present
# PYTHON=/path/to/python overrides the search. Repeated calls are free: a stamp holds what was installed.
set -euo pipefail
cd "$(dirname "$0")/.."
venv="${VENV:-.venv}"
extras=("$@")

# A python that runs, is 3.11-3.14 and can make a virtual environment. Shims that exist but do not run are skipped.
works() {
  "$1" -c 'import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 14))' >/dev/null 2>&1
}
find_python() {
  local name
  for name in ${PYTHON:+"$PYTHON"} python3.12 python3.11 python3.13 python3.14 python3 python; do
    if command -v "$name" >/dev/null 2>&1 && works "$name"; then echo "$name"; return 0; fi
  done
  return 1
}

if [ ! -x "$venv/bin/python" ]; then
  if command -v uv >/dev/null 2>&1; then
    uv venv --quiet --python "${PYTHON:->=3.11,<3.15}" "$venv"
  elif python=$(find_python); then
    "$python" -m venv "$venv"
  else
    echo "No usable Python: need 3.11, 3.12, 3.13 or 3.14 with the venv and ensurepip modules." >&2
    echo "Install one, e.g.  apt-get install python3 python3-venv   (Debian/Ubuntu)," >&2
    echo "dnf install python3.12   (Fedora/RHEL), or https://docs.astral.sh/uv, then run this again." >&2
    exit 1
  fi
fi
minor=$("$venv/bin/python" -c 'import sys; print(sys.version_info[1])')
constraints="constraints-py311.txt"
[ "$minor" -ge 12 ] && constraints="constraints-py312.txt"

if command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L >/dev/null 2>&1; then extras+=(cuda)
elif [ -e /dev/accel0 ] || [ -e /dev/vfio/0 ]; then extras+=(tpu gcs); fi
spec="."
[ ${#extras[@]} -gt 0 ] && spec=".[$(IFS=,; echo "${extras[*]}")]"

stamp="$venv/.installed-$(echo "$spec" | tr -c 'a-zA-Z0-9\n' '_')"
want=$(cat pyproject.toml "$constraints" | cksum)
if [ ! -f "$stamp" ] || [ "$(cat "$stamp")" != "$want" ]; then
  echo "installing $spec into $venv ($constraints) ..." >&2
  if command -v uv >/dev/null 2>&1; then
    uv pip install --quiet --python "$venv/bin/python" -c "$constraints" -e "$spec"
  else
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check -c "$constraints" -e "$spec"
  fi
  echo "$want" > "$stamp"
fi
