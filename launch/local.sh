#!/usr/bin/env bash
# One training run over several processes of this machine: virtual CPU devices, or its GPUs.
#   launch/local.sh RECIPE [--processes N] [--devices M] [--restarts K] [--kill-and-resume SECONDS] [-- --set path=value ...]
# CPU: N processes of M virtual devices (default 2 x 4). GPUs: one process with all of them unless --processes is given.
# --restarts K: when a process is lost (a signal, or code 75), start all of them again from the last checkpoint, K times.
# --kill-and-resume: SIGKILL all processes after so many seconds, then run the same command again to its end.
# A signal to this script reaches every process: all save at the same step and exit; the same command resumes.
# Exit code: 0 done or stopped by a signal and saved; 75 a process was lost, start it again; else that of the process
# that failed by itself (2: something to change, one line says what).
set -euo pipefail
processes="" devices=4 restarts=0 kill_after="" recipe="" extra=()
number() { # NAME VALUE: VALUE if it is a whole number
  case "$2" in '' | *[!0-9]*) echo "$1 $2: expected a whole number" >&2; exit 2 ;; esac
  echo "$2"
}
while [ $# -gt 0 ]; do
  case "$1" in
    --processes) processes=$(number "$1" "${2:-}"); shift 2 ;;
    --devices) devices=$(number "$1" "${2:-}"); shift 2 ;;
    --restarts) restarts=$(number "$1" "${2:-}"); shift 2 ;;
    --kill-and-resume) kill_after=$(number "$1" "${2:-}"); shift 2 ;;
    --) shift; extra=("$@"); break ;;
    -*) echo "unknown option $1; see the head of $0" >&2; exit 2 ;;
    *) recipe=$1; shift ;;
  esac
done
if [ -z "$recipe" ] || [ "$processes" = 0 ] || [ "$devices" = 0 ]; then
  echo "usage: $0 RECIPE [--processes N] [--devices M] [--restarts K] [--kill-and-resume SECONDS]" >&2
  exit 2
fi
python="${PYTHON:-$(cd "$(dirname "$0")/.." && pwd)/.venv/bin/python}"
[ -x "$python" ] || python=$(command -v python3)
gpus=0
if [ "${JAX_PLATFORMS:-}" != cpu ] && command -v nvidia-smi >/dev/null 2>&1; then
  gpus=$(nvidia-smi -L 2>/dev/null | grep -c '^GPU' || true)
fi
[ -n "$processes" ] || { if [ "$gpus" -gt 0 ]; then processes=1; else processes=2; fi; }
if [ "$gpus" -gt 0 ] && [ "$gpus" -lt "$processes" ]; then
  echo "$gpus GPUs do not suffice for $processes processes; give at most --processes $gpus" >&2
  exit 2
fi
pids=() stopping=""

start() {
  local port i share
  port=$("$python" -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])')
  pids=()
  for ((i = 0; i < processes; i++)); do
    local env=()
    if [ "$processes" -gt 1 ]; then
      env+=("DISTILL_JAX_COORDINATOR=localhost:$port" "DISTILL_JAX_PROCESSES=$processes" "DISTILL_JAX_PROCESS=$i")
    fi
    if [ "$gpus" -gt 0 ]; then
      share=$((gpus / processes))
      env+=("CUDA_VISIBLE_DEVICES=$(seq -s, $((i * share)) $(((i + 1) * share - 1)))")
    else
      env+=("JAX_PLATFORMS=cpu" "XLA_FLAGS=--xla_force_host_platform_device_count=$devices ${XLA_FLAGS:-}")
    fi
    env "${env[@]}" "$python" -m distill_jax train "$recipe" "${extra[@]+"${extra[@]}"}" &
    pids+=($!)
  done
}

running() { # whether process number $1 is
  kill -0 "${pids[$1]}" 2>/dev/null
}

code_of() { # of process number $1, which has ended
  local code=0
  wait "${pids[$1]}" 2>/dev/null || code=$?
  echo "$code" >"$codes/$1"
}

# Until all have ended. When one fails, the others end by themselves within seconds; who does not is ended here.
finish() {
  local i left first="" since=0 code result=0
  codes=$(mktemp -d)
  while :; do
    left=0
    for ((i = 0; i < processes; i++)); do
      [ -e "$codes/$i" ] && continue
      if running "$i"; then left=$((left + 1)); continue; fi
      code_of "$i"
      [ "$(cat "$codes/$i")" = 0 ] || [ -n "$first" ] || { first=$i; since=$SECONDS; }
    done
    [ "$left" -gt 0 ] || break
    if [ -n "$first" ] && [ -z "$stopping" ] && [ $((SECONDS - since)) -ge 15 ]; then
      for ((i = 0; i < processes; i++)); do
        if [ ! -e "$codes/$i" ]; then kill -KILL "${pids[$i]}" 2>/dev/null || true; fi
      done
    fi
    sleep 0.1
  done
  # A failure of its own says more than the end of those who missed another one.
  for ((i = 0; i < processes; i++)); do
    code=$(cat "$codes/$i")
    if [ "$code" -gt 0 ] && [ "$code" -ne 75 ] && [ "$code" -le 128 ]; then result=$code; break; fi
    [ "$code" = 0 ] || result=75
  done
  rm -rf "$codes"
  return "$result"
}

# shellcheck disable=SC2329  # the trap calls it
stop() { stopping=yes; kill -TERM "${pids[@]}" 2>/dev/null || true; }
trap stop TERM INT

start
if [ -n "$kill_after" ]; then
  sleep "$kill_after" &
  wait $! || true
  if kill -KILL "${pids[@]}" 2>/dev/null; then echo "killed after $kill_after s; starting again" >&2; fi
  wait || true
  [ -n "$stopping" ] || start
fi
while :; do
  code=0
  finish || code=$?
  if [ "$code" != 75 ] || [ "$restarts" -le 0 ] || [ -n "$stopping" ]; then break; fi
  restarts=$((restarts - 1))
  echo "a process was lost; starting all $processes again from the last checkpoint ($restarts more times)" >&2
  start
done
exit "$code"
