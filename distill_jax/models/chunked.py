"""Attention in memory linear in the row: online softmax over blocks of keys, scores recomputed backward.

The algorithm is FlashAttention-2 (Dao 2023) written as XLA loops. Blocks no query of which sees a key (the future,
another document, outside the window) are skipped by the loop bounds, so a packed row costs what its documents cost.
Legend as in `scores`; BQ, BK: block sizes; NQ, NK: numbers of blocks.
"""

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from distill_jax.models.remat import ATTENTION
from distill_jax.models.scores import NEG, Layout, Score, weighted, wide

Array = Any
BLOCK = 512
TINY = 1e-30


@dataclass(frozen=True)
class _Static:
    score: Score
    bq: int
    bk: int


def chunked(q: Array, k: Array, v: Array, layout: Layout, score: Score, block: int = BLOCK) -> Array:
    """`attention.attend` without any [T,S] array; the block need not divide T or S."""
    b, h, t, d = q.shape
    kv, s = k.shape[1], k.shape[2]
    static = _Static(score, min(block, t), min(block, s))
    q_pad, k_pad = -t % static.bq, -s % static.bk
    pad = lambda x, axis, n, value=0: _pad(x, axis, n, value) if n else x
    padded = Layout(  # padded keys lie in the future of every query, padded queries before every key
        q_index=pad(layout.q_index, 1, q_pad, -1), k_index=pad(layout.k_index, 1, k_pad, jnp.iinfo(jnp.int32).max),
        q_segments=None if layout.q_segments is None else pad(layout.q_segments, 1, q_pad),
        k_segments=None if layout.k_segments is None else pad(layout.k_segments, 1, k_pad))
    q5 = pad(q.reshape(b, kv, h // kv, t, d), 3, q_pad)
    out: Array = _attend(static, q5, pad(k, 2, k_pad), pad(v, 2, k_pad), padded)
    return out[:, :, :, :t].reshape(b, h, t, d)


def _pad(x: Array, axis: int, n: int, value: int) -> Array:
    width = [(0, n if i == axis else 0) for i in range(x.ndim)]
    return jnp.pad(x, width, constant_values=value)


def _cut(x: Array, i: Array, size: int, axis: int) -> Array:
    return jax.lax.dynamic_slice_in_dim(x, i * size, size, axis)


def _put_add(x: Array, new: Array, i: Array, size: int, axis: int) -> Array:
    return jax.lax.dynamic_update_slice_in_dim(x, _cut(x, i, size, axis) + new, i * size, axis)


def _ranges(static: _Static, layout: Layout) -> tuple[Array, Array]:
    """For each block of queries, the first and one past the last block of keys it needs: i32 [NQ] twice.

    Decided from the extremes of a block, over all rows: never skips a visible pair.
    """
    ends = lambda x, size: (x.reshape(x.shape[0], -1, size).min(-1), x.reshape(x.shape[0], -1, size).max(-1))
    q_min, q_max = ends(layout.q_index, static.bq)
    k_min, k_max = ends(layout.k_index, static.bk)
    needed = k_min[:, None, :] <= q_max[:, :, None]
    if static.score.window is not None:
        needed &= k_max[:, None, :] > q_min[:, :, None] - static.score.window
    if layout.q_segments is not None and layout.k_segments is not None:
        qs_min, qs_max = ends(layout.q_segments, static.bq)
        ks_min, ks_max = ends(layout.k_segments, static.bk)
        needed &= (ks_min[:, None, :] <= qs_max[:, :, None]) & (ks_max[:, None, :] >= qs_min[:, :, None])
    needed = needed.any(0)
    some = needed.any(-1)
    first = jnp.argmax(needed, axis=-1)
    last = needed.shape[1] - jnp.argmax(needed[:, ::-1], axis=-1)
    return jnp.where(some, first, 0).astype(jnp.int32), jnp.where(some, last, 0).astype(jnp.int32)


def _block_layout(static: _Static, layout: Layout, i: Array, j: Array) -> Layout:
    q = lambda x: None if x is None else _cut(x, i, static.bq, 1)
    k = lambda x: None if x is None else _cut(x, j, static.bk, 1)
    return Layout(q_index=q(layout.q_index), k_index=k(layout.k_index),
                  q_segments=q(layout.q_segments), k_segments=k(layout.k_segments))


def _scores(static: _Static, layout: Layout, qi: Array, kj: Array, i: Array, j: Array) -> tuple[Array, Array]:
    """qi [B,K,G*BQ,d], kj [B,K,BK,d] -> scores f32 and visible bool, both [B,K,G*BQ,BK]."""
    s = static.score(qi, kj)
    seen = _block_layout(static, layout, i, j).visible(static.score.window)  # [B|1,BQ,BK]
    groups = qi.shape[2] // static.bq
    wide = jnp.broadcast_to(seen[:, None, None], (s.shape[0], s.shape[1], groups, static.bq, static.bk))
    return s, wide.reshape(s.shape)


def _forward(static: _Static, q: Array, k: Array, v: Array, layout: Layout) -> tuple[Array, Array]:
    """-> out [B,K,G,T,d], log of the softmax denominators f32 [B,K,G,T]."""
    b, kv, g, t, d = q.shape
    first, last = _ranges(static, layout)

    def q_block(i: Array) -> tuple[Array, Array]:
        qi = _cut(q, i, static.bq, 3).reshape(b, kv, g * static.bq, d)

        def k_block(j: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            top, total, acc = carry
            s, seen = _scores(static, layout, qi, _cut(k, j, static.bk, 2), i, j)
            new_top = jnp.maximum(top, jnp.max(jnp.where(seen, s, NEG), axis=-1))
            p = jnp.where(seen, jnp.exp(s - new_top[..., None]), 0.0)
            fade = jnp.exp(top - new_top)
            acc = acc * fade[..., None] + weighted(p, _cut(v, j, static.bk, 2))
            return new_top, total * fade + p.sum(-1), acc

        rows, f = (b, kv, g * static.bq), wide(q.dtype)
        start = (jnp.full(rows, NEG, f), jnp.zeros(rows, f), jnp.zeros((*rows, d), f))
        top, total, acc = jax.lax.fori_loop(first[i], last[i], k_block, start)
        total = jnp.maximum(total, TINY)
        out = (acc / total[..., None]).astype(q.dtype)
        return out.reshape(b, kv, g, static.bq, d), (top + jnp.log(total)).reshape(b, kv, g, static.bq)

    out, lse = jax.lax.map(q_block, jnp.arange(t // static.bq))  # leading NQ
    return jnp.moveaxis(out, 0, 3).reshape(b, kv, g, t, d), jnp.moveaxis(lse, 0, 3).reshape(b, kv, g, t)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(static: _Static, q: Array, k: Array, v: Array, layout: Layout) -> Array:
    return _forward(static, q, k, v, layout)[0]


def _attend_fwd(static: _Static, q: Array, k: Array, v: Array, layout: Layout) -> tuple[Array, Any]:
    out, lse = (checkpoint_name(x, ATTENTION) for x in _forward(static, q, k, v, layout))
    return out, (q, k, v, layout, out, lse)


def _attend_bwd(static: _Static, saved: Any, d_out: Array) -> tuple[Array, Array, Array, None]:
    q, k, v, layout, out, lse = saved
    b, kv, g, t, d = q.shape
    first, last = _ranges(static, layout)
    cap, rows = static.score.soft_cap, (b, kv, g * static.bq)
    f = wide(q.dtype)
    delta = jnp.sum(d_out.astype(f) * out.astype(f), axis=-1)  # [B,K,G,T]
    across = (((2,), (2,)), ((0, 1), (0, 1)))  # contract queries
    dot = functools.partial(jax.lax.dot_general, preferred_element_type=f)

    def q_block(carry: tuple[Array, Array], i: Array) -> tuple[tuple[Array, Array], Array]:
        qi, gi = (_cut(x, i, static.bq, 3).reshape(*rows, d) for x in (q, d_out))
        li, di = (_cut(x, i, static.bq, 3).reshape(*rows, 1) for x in (lse, delta))

        def k_block(j: Array, inner: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            dq, dk, dv = inner
            kj, vj = _cut(k, j, static.bk, 2), _cut(v, j, static.bk, 2)
            s, seen = _scores(static, layout, qi, kj, i, j)
            p = jnp.where(seen, jnp.exp(s - li), 0.0)
            dp = dot(gi, vj, (((3,), (3,)), ((0, 1), (0, 1))))
            ds = p * (dp - di) * static.score.scale
            if cap is not None:
                ds = ds * (1.0 - jnp.square(s / cap))
            ds = ds.astype(q.dtype)
            dv = _put_add(dv, dot(p.astype(q.dtype), gi, across), j, static.bk, 2)
            dk = _put_add(dk, dot(ds, qi, across), j, static.bk, 2)
            return dq + weighted(ds, kj), dk, dv

        dq, dk, dv = jax.lax.fori_loop(first[i], last[i], k_block, (jnp.zeros((*rows, d), f), *carry))
        return (dk, dv), dq.reshape(b, kv, g, static.bq, d).astype(q.dtype)

    start = (jnp.zeros(k.shape, f), jnp.zeros(v.shape, f))
    (dk, dv), dq = jax.lax.scan(q_block, start, jnp.arange(t // static.bq))
    return jnp.moveaxis(dq, 0, 3).reshape(q.shape), dk.astype(k.dtype), dv.astype(v.dtype), None


_attend.defvjp(_attend_fwd, _attend_bwd)
