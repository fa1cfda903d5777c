"""A sparse mixture of experts in place of a layer's MLP (Qwen3-MoE, 2505.09388; Switch, 2101.03961).

N tokens, D hidden size, E experts, k of them a token, F their inner size. The router, its softmax and the shares are
float32. Nothing is dropped: the N k copies are sorted by expert and multiplied group by group, on TPUs by
`jax.lax.ragged_dot`, which has a kernel there, elsewhere in tiles (`tiles`); the bookkeeping is integers [N k].
`distill_jax.sharding.experts` says who computes what on several devices.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from distill_jax.core.platform import platform
from distill_jax.models.config import ModelConfig
from distill_jax.models.scores import wide
from distill_jax.models.tiles import rows_of, tiled
from distill_jax.sharding.experts import map_experts

Array = Any
Kernels = Mapping[str, Array]
Activation = Callable[[Array], Array]


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Routing:
    """What a router did with the tokens that are not padding; with a leading layer dimension out of the stack.

    counts f32 [E]: copies each expert got; probs f32 [E]: sum of its probabilities, differentiable; tokens f32 []
    """

    counts: Array
    probs: Array
    tokens: Array


class Kernel(nn.Module):
    """A named parameter `kernel`."""

    shape: tuple[int, ...]
    init_std: float
    dtype: Any

    @nn.compact
    def __call__(self) -> Array:
        return self.param("kernel", nn.initializers.normal(self.init_std), self.shape, self.dtype)


class MoEMLP(nn.Module):
    """sum over the token's k experts of share * down(activation(gate(x)) * up(x))"""

    config: ModelConfig
    activation: Activation

    @nn.compact
    def __call__(self, x: Array, real: Array | None = None) -> tuple[Array, Routing]:
        """x [B,T,D]; real bool [B,T], False for padding (None: all are real) -> output [B,T,D], statistics."""
        c, m = self.config, self.config.moe
        assert m is not None
        kernel = lambda name, *shape: Kernel(shape, c.init_std, wide(x.dtype), name=name)()
        probs, shares, ids = route(x, kernel("router", c.hidden_size, m.experts), m.top_k, m.norm)
        kernels = {"gate": kernel("gate", m.experts, c.hidden_size, m.size),
                   "up": kernel("up", m.experts, c.hidden_size, m.size),
                   "down": kernel("down", m.experts, m.size, c.hidden_size)}
        kernels = {name: k.astype(x.dtype) for name, k in kernels.items()}
        run = partial(grouped, activation=self.activation, experts=m.experts)
        y = map_experts(run, x, ids, shares.astype(x.dtype), kernels)
        return y, statistics(probs, ids, real)


def route(x: Array, router: Array, top_k: int, norm: bool) -> tuple[Array, Array, Array]:
    """x [..., D], router [D,E] -> probabilities [..., E], shares [..., k] and experts i32 [..., k], best first."""
    dtype = wide(x.dtype)
    flat = x.reshape(-1, x.shape[-1]).astype(dtype)
    logits = jnp.dot(flat, router.astype(dtype), precision=jax.lax.Precision.HIGHEST)
    probs = jax.nn.softmax(logits, axis=-1).reshape(*x.shape[:-1], router.shape[-1])
    shares, ids = jax.lax.top_k(probs, top_k)
    if norm:
        shares = shares / jnp.sum(shares, axis=-1, keepdims=True)
    return probs, shares, ids


def statistics(probs: Array, ids: Array, real: Array | None) -> Routing:
    """probs [B,T,E], ids [B,T,k] -> sums over the real tokens of all devices."""
    mask: Array = jnp.ones(probs.shape[:2], bool) if real is None else real
    chosen = jnp.any(jax.nn.one_hot(ids, probs.shape[-1], dtype=bool), axis=-2)
    total = lambda a: jnp.sum(jnp.where(mask[..., None], a.astype(jnp.float32), 0.0), axis=(0, 1))
    return Routing(counts=total(chosen), probs=total(probs), tokens=jnp.sum(mask.astype(jnp.float32)))


def grouped(x: Array, ids: Array, shares: Array, kernels: Kernels, first: Array | int = 0, *,
            activation: Activation, experts: int | None = None) -> Array:
    """x [N,D], ids i32 [N,k], shares [N,k], kernels of experts first, first+1, ... -> their part of the output [N,D].

    experts: how many there are on all devices (None: as many as kernels). Copies for other devices' experts are sorted
    last, belong to no group and add nothing.
    """
    here = kernels["gate"].shape[0]
    own = ids.reshape(-1) - first
    own = jnp.where((own >= 0) & (own < here), own, here)
    order = jnp.argsort(own, stable=True).astype(jnp.int32)
    sizes = jnp.zeros(here, jnp.int32).at[own].add(1, mode="drop")
    if platform() == "tpu":
        return ragged(x, shares, kernels, order, sizes, activation=activation)
    return tiled(x, shares, kernels, order, sizes, activation=activation, rows=rows_of(ids.size / (experts or here)))


def ragged(x: Array, shares: Array, kernels: Kernels, order: Array, sizes: Array, *, activation: Activation) -> Array:
    """`tiles.tiled` with three grouped products of all copies at once: arrays [N k, D] and [N k, F]."""
    top_k = shares.shape[1]
    inverse = jnp.zeros_like(order).at[order].set(jnp.arange(order.size, dtype=order.dtype), unique_indices=True)
    valid = (jnp.arange(order.size, dtype=jnp.int32) < jnp.sum(sizes))[:, None]
    spread = jnp.where(valid, _spread(x, order, inverse, top_k), 0)
    inner = activation(jax.lax.ragged_dot(spread, kernels["gate"], sizes))
    inner = inner * jax.lax.ragged_dot(spread, kernels["up"], sizes)
    share: Array = _spread(shares.reshape(-1, 1), order, inverse, 1)
    out = jax.lax.ragged_dot(inner, kernels["down"], sizes) * share
    return _collect(jnp.where(valid, out, 0), order, inverse, top_k)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _spread(x: Array, order: Array, inverse: Array, top_k: int) -> Array:
    """[N,D] -> [N k, D]: the copies in the order of their experts. Both directions are gathers: no scatter-add."""
    return x[order // top_k]


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _collect(y: Array, order: Array, inverse: Array, top_k: int) -> Array:
    """[N k, D] -> [N,D]: each token's copies added up."""
    return y[inverse].reshape(-1, top_k, y.shape[-1]).sum(axis=1)


_spread.defvjp(lambda x, order, inverse, k: (_spread(x, order, inverse, k), (order, inverse)),
               lambda k, saved, g: (_collect(g, *saved, k), None, None))
_collect.defvjp(lambda y, order, inverse, k: (_collect(y, order, inverse, k), (order, inverse)),
                lambda k, saved, g: (_spread(g, *saved, k), None, None))


def every_expert(x: Array, ids: Array, shares: Array, kernels: Kernels, *, activation: Activation) -> Array:
    """`grouped` by computing every expert for every token: the reference."""
    inner = activation(jnp.einsum("nd,edf->enf", x, kernels["gate"])) * jnp.einsum("nd,edf->enf", x, kernels["up"])
    share = jnp.einsum("nk,nke->ne", shares, jax.nn.one_hot(ids, kernels["gate"].shape[0], dtype=shares.dtype))
    return jnp.einsum("enf,efd,ne->nd", inner, kernels["down"], share)
