#!/usr/bin/env bash
# Correctness on the GPU, then the benchmarks, one after another; prints what it finds, writes OUT/*.txt.
#   benchmarks/run_gpu.sh [OUT] [--wheels FOLDER]     no network; of wheels only what is in FOLDER is installed
# PYTHON is the interpreter (default: .venv/bin/python, else python3).
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1
out=gpu-results wheels=""
while [ $# -gt 0 ]; do
  case "$1" in
    --wheels) wheels=${2:?--wheels needs a folder}; shift 2 ;;
    -*) echo "unknown option $1; see the head of $0" >&2; exit 2 ;;
    *) out=$1; shift ;;
  esac
done
python="${PYTHON:-.venv/bin/python}"
command -v "$python" >/dev/null || python=python3
mkdir -p "$out"
[ -z "$wheels" ] || "$python" -m pip install --quiet --no-index --no-deps "$wheels"/*.whl || exit 1
# shellcheck source=/dev/null
. launch/env.sh
distill_jax_env "$(distill_jax_platform)"
failed=0
run() { # NAME COMMAND...: its output into OUT/NAME.txt, and here
  local name=$1
  shift
  echo "== $name: $*"
  if ! "$@" 2>&1 | tee "$out/$name.txt"; then
    echo "== $name failed" >&2
    failed=1
  fi
}
run device "$python" -c 'import jax; d = jax.devices(); print(jax.__version__, len(d), d[0].device_kind)'
JAX_PLATFORMS=cuda run correctness "$python" -m pytest -q -n0 -x tests/models/test_attention.py tests/models/test_kernels.py tests/models/test_transformer.py tests/objective/test_lift.py tests/train/test_step.py
run train "$python" -m benchmarks.train --sizes 0.5B 1.5B
run train_16k "$python" -m benchmarks.train --sizes 1.5B --rows 2 --length 16384
run train_7b "$python" -m benchmarks.train --sizes 7B --rows 2 --remat full
run loss "$python" -m benchmarks.loss --dtype bfloat16 --width 1536 --tokens 8192
run store "$python" -m benchmarks.store
run rollout "$python" -m benchmarks.rollout
if "$python" -c 'import torch' 2>/dev/null; then run peers "$python" -m benchmarks.peers --size 100m --length 1024; fi
exit "$failed"
