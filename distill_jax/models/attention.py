"""Causal attention over packed, windowed, grouped heads: one function, several implementations.

Legend: B rows, H query heads, K key/value heads, T queries, S keys, d head_dim.
Which pairs see each other is said by `Layout` alone: the same rules serve packed training rows and the cache.
A kernel for one platform is one more entry of KERNELS, and a line in `kernels.preferred` and `kernels.refuses`.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from distill_jax.models.chunked import chunked
from distill_jax.models.kernels import mosaic, preferred, refuses, splash, triton
from distill_jax.models.remat import ATTENTION
from distill_jax.models.scores import NEG, Layout, Score, weighted

Array = Any

DENSE_PAIRS = 1024 * 1024
"""`auto` never forms more query x key pairs than this in one array."""


def attend(q: Array, k: Array, v: Array, layout: Layout, score: Score, implementation: str = "auto") -> Array:
    """q [B,H,T,d], k and v [B,K,S,d] -> [B,H,T,d] in q's dtype; softmax in float32.

    A query that sees no key gets a finite value that means nothing.
    """
    if implementation == "auto":
        implementation = preferred(q, layout) or choose(q.shape[2], k.shape[2])
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"attention {implementation!r} is unknown; known: auto, {', '.join(IMPLEMENTATIONS)}")
    if implementation in KERNELS and (why := refuses(implementation, q, layout)):
        raise ValueError(f"attention {implementation!r} cannot serve this: {why}; use auto, reference or chunked")
    return IMPLEMENTATIONS[implementation](q, k, v, layout, score)


def choose(queries: int, keys: int) -> str:
    """Without a kernel: dense while the scores are small (also every decoding step), memory-linear beyond."""
    return "reference" if queries * keys <= DENSE_PAIRS else "chunked"


def reference(q: Array, k: Array, v: Array, layout: Layout, score: Score) -> Array:
    """All pairs at once: [B,H,T,S] exists."""
    b, h, t, d = q.shape
    kv, s = k.shape[1], k.shape[2]
    grouped = (b, kv, h // kv, t, s)
    scores = score(q.reshape(b, kv, h // kv * t, d), k).reshape(grouped)
    scores = jnp.where(layout.visible(score.window)[:, None, None], scores, NEG)
    p = jax.nn.softmax(scores, axis=-1)
    out = weighted(p.reshape(b, kv, h // kv * t, s), v).reshape(b, h, t, d).astype(q.dtype)
    return checkpoint_name(out, ATTENTION)


Implementation = Callable[[Array, Array, Array, Layout, Score], Array]
KERNELS: dict[str, Implementation] = {"splash": splash, "mosaic": mosaic, "triton": triton}
IMPLEMENTATIONS: dict[str, Implementation] = {"reference": reference, "chunked": chunked, **KERNELS}
