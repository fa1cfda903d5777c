"""Draws of outcomes from a distribution over the vocabulary. Shapes: C tokens, V vocabulary, n draws."""

from typing import Any

import jax
import jax.numpy as jnp

Array = Any
BLOCK = 512
"""Ids a running sum goes over at a time."""


def uniform(seeds: Array, positions: Array) -> Array:
    """A number in [0,1) for each token, a function of its row's content and its place in it alone: [C]."""
    key = lambda seed, at: jax.random.fold_in(jax.random.fold_in(jax.random.key(0), seed), at)
    return jax.vmap(lambda s, t: jax.random.uniform(key(s, t), dtype=jnp.float32))(seeds, positions)


def systematic(p: Array, u: Array, n: int) -> Array:
    """n draws of each distribution by systematic sampling: the quantiles (u + j) / n, j < n, of the ids in order.

    p float32 [C,V], not necessarily normalised; u [C] in [0,1) -> int32 ids [C,n], not descending. Every id is drawn
    n p times on average, as by independent draws, but never more than one draw from it: the same expectation, less
    variance. Found by two levels of running sums, over blocks of ids and inside one: float32 over the whole vocabulary
    would lose the rare ones.
    """
    rows, vocab = p.shape
    blocks = jnp.pad(p, ((0, 0), (0, -vocab % BLOCK))).reshape(rows, -1, BLOCK)
    masses = jnp.sum(blocks, axis=-1)
    upto = jnp.cumsum(masses, axis=-1)
    below = lambda x, top: jnp.minimum(x, jnp.nextafter(top, jnp.zeros_like(top)))
    place = (u[:, None] + jnp.arange(n, dtype=jnp.float32)[None]) / n * upto[:, -1:]
    place = below(place, upto[:, -1:])  # rounding must not lead past the last id, nor to one without mass
    block = jnp.sum(upto[:, None, :] <= place[..., None], axis=-1, dtype=jnp.int32)
    take = lambda x: jnp.take_along_axis(x, block, axis=1)
    inside = jnp.cumsum(jnp.take_along_axis(blocks, block[..., None], axis=1), axis=-1)
    rest = below(place - (take(upto) - take(masses)), inside[..., -1])
    return block * BLOCK + jnp.sum(inside <= rest[..., None], axis=-1, dtype=jnp.int32)


def merge(ids: Array, weights: Array) -> tuple[Array, Array]:
    """Draws [C,n] with equal ids side by side -> distinct ids first (-1 behind them), weights added up."""
    first = jnp.concatenate([jnp.ones_like(ids[:, :1], bool), ids[:, 1:] != ids[:, :-1]], axis=1)
    slot = jnp.cumsum(first, axis=1, dtype=jnp.int32) - 1
    row = jnp.arange(ids.shape[0])[:, None]
    return jnp.full_like(ids, -1).at[row, slot].set(ids), jnp.zeros_like(weights).at[row, slot].add(weights)
