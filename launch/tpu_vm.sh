#!/usr/bin/env bash
# A recipe on all workers of a Cloud TPU VM:
#   launch/tpu_vm.sh NAME ZONE RECIPE [--project P] [--create TYPE [--runtime VERSION] [--spot]] [--restarts K]
#                    [--dry-run] [-- --set path=value ...]
# Copies this checkout to every worker, installs it there (launch/venv.sh) and runs the recipe; the workers find each
# other (DISTILL_JAX_DISTRIBUTED=auto). --create asks for the slice first (e.g. v5p-64, v6e-32) as a queued resource.
# Checkpoints (-- --set saving.at=gs://BUCKET/runs) and stores must lie where all workers see them. A second call
# continues the run.
# Code 75 (a worker was lost) starts all of them again, at most K times (3). --dry-run prints every command.
set -euo pipefail
cd "$(dirname "$0")/.."
name="" zone="" recipe="" project="" type="" runtime="" spot="" restarts=3 dry="" extra=()
while [ $# -gt 0 ]; do
  case "$1" in
    --project) project=${2:?--project needs a value}; shift 2 ;;
    --create) type=${2:?--create needs a type, e.g. v6e-32}; shift 2 ;;
    --runtime) runtime=${2:?--runtime needs a version}; shift 2 ;;
    --restarts) restarts=${2:?--restarts needs a number}; shift 2 ;;
    --spot) spot=1; shift ;;
    --dry-run) dry=1; shift ;;
    --) shift; extra=("$@"); break ;;
    -*) echo "unknown option $1; see the head of $0" >&2; exit 2 ;;
    *)
      if [ -z "$name" ]; then name=$1; elif [ -z "$zone" ]; then zone=$1; elif [ -z "$recipe" ]; then recipe=$1
      else echo "one argument too many: $1" >&2; exit 2; fi
      shift ;;
  esac
done
[ -n "$recipe" ] || { echo "usage: launch/tpu_vm.sh NAME ZONE RECIPE [--create TYPE] [--dry-run] [-- --set path=value]" >&2; exit 2; }
[ -f "$recipe" ] || { echo "no recipe $recipe" >&2; exit 2; }
case "$recipe" in /*) echo "give $recipe relative to the repository: it is copied to the workers" >&2; exit 2 ;; esac
[ -n "$dry" ] || command -v gcloud >/dev/null || { echo "gcloud is not here: install the Google Cloud CLI" >&2; exit 2; }
platform=${type%%-*}
[ -n "$platform" ] || platform=v5e
case "$platform" in v5litepod) platform=v5e ;; esac
where=(--zone "$zone" ${project:+--project "$project"})

run() {
  if [ -n "$dry" ]; then printf '%q ' "$@"; echo; else "$@"; fi
}
on_all() { run gcloud compute tpus tpu-vm ssh "$name" "${where[@]}" --worker=all --command "$1"; }

if [ -n "$type" ]; then
  case "$platform" in v5e) default=v2-alpha-tpuv5-lite ;; v5p) default=v2-alpha-tpuv5 ;; v6e) default=v2-alpha-tpuv6e ;; *) default=tpu-ubuntu2204-base ;; esac
  run gcloud compute tpus queued-resources create "$name" --node-id "$name" "${where[@]}" --accelerator-type "$type" \
    --runtime-version "${runtime:-$default}" ${spot:+--spot}
  if [ -z "$dry" ]; then
    until [ "$(gcloud compute tpus tpu-vm describe "$name" "${where[@]}" --format 'value(state)' 2>/dev/null)" = READY ]; do
      echo "waiting for $name ..." >&2; sleep 30
    done
  fi
fi
archive=$(mktemp "${TMPDIR:-/tmp}/distill_jax.XXXXXX")
trap 'rm -f "$archive"' EXIT
git ls-files -z --cached --others --exclude-standard | tar --null -czf "$archive" -T -
run gcloud compute tpus tpu-vm scp "$archive" "$name:distill_jax.tgz" "${where[@]}" --worker=all
on_all "mkdir -p distill_jax && tar -xzf distill_jax.tgz -C distill_jax && cd distill_jax && launch/venv.sh"
arguments=$(printf '%q ' "$recipe" "${extra[@]+"${extra[@]}"}")
train="cd distill_jax && . launch/env.sh && distill_jax_env \"\$(distill_jax_platform)\" && DISTILL_JAX_DISTRIBUTED=auto .venv/bin/python -m distill_jax train $arguments"
for ((turn = 0; ; turn++)); do
  code=0
  on_all "$train" || code=$?
  [ "$code" = 75 ] && [ "$turn" -lt "$restarts" ] || exit "$code"
  echo "a worker was lost: start $((turn + 2))" >&2
done
