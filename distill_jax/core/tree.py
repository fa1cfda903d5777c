"""Small helpers over parameter trees."""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

Tree = Any


def paths(tree: Tree) -> Iterator[tuple[str, Any]]:
    """`("decoder/layers/mlp/up/kernel", leaf)` for every leaf, in tree order."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        yield path_str(path), leaf


def path_str(path: tuple[Any, ...]) -> str:
    return "/".join(str(getattr(p, "key", getattr(p, "name", getattr(p, "idx", p)))) for p in path)


def map_with_path(fn: Callable[[str, Any], Any], tree: Tree) -> Tree:
    return jax.tree_util.tree_map_with_path(lambda p, x: fn(path_str(p), x), tree)


def count(tree: Tree) -> int:
    """Number of scalars in a tree of arrays or ShapeDtypeStructs."""
    return sum(int(x.size) for x in jax.tree.leaves(tree))


def nbytes(tree: Tree) -> int:
    return sum(int(x.size) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def global_norm(tree: Tree) -> Any:
    """L2 norm over all leaves, accumulated in float32 (float64 leaves stay float64)."""
    wide = lambda x: x if x.dtype == jnp.float64 else x.astype(jnp.float32)
    return jnp.sqrt(sum(jnp.sum(jnp.square(wide(x))) for x in jax.tree.leaves(tree)))


def cast(tree: Tree, dtype: Any) -> Tree:
    """Floating leaves cast to `dtype`, others untouched."""
    return jax.tree.map(lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x, tree)
