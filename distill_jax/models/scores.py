"""Which pairs of tokens see each other, and how a pair is scored: shared by every attention implementation.

Legend: B rows, H query heads, K key/value heads, G = H/K, T queries, S keys, d head_dim.
"""

from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp

Array = Any
NEG = -1e30


def wide(dtype: Any) -> Any:
    """The dtype of norms, softmax and parameters when computing in `dtype`: float32, or float64 for float64."""
    return jnp.float64 if dtype == jnp.float64 else jnp.float32


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Layout:
    """Where queries and keys stand.

    q_index i32 [B|1,T], k_index i32 [B|1,S]: a query sees keys of no larger index (and within the window).
    q_segments i32 [B,T], k_segments i32 [B,S] or None: only keys of its own segment.
    plain: queries and keys are the same row in order, index 0 to T-1; what kernels of one platform serve.
    """

    q_index: Array
    k_index: Array
    q_segments: Array | None = None
    k_segments: Array | None = None
    plain: bool = field(default=False, metadata={"static": True})

    def visible(self, window: int | None) -> Array:
        """bool [B|1,T,S]."""
        q, k = self.q_index[:, :, None], self.k_index[:, None, :]
        seen = k <= q
        if window is not None:
            seen &= k > q - window
        if self.q_segments is not None and self.k_segments is not None:
            seen &= self.q_segments[:, :, None] == self.k_segments[:, None, :]
        return seen


@dataclass(frozen=True, kw_only=True)
class Score:
    """How a pair is scored: scale * q.k, capped by soft_cap * tanh(. / soft_cap), within `window` tokens."""

    scale: float
    window: int | None = None
    soft_cap: float | None = None

    def __call__(self, q: Array, k: Array) -> Array:
        """q [B,K,N,d], k [B,K,S,d] -> float32 [B,K,N,S]."""
        s = jax.lax.dot_general(q, k, (((3,), (3,)), ((0, 1), (0, 1))), preferred_element_type=wide(q.dtype))
        s = s * self.scale
        return s if self.soft_cap is None else self.soft_cap * jnp.tanh(s / self.soft_cap)


def segment_starts(segment_ids: Array) -> Array:
    """i32 [B,T]: index of the first token of the run of equal segment ids that each token stands in."""
    index = jnp.broadcast_to(jnp.arange(segment_ids.shape[1], dtype=jnp.int32)[None], segment_ids.shape)
    begins = jnp.pad(segment_ids[:, 1:] != segment_ids[:, :-1], ((0, 0), (1, 0)), constant_values=True)
    return jax.lax.cummax(jnp.where(begins, index, 0), axis=1)


def weighted(p: Array, v: Array) -> Array:
    """p [B,K,N,S], v [B,K,S,d] -> float32 [B,K,N,d]; the product runs in v's dtype."""
    return jax.lax.dot_general(p.astype(v.dtype), v, (((3,), (2,)), ((0, 1), (0, 1))),
                               preferred_element_type=wide(v.dtype))
