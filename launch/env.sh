# shellcheck shell=bash
# Settings of the XLA compilers and libraries, one table a platform. Sourced by the scripts of this folder:
#   . launch/env.sh; distill_jax_env h100        prints nothing, exports
# Platforms: cpu, a100, h100 (also h200, b200), v5e, v5p, v6e. What the caller has set already is kept, and comes last:
# of a flag given twice XLA takes the later one. A flag that a compiler does not know ends the process, so every flag
# of the GPU table is tried by tests/launch/test_scripts.py on the jaxlib that is installed.

# Compiled programs are kept between starts: a restart after a preemption then begins in seconds.
distill_jax_cache() {
  export JAX_COMPILATION_CACHE_DIR="${JAX_COMPILATION_CACHE_DIR:-${XDG_CACHE_HOME:-$HOME/.cache}/distill_jax/xla}"
  export JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="${JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS:-5}"
}

# flag | why. The combining thresholds suit FSDP: a layer's kernels in one all-gather, not all layers' in one.
distill_jax_gpu_flags() {
  cat <<'TABLE'
--xla_gpu_enable_latency_hiding_scheduler=true | gathers of the next layer run under the products of this one
--xla_gpu_all_gather_combine_threshold_bytes=134217728 | parameters of about a layer at a time
--xla_gpu_reduce_scatter_combine_threshold_bytes=134217728 | gradients of about a layer at a time
--xla_gpu_all_reduce_combine_threshold_bytes=134217728 | gradients between replicas
--xla_gpu_enable_pipelined_reduce_scatter=true | moved across the loop over layers, so that it hides; not all-gather, which keeps every layer
--xla_gpu_enable_while_loop_double_buffering=true | the loop over layers twice in its body: no copies of gathered kernels
TABLE
}

distill_jax_tpu_flags() {
  cat <<'TABLE'
--xla_tpu_enable_async_collective_fusion=true | gathers and scatters run beside products
--xla_tpu_enable_async_collective_fusion_fuse_all_gather=true | as above, for FSDP's gathers
--xla_tpu_overlap_compute_collective_tc=true | as above, for what stays on the tensor core
--xla_enable_async_all_gather=true | starts early, waits late
--xla_tpu_prefer_async_allgather_to_allreduce=true | over a whole slice it is an all-reduce else: twice the bytes
--xla_tpu_enable_sparse_core_collective_offload_reduce_scatter=true | as above, for gradients; on the SparseCores
--xla_tpu_enable_sparse_core_collective_offload_nd_reduce_scatter=true | as above, over two and three axes of the torus
TABLE
}

distill_jax_flags() { # PLATFORM: the flags alone, on one line
  case "$1" in
    a100 | h100 | h200 | b200) distill_jax_gpu_flags ;;
    v5e | v5p | v6e) distill_jax_tpu_flags ;;
    cpu) return 0 ;;
    *) echo "unknown platform $1; known: cpu a100 h100 h200 b200 v5e v5p v6e" >&2; return 2 ;;
  esac | cut -d' ' -f1 | tr '\n' ' '
}

distill_jax_env() { # PLATFORM
  local flags
  flags=$(distill_jax_flags "$1") || return 2
  distill_jax_cache
  case "$1" in
    v5e | v5p | v6e) export LIBTPU_INIT_ARGS="$flags${LIBTPU_INIT_ARGS:-}" ;;
    cpu) export JAX_PLATFORMS="${JAX_PLATFORMS:-cpu}" ;;
    *)
      export XLA_FLAGS="$flags${XLA_FLAGS:-}"
      export XLA_PYTHON_CLIENT_MEM_FRACTION="${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.92}" # what `plan` reckons with
      export NCCL_DEBUG="${NCCL_DEBUG:-WARN}"
      ;;
  esac
}

distill_jax_platform() { # what this machine is
  local name
  if command -v nvidia-smi >/dev/null 2>&1 && name=$(nvidia-smi --query-gpu=name --format=csv,noheader 2>/dev/null | head -1); then
    case "$name" in *GH200* | *H100*) echo h100 ;; *H200*) echo h200 ;; *B200*) echo b200 ;; *) echo a100 ;; esac
  elif [ -e /dev/accel0 ] || [ -e /dev/vfio/0 ]; then
    case "${TPU_ACCELERATOR_TYPE:-}" in v5p* | v5-*) echo v5p ;; v6e*) echo v6e ;; *) echo v5e ;; esac
  else
    echo cpu
  fi
}
