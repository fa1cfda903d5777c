#!/usr/bin/env bash
# One training run over several processes of this machine: virtual CPU devices, or its GPUs.
#   launch/local.sh RECIPE [--processes N] [--devices M] [--kill-and-resume SECONDS] [-- --set path=value ...]
# CPU: N processes of M virtual devices (default 2 x 4). GPUs: one process with all of them unless --processes is given.
# --kill-and-resume: SIGKILL all processes after so many seconds, then run the same command again to its end.
# A signal to this script reaches every process: all save at the same step and exit; the same command resumes.
set -euo pipefail
processes="" devices=4 kill_after="" recipe="" extra=()
while [ $# -gt 0 ]; do
  case "$1" in
    --processes) processes=$2; shift 2 ;;
    --devices) devices=$2; shift 2 ;;
    --kill-and-resume) kill_after=$2; shift 2 ;;
    --) shift; extra=("$@"); break ;;
    -*) echo "unknown option $1; see the head of $0" >&2; exit 2 ;;
    *) recipe=$1; shift ;;
  esac
done
[ -n "$recipe" ] || { echo "usage: $0 RECIPE [--processes N] [--devices M] [--kill-and-resume SECONDS]" >&2; exit 2; }
python="${PYTHON:-$(cd "$(dirname "$0")/.." && pwd)/.venv/bin/python}"
[ -x "$python" ] || python=$(command -v python3)
gpus=0
if [ "${JAX_PLATFORMS:-}" != cpu ] && command -v nvidia-smi >/dev/null 2>&1; then
  gpus=$(nvidia-smi -L 2>/dev/null | grep -c '^GPU' || true)
fi
[ -n "$processes" ] || { if [ "$gpus" -gt 0 ]; then processes=1; else processes=2; fi; }
pids=()

start() {
  local port i
  port=$("$python" -c 'import socket; s = socket.socket(); s.bind(("localhost", 0)); print(s.getsockname()[1])')
  pids=()
  for ((i = 0; i < processes; i++)); do
    local env=()
    if [ "$processes" -gt 1 ]; then
      env+=("DISTILL_JAX_COORDINATOR=localhost:$port" "DISTILL_JAX_PROCESSES=$processes" "DISTILL_JAX_PROCESS=$i")
    fi
    if [ "$gpus" -gt 0 ]; then
      local share=$((gpus / processes))
      [ "$share" -gt 0 ] || { echo "$gpus GPUs do not suffice for $processes processes" >&2; exit 2; }
      env+=("CUDA_VISIBLE_DEVICES=$(seq -s, $((i * share)) $(((i + 1) * share - 1)))")
    else
      env+=("JAX_PLATFORMS=cpu" "XLA_FLAGS=--xla_force_host_platform_device_count=$devices ${XLA_FLAGS:-}")
    fi
    env "${env[@]}" "$python" -m distill_jax train "$recipe" "${extra[@]+"${extra[@]}"}" &
    pids+=($!)
  done
}

finish() { # the exit code of the first process that failed, the others are then ended too
  local code=0 pid
  for pid in "${pids[@]}"; do
    wait "$pid" || { code=$?; kill "${pids[@]}" 2>/dev/null || true; break; }
  done
  wait || true
  return "$code"
}

stop() { kill -TERM "${pids[@]}" 2>/dev/null || true; finish && exit 0; exit 1; }
trap stop TERM INT

start
if [ -n "$kill_after" ]; then
  sleep "$kill_after" &
  wait $!
  if kill -KILL "${pids[@]}" 2>/dev/null; then echo "killed after $kill_after s; starting again" >&2; fi
  wait || true
  start
fi
finish
