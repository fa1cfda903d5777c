"""The key/value cache of a decoder, for all layers at once."""

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp

Array = Any


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Cache:
    """k, v [L,B,K,S,head_dim]: rotated keys, and values; slot s is a row's s-th token. lengths i32 [B]: slots used.

    L layers, B rows, K key/value heads, S capacity. Rows are independent: `rows` and `put` move them between caches.
    A token written beyond S is dropped silently (nothing data-dependent can raise inside jit): size S for the
    prompt and everything generated.
    """

    k: Array
    v: Array
    lengths: Array

    @property
    def capacity(self) -> int:
        return self.k.shape[3]

    def rows(self, index: Array) -> "Cache":
        """The rows `index` i32 [N] (repetitions allowed: a prompt prefilled once serves several samples)."""
        return Cache(k=self.k[:, index], v=self.v[:, index], lengths=self.lengths[index])

    def put(self, index: Array, other: "Cache") -> "Cache":
        """Rows `index` i32 [N] replaced by the N rows of `other` (same capacity); an index >= B is dropped."""
        put = lambda mine, new: mine.at[:, index].set(new.astype(mine.dtype), mode="drop")
        return Cache(k=put(self.k, other.k), v=put(self.v, other.v),
                     lengths=self.lengths.at[index].set(other.lengths, mode="drop"))

    def grow(self, capacity: int) -> "Cache":
        """The same cache with room for `capacity` tokens a row."""
        pad = [(0, 0)] * 3 + [(0, capacity - self.capacity), (0, 0)]
        return replace(self, k=jnp.pad(self.k, pad), v=jnp.pad(self.v, pad))


def new_cache(layers: int, batch: int, heads: int, length: int, head_dim: int, dtype: Any) -> Cache:
    zeros = lambda: jnp.zeros((layers, batch, heads, length, head_dim), dtype)  # a buffer each: both can be donated
    return Cache(k=zeros(), v=zeros(), lengths=jnp.zeros((batch,), jnp.int32))


def slots(lengths: Array, real: Array) -> tuple[Array, Array]:
    """Where new tokens go: lengths i32 [B], real bool [B,T] -> (index i32 [B,T], new lengths i32 [B]).

    index of a real token is its slot; that of padding is the slot of the last real token before it (at least
    `lengths - 1`), so that its attention, which nobody reads, still has keys to look at.
    """
    count = jnp.cumsum(real.astype(jnp.int32), axis=1)
    return lengths[:, None] + count - 1, lengths + count[:, -1]


def write(buffer: Array, layer: Array, new: Array, index: Array, real: Array) -> Array:
    """buffer [L,B,K,S,head_dim] with new [B,K,T,head_dim] stored at its slots of `layer`; padding is dropped."""
    target = jnp.where(real, index, buffer.shape[3])  # one past the end: dropped
    rows = jnp.arange(buffer.shape[1])[:, None]
    heads_last = new.transpose(0, 2, 1, 3).astype(buffer.dtype)  # [B,T,K,head_dim]: order of the indexed result
    return buffer.at[layer, rows, :, target].set(heads_last, mode="drop")
