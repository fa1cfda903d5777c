"""A mixture's products in tiles, where the compiler has no grouped product (GPUs, CPUs; `moe.grouped` picks).

XLA turns `ragged_dot` there into masked products of every copy with every expert: E times the FLOPs and the memory.
Here a loop takes up to R copies of one expert a turn, which is a tile, multiplies them with that expert's matrices and
adds the result to their tokens: sum over experts of ceil(copies / R) turns. The backward pass is the same loop and
computes a tile's inner activations again. So nothing of size [N k, D] or [N k, F] exists in either or is kept between
them, whatever the router says.

Legend: N tokens, k experts a token, D hidden size, E experts here, F their inner size, R rows of a tile.
"""

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from distill_jax.core.platform import platform
from distill_jax.models.scores import wide

Array = Any
Kernels = Mapping[str, Array]
Activation = Callable[[Array], Array]
ROWS = {"cpu": (16, 64), "gpu": (64, 1024)}
"""Smallest and largest R. CPU: measured (`benchmarks.experts`). GPU: reckoned, so that a turn's products outlast the
launch of its kernels; not yet run on one."""


def rows_of(copies: float) -> int:
    """R where an expert gets `copies` on average: about half of that, so that padding adds a quarter or so."""
    least, most = ROWS[platform()]
    return min(max(least, 2 ** math.ceil(math.log2(max(copies, 1) / 2))), most)


def tiled(x: Array, shares: Array, kernels: Kernels, order: Array, sizes: Array, *, activation: Activation,
          rows: int) -> Array:
    """sum over a token's copies of share * down(activation(gate(x)) * up(x)): x [N,D], shares [N,k] -> [N,D].

    kernels {"gate", "up": [E,D,F], "down": [E,F,D]}; order i32 [N k]: copies (copy c is of token c // k) sorted by
    expert; sizes i32 [E]: how many each has. Copies after the last expert's add nothing. Sums are float32.
    """
    operands = (x, shares, dict(kernels), order, sizes)
    axes = frozenset().union(*(jax.typeof(a).manual_axis_type.varying for a in jax.tree.leaves(operands)))
    alike = jax.tree.map(partial(_varying, axes=axes), operands)  # within `shard_map` a loop's state has one type
    return _mixture(activation, rows, *alike)


def _varying(a: Array, axes: frozenset[str]) -> Array:
    missing = tuple(sorted(axes - jax.typeof(a).manual_axis_type.varying))
    return jax.lax.pcast(a, missing, to="varying") if missing else a


def _zeros(shape: tuple[int, ...], like: Array) -> Array:
    """Zeros to add up into, varying over the mesh as `like` does."""
    return _varying(jnp.zeros(shape, wide(like.dtype)), jax.typeof(like).manual_axis_type.varying)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _mixture(activation: Activation, rows: int, x: Array, shares: Array, kernels: Kernels, order: Array,
             sizes: Array) -> Array:
    def turn(y: Array, expert: Array, copies: Array, tokens: Array) -> Array:
        gate, up, down = (_of(kernels[name], expert) for name in ("gate", "up", "down"))
        tile, share = _rows(x, tokens), _rows(shares.reshape(-1, 1), copies)
        inner = activation(jnp.dot(tile, gate)) * jnp.dot(tile, up)
        return y.at[tokens].add(_dot(inner * share, down, 1, 0), mode="drop", unique_indices=True)

    return _over_tiles(turn, _zeros(x.shape, x), shares.shape, order, sizes, rows).astype(x.dtype)


def _forward(activation: Activation, rows: int, *operands: Any) -> tuple[Array, Any]:
    return _mixture(activation, rows, *operands), operands


def _backward(activation: Activation, rows: int, operands: Any, dy: Array) -> Any:
    x, shares, kernels, order, sizes = operands

    def turn(sums: Any, expert: Array, copies: Array, tokens: Array) -> Any:
        dx, dshares, dkernels = sums
        gate, up, down = (_of(kernels[name], expert) for name in ("gate", "up", "down"))
        tile, share, g = _rows(x, tokens), _rows(shares.reshape(-1, 1), copies), _rows(dy, tokens)
        inner, pull = jax.vjp(lambda a, b: activation(a) * b, jnp.dot(tile, gate), jnp.dot(tile, up))
        dinner = jax.lax.dot_general(g, down, (((1,), (1,)), ((), ())))
        da, db = (d * share for d in pull(dinner))
        more = {"gate": _dot(tile, da, 0, 0), "up": _dot(tile, db, 0, 0), "down": _dot(inner * share, g, 0, 0)}
        dkernels = {name: _put(k, _of(k, expert) + more[name], expert) for name, k in dkernels.items()}
        dshare = jnp.sum(inner.astype(dx.dtype) * dinner.astype(dx.dtype), axis=-1, keepdims=True)
        dx = dx.at[tokens].add(_dot(da, gate, 1, 1) + _dot(db, up, 1, 1), mode="drop", unique_indices=True)
        return dx, dshares.at[copies].set(dshare, mode="drop", unique_indices=True), dkernels

    start = (_zeros(x.shape, x), _zeros((shares.size, 1), x), {n: _zeros(k.shape, k) for n, k in kernels.items()})
    dx, dshares, dkernels = _over_tiles(turn, start, shares.shape, order, sizes, rows)
    cast = lambda d, a: d.reshape(a.shape).astype(a.dtype)
    return cast(dx, x), cast(dshares, shares), jax.tree.map(cast, dkernels, kernels), None, None


_mixture.defvjp(_forward, _backward)


def _over_tiles(turn: Callable[..., Any], start: Any, shape: tuple[int, ...], order: Array, sizes: Array,
                rows: int) -> Any:
    """`turn(sums, expert, copies i32 [R], tokens i32 [R]) -> sums` of every tile, expert by expert, for (N, k) = shape.

    Within a tile copies and tokens are distinct; rows that are padding have numbers beyond N k and N.
    """
    tokens, top_k = shape
    ends, needed = jnp.cumsum(sizes), (sizes + rows - 1) // rows
    tiles, lane = jnp.cumsum(needed), jnp.arange(rows, dtype=jnp.int32)
    order = jnp.pad(order, (0, rows))  # a slice that begins at the last copy is whole

    def one(number: Array, sums: Any) -> Any:
        expert = jnp.sum(tiles <= number, dtype=jnp.int32)
        first = ends[expert] - sizes[expert] + (number - tiles[expert] + needed[expert]) * rows
        real = first + lane < ends[expert]
        copies = jax.lax.dynamic_slice(order, (first,), (rows,))
        return turn(sums, expert, jnp.where(real, copies, tokens * top_k + lane),
                    jnp.where(real, copies // top_k, tokens + lane))

    return jax.lax.fori_loop(0, tiles[-1], one, start)


def _rows(a: Array, index: Array) -> Array:
    """a[index], 0 where the index is beyond the end."""
    return a.at[index].get(mode="fill", fill_value=0)


def _of(kernel: Array, expert: Array) -> Array:
    return jax.lax.dynamic_index_in_dim(kernel, expert, keepdims=False)


def _put(kernels: Array, kernel: Array, expert: Array) -> Array:
    return jax.lax.dynamic_update_index_in_dim(kernels, kernel, expert, 0)


def _dot(a: Array, b: Array, left: int, right: int) -> Array:
    """Sum over dimension `left` of a and `right` of b, to be added up in float32."""
    return jax.lax.dot_general(a, b, (((left,), (right,)), ((), ())), preferred_element_type=wide(a.dtype))
