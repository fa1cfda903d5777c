"""What a model does by hand on a mesh, where automatic partitioning moves more than it must.

The embedding is looked up where it lies, attention runs on each device's own rows, heads and queries. With `context`
the tokens of a row are cut too: queries stay, keys and values (small, with grouped heads) are gathered. For causal rows
a plain cut gives the last device most of the work, so the tokens are taken in zig-zag order: of 2C pieces, device i of
C has pieces i and 2C-1-i (Llama 3, 2407.21783, 3.3.2). Order matters to attention alone, which reads it from `Layout`.

Legend: B rows, T tokens, D width, V vocabulary, H heads, K key/value heads, d head_dim, C devices along `context`.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from distill_jax.models.config import ModelConfig
from distill_jax.models.scores import Layout
from distill_jax.sharding import active_rules, auto_axes, fit_spec
from distill_jax.sharding.rules import axes_of, entries

Array = Any
Attend = Callable[[Array, Array, Array, Layout], Array]


def lookup(table: Array, tokens: Array, dtype: Any) -> Array:
    """table [V,D], tokens i32 [B,T] -> [B,T,D] in `dtype`.

    On a mesh that cuts the table (V over one axis, D over another that cuts rows too) ids and looked-up states travel,
    never the table: each device looks up its part of the width for the rows of all, and they are exchanged.
    """
    sizes = auto_axes()
    vocab, width = entries(fit_spec(active_rules().param_spec("embed/embedding"), table.shape, sizes), 2)
    rows, columns = entries(fit_spec(active_rules().activation_spec("tokens"), tokens.shape, sizes), 2)
    if not (vocab or width) or (width and width not in axes_of(rows)):
        return jnp.take(table, tokens, axis=0).astype(dtype)

    def local(table: Array, ids: Array) -> Array:
        if width:
            ids = jax.lax.all_gather(ids, width, axis=0, tiled=True)
        here = ids - jax.lax.axis_index(vocab) * table.shape[0] if vocab else ids
        x = jnp.take(table, here, axis=0, mode="clip").astype(dtype)
        if vocab:
            x = jnp.where(((here >= 0) & (here < table.shape[0]))[..., None], x, jnp.zeros((), dtype))
        if width:
            x = jax.lax.all_to_all(x, width, split_axis=0, concat_axis=2, tiled=True)
        return jax.lax.psum(x, vocab) if vocab else x

    return jax.shard_map(local, in_specs=(P(vocab, width), P(rows, columns)), out_specs=P(rows, columns),
                         check_vma=False)(table, tokens)


def spread(attend: Attend, q: Array, k: Array, v: Array, layout: Layout) -> Array:
    """`attend(q, k, v, layout)` of whole arrays, each device on its share; q [B,H,T,d], k and v [B,K,T,d]."""
    sizes = auto_axes()
    rows, heads, columns = entries(fit_spec(active_rules().activation_spec("heads"), q.shape, sizes), 4)[:3]
    if not (rows or heads or columns):
        return attend(q, k, v, layout)
    groups = q.shape[1] // k.shape[1]
    shared = heads and k.shape[1] % sizes[heads] != 0  # fewer key/value heads than devices, or none that divide
    if shared and groups % (q.shape[1] // sizes[heads]):
        heads, shared = None, False
    by_token = lambda x: None if x is None else P(None if x.shape[0] == 1 else rows, columns)
    spec = P(rows, None if shared else heads, columns, None)

    def local(q: Array, k: Array, v: Array, layout: Layout) -> Array:
        if shared:  # all queries of a device belong to one of them
            first = jax.lax.axis_index(heads) * q.shape[1] // groups
            k, v = (jax.lax.dynamic_slice_in_dim(x, first, 1, 1) for x in (k, v))
        if columns:
            whole = partial(jax.lax.all_gather, axis_name=columns, tiled=True)
            k, v = whole(k, axis=2), whole(v, axis=2)
            segments = layout.k_segments
            layout = replace(layout, k_index=whole(layout.k_index, axis=1),
                             k_segments=None if segments is None else whole(segments, axis=1))
        return attend(q, k, v, layout)

    if columns:
        local = jax.checkpoint(local, policy=_but_gathered)
    layouts = Layout(q_index=by_token(layout.q_index), k_index=by_token(layout.k_index),
                     q_segments=by_token(layout.q_segments), k_segments=by_token(layout.k_segments),
                     plain=layout.plain)
    return jax.shard_map(local, in_specs=(P(rows, heads, columns, None), spec, spec, layouts),
                         out_specs=P(rows, heads, columns, None), check_vma=False)(q, k, v, layout)


def _but_gathered(primitive: Any, *_: Any, **__: Any) -> bool:
    """Keep everything for the backward pass but keys and values of whole rows: they are gathered again."""
    return not primitive.name.startswith("all_gather")


def check_mesh(config: ModelConfig, mesh: Mesh, tokens: int, name: str = "model") -> None:
    """Raises ValueError where a mesh does not divide the heads, the MLP or the rows (of so many tokens)."""
    tensor, context = (mesh.shape.get(axis, 1) for axis in ("tensor", "context"))
    both = math.gcd(config.num_heads, config.mlp_size)
    if both % tensor:
        fit = [n for n in range(1, both + 1) if both % n == 0 and config.num_heads % n == 0]
        raise ValueError(f"mesh.tensor={tensor} does not divide the {config.num_heads} heads and the MLP of "
                         f"{config.mlp_size} of {name!r}; sizes that do: {', '.join(map(str, fit))}")
    if context > 1 and tokens % (2 * context):
        raise ValueError(f"mesh.context={context} cuts rows into {2 * context} pieces, which {tokens} tokens do not "
                         f"divide into; make source.seq_len a multiple of {2 * context}")


def context_parts(tokens: int) -> int:
    """C where the mesh cuts rows of so many tokens in zig-zag order, else 1."""
    parts = auto_axes().get("context", 1)
    return parts if tokens % (2 * parts) == 0 else 1


def zigzag(tokens: int, parts: int) -> np.ndarray:
    """i32 [T]: which token stands where when a row is cut for `parts` devices."""
    pieces = np.arange(tokens, dtype=np.int32).reshape(2 * parts, -1)
    return np.concatenate([pieces[[i, 2 * parts - 1 - i]].reshape(-1) for i in range(parts)])


def straightened(x: Array, parts: int) -> Array:
    """States [B,T,D] in zig-zag order, cut over `context`, back in the order of the row: two sends of half a part."""
    rows = entries(fit_spec(active_rules().activation_spec("hidden"), x.shape, auto_axes()), 3)[0]
    home = lambda piece: min(piece, 2 * parts - 1 - piece)  # device that has a piece in zig-zag order

    def local(x: Array) -> Array:
        low, high = jnp.split(x, 2, axis=1)
        odd = jax.lax.axis_index("context") % 2 == 1  # an even device has an even piece first, an odd one an odd piece
        even_piece, odd_piece = jnp.where(odd, high, low), jnp.where(odd, low, high)
        send = lambda x, k: jax.lax.ppermute(x, "context", [(home(2 * j + k), j) for j in range(parts)])
        return jnp.concatenate([send(even_piece, 0), send(odd_piece, 1)], axis=1)

    spec = P(rows, "context", None)
    return jax.shard_map(local, in_specs=spec, out_specs=spec, check_vma=False)(x)
