"""Attention kernels of single platforms, behind `attention.attend`: splash on TPU, tokamax's on GPU.

They serve `Layout.plain` rows: queries and keys are one row in order, perhaps packed. Legend as in `attention`.
"""

import importlib.util
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from distill_jax.core.platform import platform
from distill_jax.models.scores import Layout, Score, segment_starts

Array = Any
LANES = 128


def splash(q: Array, k: Array, v: Array, layout: Layout, score: Score) -> Array:
    """JAX's splash attention for TPU: blocks that a mask hides are not computed, segments are masked in the kernel.

    Rows are padded to a multiple of 128 tokens. On a CPU it runs interpreted: slow, for tests.
    """
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    heads, length = q.shape[1:3]
    extra = -length % LANES
    pad = lambda x, axis, value=0: jnp.pad(x, [(0, extra if i == axis else 0) for i in range(x.ndim)],
                                           constant_values=value)
    size = length + extra
    mask = masks.CausalMask((size, size)) if score.window is None else masks.LocalMask(
        (size, size), (score.window - 1, 0), 0)
    block = next(n for n in (512, 256, LANES) if size % n == 0)
    run = kernels.make_splash_mha(
        masks.MultiHeadMask([mask] * heads), head_shards=1, q_seq_shards=1, attn_logits_soft_cap=score.soft_cap,
        interpret=platform() != "tpu", block_sizes=kernels.BlockSizes(
            block_q=block, block_kv=block, block_kv_compute=block, block_q_dkv=block, block_kv_dkv=block,
            block_kv_dkv_compute=block, block_q_dq=block, block_kv_dq=block))
    scaled = (q.astype(jnp.float32) * score.scale).astype(q.dtype)
    arrays = (pad(scaled, 2), pad(k, 2), pad(v, 2))
    out: Array
    if layout.q_segments is None:
        out = jax.vmap(run)(*arrays)
    else:
        ids = pad(layout.q_segments, 1, -1)
        out = jax.vmap(lambda q, k, v, ids: run(q, k, v, kernels.SegmentIds(q=ids, kv=ids)))(*arrays, ids)
    return out[:, :, :length].astype(q.dtype)


def tokamax(kind: str, q: Array, k: Array, v: Array, layout: Layout, score: Score) -> Array:
    """tokamax's flash attention; kind: "mosaic" (Hopper, Blackwell), "triton" (Ampere and later), "xla" (anywhere, for
    tests). A query's keys are a range, so blocks before its document or window are skipped."""
    from tokamax._src.ops.attention import api, base  # pyright: ignore[reportMissingImports]

    index = jnp.arange(q.shape[2], dtype=jnp.int32)[None]
    first = jnp.zeros_like(index) if layout.q_segments is None else segment_starts(layout.q_segments)
    if score.window is not None:
        first = jnp.maximum(first, index - score.window + 1)
    run = api.IMPLEMENTATIONS["mosaic_gpu" if kind == "mosaic" else kind]
    swap = lambda x: x.transpose(0, 2, 1, 3)  # [B,T,H,d]
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        out = run(swap(q), swap(k), swap(v), mask=base.Mask(k_start=first[:, None], is_causal=True),
                  logits_scale=score.scale, logits_soft_cap=score.soft_cap)
    return swap(out).astype(q.dtype)


mosaic, triton = partial(tokamax, "mosaic"), partial(tokamax, "triton")


def has_tokamax() -> bool:
    """Whether the optional package is there (`pip install 'distill_jax[tokamax]'`; Python 3.12 or later)."""
    return importlib.util.find_spec("tokamax") is not None


def refuses(name: str, q: Array, layout: Layout) -> str | None:
    """Why a kernel cannot serve these arrays here, or None."""
    if not layout.plain:
        return "queries and keys are not one row in order (a cache, or a row cut over context)"
    if q.dtype not in (jnp.bfloat16, jnp.float32, jnp.float16):
        return f"it does not compute in {q.dtype}"
    if name == "splash":
        return "it is for TPU" if platform() == "gpu" else None
    if not has_tokamax():
        return "tokamax is not installed (pip install 'distill_jax[tokamax]', Python 3.12 or later)"
    if platform() != "gpu":
        return "it is for GPU"
    return "it computes in bfloat16 or float16" if name == "mosaic" and q.dtype == jnp.float32 else None


def preferred(q: Array, layout: Layout) -> str | None:
    """The kernel for these arrays on the platform the program is traced for; None where there is none."""
    if q.shape[2] < 2 * LANES or q.dtype == jnp.float32:  # small, or wanted exact
        return None
    if platform() == "tpu":
        names = ("splash",)
    elif jax.default_backend() == "gpu":  # not when only compiling for one: tokamax asks the device
        hopper = any(x in jax.devices()[0].device_kind for x in ("H100", "H200", "H800", "GH200", "B200", "GB200"))
        names = ("mosaic", "triton") if hopper else ("triton",)
    else:
        return None
    return next((n for n in names if refuses(n, q, layout) is None), None)
