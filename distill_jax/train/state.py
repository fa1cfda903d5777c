"""`TrainState`: everything a step changes, as one pytree, created directly where it lives on the mesh."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from distill_jax.core import tree
from distill_jax.sharding.rules import fit_spec

Array = Any
Tree = Any


def _pytree(cls: Any) -> Any:
    names = [f.name for f in dataclasses.fields(cls)]
    return jax.tree_util.register_dataclass(cls, data_fields=names, meta_fields=[])


@_pytree
@dataclass(frozen=True, kw_only=True)
class TrainState:
    """What a step reads and returns. Frozen providers are not in it: they are handed to the step beside it.

    step         int32 [], updates tried so far, skipped ones included: the number of the next batch
    params       {provider: tree}, float32 masters of the trained providers
    opt_state    {provider: optax state}, moments sharded like their parameters
    controllers  {"<term>.<argument>": state} of the terms steered by a controller; "source": of a steered one
    rng          uint32 [2], key data; a step folds its number into it, so it never changes
    skipped      int32 [], steps whose gradient was not finite and that changed nothing
    """

    step: Array
    params: dict[str, Tree]
    opt_state: dict[str, Tree]
    controllers: dict[str, Tree]
    rng: Array
    skipped: Array


Optimizers = Mapping[str, optax.GradientTransformationExtraArgs]


def create_state(params: dict[str, Tree], optimizers: Optimizers, *, mesh: Mesh, seed: int = 0,
                 controllers: Mapping[str, Tree] | None = None) -> TrainState:
    """The state of step 0. `params` (trained providers, already on the mesh) go into it, not copies of them.

    The step donates the state, so `params` must not be used by the caller after the first step.
    """
    if set(params) != set(optimizers):
        raise ValueError(f"trained providers {sorted(params)} and optimisers {sorted(optimizers)} must be the same")
    everywhere = NamedSharding(mesh, PartitionSpec())
    opt_state = {}
    for name, tx in optimizers.items():
        shapes = jax.eval_shape(tx.init, params[name])
        shardings = opt_state_shardings(shapes, params[name], mesh)
        opt_state[name] = jax.jit(tx.init, out_shardings=shardings)(params[name])
    small = {"step": jnp.int32(0), "skipped": jnp.int32(0), "controllers": dict(controllers or {}),
             "rng": jax.random.key_data(jax.random.key(seed))}
    return TrainState(params=dict(params), opt_state=opt_state, **jax.device_put(small, everywhere))


def opt_state_shardings(opt_state: Tree, params: Tree, mesh: Mesh) -> Tree:
    """Shardings of an optimiser state: what has a parameter's path at the end of its own and as many axes lies like it
    (moments, and the scales of their blocks), as far as its axes divide; the rest on every device.

    Without them `jit(tx.init)` replicates the moments: they do not depend on the parameters' values.
    """
    of = dict(tree.paths(params))

    def one(path: str, leaf: Any) -> Any:
        parts = path.split("/")
        like = next((of[p] for i in range(len(parts)) if (p := "/".join(parts[i:])) in of), None)
        if like is not None and like.shape == leaf.shape:
            return like.sharding
        if like is None or like.ndim != leaf.ndim or not isinstance(like.sharding, NamedSharding):
            return NamedSharding(mesh, PartitionSpec())
        return NamedSharding(mesh, fit_spec(like.sharding.spec, leaf.shape, mesh.shape))

    return tree.map_with_path(one, opt_state)


def shape_of(state: Tree) -> Tree:
    """ShapeDtypeStructs with the shardings of a tree of arrays: the target of a restore."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
