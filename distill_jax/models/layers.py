"""The parts of one decoder layer. Legend as in `transformer`; F is the MLP's inner size.

Parameters are float32 (float64 when computing in float64) and cast to the compute dtype where they are used.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from distill_jax.models import cache as kv_cache
from distill_jax.models import lora
from distill_jax.models.attention import attend
from distill_jax.models.config import ModelConfig
from distill_jax.models.moe import MoEMLP, Routing
from distill_jax.models.norm import rms_norm
from distill_jax.models.parallel import spread
from distill_jax.models.product import gated, product
from distill_jax.models.quantized import matmul
from distill_jax.models.remat import PRODUCT, QKV, REMAT
from distill_jax.models.rope import rotate
from distill_jax.models.scores import Layout, Score, wide
from distill_jax.sharding import constrain

Array = Any

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "silu": jax.nn.silu,
    "gelu": partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": partial(jax.nn.gelu, approximate=True),
}


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class State:
    """What the scan over layers carries: x [B,T,D]; the whole cache k, v [L,B,K,S,d] (updated in place) or None;
    taps [N,B,T,D], filled as the layers that were asked for go by, or None."""

    x: Array
    k: Array | None = None
    v: Array | None = None
    taps: Array | None = None


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Shared:
    """What all layers see: who sees whom; (cos, sin) of full layers, and of sliding ones where they differ;
    slots i32 [B,T] and real bool [B,T] when there is a cache; taps i32 [N], numbers of tapped layers;
    tokens bool [B,T]: False for padding, None without segment ids."""

    layout: Layout
    rope: tuple[Array, Array]
    local_rope: tuple[Array, Array] | None = None
    slots: Array | None = None
    real: Array | None = None
    taps: Array | None = None
    tokens: Array | None = None


class RMSNorm(nn.Module):
    """x / rms(x) * (offset + scale), computed in float32."""

    eps: float
    offset: float = 0.0

    @nn.compact
    def __call__(self, x: Array) -> Array:
        scale = self.param("scale", nn.initializers.constant(1.0 - self.offset), (x.shape[-1],), wide(x.dtype))
        return rms_norm(x, scale, self.eps, self.offset)


class Dense(nn.Module):
    """x [..., in] -> [..., features]: one product. matmul: how, a name in `quantized.MATMULS`; adapters never are."""

    features: int
    bias: bool
    init_std: float
    matmul: str = "full"

    @nn.compact
    def __call__(self, x: Array) -> Array:
        dtype = wide(x.dtype)
        kernel = self.param("kernel", nn.initializers.normal(self.init_std), (x.shape[-1], self.features), dtype)
        y = matmul(x, kernel.astype(x.dtype), self.matmul)
        if self.has_variable("params", lora.A):
            a, b = (self.get_variable("params", name).astype(x.dtype) for name in (lora.A, lora.B))
            y = y + product(product(x, a), b)
        y = checkpoint_name(y, PRODUCT)
        if self.bias:
            bias = self.param("bias", nn.initializers.zeros, (self.features,), dtype).astype(x.dtype)
            y = y + bias.reshape((1,) * (x.ndim - 1) + (-1,))
        return y


class Attention(nn.Module):
    config: ModelConfig
    implementation: str
    matmul: str

    def setup(self) -> None:
        c, a = self.config, self.config.attention
        dense = partial(Dense, init_std=c.init_std, matmul=self.matmul)
        self.q = dense(c.num_heads * c.head_dim, a.qkv_bias)
        self.k = dense(c.num_kv_heads * c.head_dim, a.qkv_bias)
        self.v = dense(c.num_kv_heads * c.head_dim, a.qkv_bias)
        self.o = dense(c.hidden_size, a.out_bias)
        if a.qk_norm:
            self.q_norm = RMSNorm(c.norm_eps, c.norm_offset)
            self.k_norm = RMSNorm(c.norm_eps, c.norm_offset)

    def __call__(self, state: State, x: Array, index: Array, slides: Array, shared: Shared) -> tuple[Array, State]:
        """x [B,T,D], the normed input; index, slides: scalars of this layer -> output [B,T,D] and the new state."""
        c = self.config
        split = lambda y, heads: y.reshape(*x.shape[:2], heads, c.head_dim).transpose(0, 2, 1, 3)
        q, k, v = split(self.q(x), c.num_heads), split(self.k(x), c.num_kv_heads), split(self.v(x), c.num_kv_heads)
        if c.attention.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        cos, sin = self._tables(slides, shared)
        q, k = constrain(rotate(q, cos, sin), "heads"), rotate(k, cos, sin)
        q, k, v = (checkpoint_name(x, QKV) for x in (q, k, v))
        if state.k is not None:
            put = partial(kv_cache.write, layer=index, index=shared.slots, real=shared.real)
            state = State(x=state.x, taps=state.taps, k=put(state.k, new=k), v=put(state.v, new=v))
            assert state.k is not None and state.v is not None
            k, v = state.k[index].astype(q.dtype), state.v[index].astype(q.dtype)
        out = self._attend(q, constrain(k, "heads"), constrain(v, "heads"), slides, shared.layout, state.k is None)
        out = constrain(out, "heads").transpose(0, 2, 1, 3).reshape(*x.shape[:2], c.num_heads * c.head_dim)
        return self.o(out), state

    def _tables(self, slides: Array, shared: Shared) -> tuple[Array, Array]:
        if shared.local_rope is None:
            return shared.rope
        cos, sin = (jnp.where(slides, a, b) for a, b in zip(shared.local_rope, shared.rope))
        return cos, sin

    def _attend(self, q: Array, k: Array, v: Array, slides: Array, layout: Layout, by_hand: bool) -> Array:
        """by_hand: each device on its share (`parallel.spread`); with a cache the partitioner decides."""
        c, a = self.config, self.config.attention
        scale = c.head_dim ** -0.5 if a.scale is None else a.scale
        full = partial(attend, implementation=self.implementation, score=Score(scale=scale, soft_cap=a.soft_cap))
        local = partial(full, score=Score(scale=scale, soft_cap=a.soft_cap, window=a.window))
        run = partial(spread, layout=layout) if by_hand else lambda fn, q, k, v: fn(q, k, v, layout)
        if any(c.sliding) and not all(c.sliding):  # both compiled with a static window; one of them runs
            return jax.lax.cond(slides, partial(run, local), partial(run, full), q, k, v)
        return run(local if any(c.sliding) else full, q, k, v)


class MLP(nn.Module):
    """down(activation(gate(x)) * up(x))"""

    config: ModelConfig
    matmul: str

    def setup(self) -> None:
        c = self.config
        dense = partial(Dense, bias=c.mlp_bias, init_std=c.init_std, matmul=self.matmul)
        self.gate, self.up, self.down = dense(c.mlp_size), dense(c.mlp_size), dense(c.hidden_size)

    def __call__(self, x: Array) -> Array:
        inner = gated(ACTIVATIONS[self.config.activation], self.gate(x), self.up(x))
        return self.down(constrain(inner, "mlp"))


class Layer(nn.Module):
    """One step of the scan over layers."""

    config: ModelConfig
    remat: str
    implementation: str
    matmul: str = "full"

    def setup(self) -> None:
        c = self.config
        norm = partial(RMSNorm, c.norm_eps, c.norm_offset)
        self.attention_norm, self.mlp_norm = norm(), norm()
        if c.post_norms:
            self.attention_post_norm, self.mlp_post_norm = norm(), norm()
        self.attention = Attention(c, self.implementation, self.matmul)
        if c.moe:
            self.moe = MoEMLP(c, ACTIVATIONS[c.activation])
        else:
            self.mlp = MLP(c, self.matmul)

    def __call__(self, state: State, index: Array, slides: Array, shared: Shared) -> tuple[State, Routing | None]:
        """index i32 and slides bool: number and kind of this layer. The second output is the router's, if any."""
        block = Layer.block
        if self.remat != "none":  # a scan's steps cannot be merged again, so no barrier against CSE is needed
            block = nn.remat(block, policy=REMAT[self.remat].save, prevent_cse=False)
        state, routing = block(self, state, index, slides, shared)
        if state.taps is None or shared.taps is None:
            return state, routing
        here = (shared.taps == index)[:, None, None, None]  # outside the rematerialised part: not stored per layer
        return State(x=state.x, k=state.k, v=state.v, taps=jnp.where(here, state.x[None], state.taps)), routing

    def block(self, state: State, index: Array, slides: Array, shared: Shared) -> tuple[State, Routing | None]:
        post = self.config.post_norms
        x = constrain(state.x, "hidden")
        out, state = self.attention(state, self.attention_norm(x), index, slides, shared)
        x = constrain(x + (self.attention_post_norm(out) if post else out), "hidden")
        routing, out = None, self.mlp_norm(x)
        if self.config.moe:
            out, routing = self.moe(out, shared.tokens)
        else:
            out = self.mlp(out)
        x = constrain(x + (self.mlp_post_norm(out) if post else out), "hidden")
        return State(x=x, k=state.k, v=state.v, taps=state.taps), routing
