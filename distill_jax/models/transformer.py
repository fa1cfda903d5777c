"""One decoder for all families: `Transformer(config)`, used purely functionally.

Legend: B rows, T tokens, D hidden size, V vocabulary, L layers, H query heads, K key/value heads, d head_dim.

Parameters are a plain tree; those of the layers carry a leading dimension L (`nn.scan`):
    embed/embedding [V,D]   layers/attention/{q,k,v,o}/{kernel,bias}   layers/attention/{q,k}_norm/scale
    layers/mlp/{gate,up,down}/{kernel,bias}   layers/{attention,mlp}_{norm,post_norm}/scale
    layers/moe/{router,gate,up,down}/kernel in place of mlp: [L,D,E], [L,E,D,F], [L,E,F,D]
    final_norm/scale [D]    lm_head/kernel [V,D] unless tied
Kernels of layers are [L, in, out]. The mathematics of a layer is in `layers`; other programs' names in `families`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from distill_jax.core.head import Head
from distill_jax.core.platform import platform
from distill_jax.models.cache import Cache, new_cache, slots
from distill_jax.models.config import ModelConfig
from distill_jax.models.layers import Layer, RMSNorm, Shared, State
from distill_jax.models.moe import Routing
from distill_jax.models.parallel import context_parts, lookup, straightened, zigzag
from distill_jax.models.quantized import check_matmul
from distill_jax.models.remat import policy_of
from distill_jax.models.scores import Layout, segment_starts, wide
from distill_jax.sharding import DEFAULT_RULES, Rules, constrain, param_shardings

Array = Any
UNROLLED = {"cpu": 12, "gpu": 6, "tpu": 6}
"""Stacks up to so many layers are unrolled: a few compile faster without a loop, and on the CPU they run faster (no
stacked residuals to clear, no copies of a layer's parameters)."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Hidden:
    """hidden [B,T,D]: states after the final norm, in the compute dtype. taps: the tapped layers' outputs [B,T,D]
    (before the final norm), in the order asked for. cache: advanced, when one was given. routing: what each layer's
    router did (leading dimension L), None of a dense model."""

    hidden: Array
    taps: tuple[Array, ...] = ()
    cache: Cache | None = None
    routing: Routing | None = None


class Embed(nn.Module):
    config: ModelConfig
    dtype: Any

    @nn.compact
    def __call__(self, tokens: Array) -> Array:
        c = self.config
        table = self.param("embedding", nn.initializers.normal(c.init_std), (c.vocab_size, c.hidden_size),
                           wide(self.dtype))
        x = lookup(table, tokens, self.dtype)
        return x if c.embed_scale == 1.0 else x * jnp.asarray(c.embed_scale, self.dtype)


class OutputKernel(nn.Module):
    config: ModelConfig
    dtype: Any

    @nn.compact
    def __call__(self) -> Array:
        c = self.config
        return self.param("kernel", nn.initializers.normal(c.init_std), (c.vocab_size, c.hidden_size),
                          wide(self.dtype))


def init_params(model: "Transformer", rng: Array, *, mesh: Mesh | None = None, rules: Rules = DEFAULT_RULES) -> Any:
    """Fresh float32 parameters, created where they belong: under `mesh`, no device ever holds the whole tree."""
    init = lambda key: model.init(key, jnp.zeros((1, 1), jnp.int32))["params"]
    if mesh is None:
        return jax.jit(init)(rng)
    shardings = param_shardings(mesh, jax.eval_shape(init, rng), rules)
    return jax.jit(init, out_shardings=shardings)(rng)


def segment_positions(segment_ids: Array) -> Array:
    """i32 [B,T]: index of each token within its run of equal segment ids."""
    return jnp.arange(segment_ids.shape[1], dtype=jnp.int32)[None] - segment_starts(segment_ids)


class Transformer(nn.Module):
    """`model.apply({"params": params}, tokens)` gives logits; `method="hidden"` what training uses.

    dtype      compute dtype: parameters are cast to it where they are used; norms, softmax and logits are float32
    remat      what the backward pass recomputes, a name in `remat.REMAT`
    attention  "auto", or a name in `attention.IMPLEMENTATIONS`
    matmul     how layers multiply with their kernels: "full" in `dtype`, or a name in `quantized.MATMULS`
    """

    config: ModelConfig
    dtype: Any = jnp.float32
    remat: str = "none"
    attention: str = "auto"
    matmul: str = "full"

    def setup(self) -> None:
        policy_of(self.remat)  # or it raises
        check_matmul(self.matmul, self.config)
        c = self.config
        self.embed = Embed(c, self.dtype)
        unroll = c.num_layers if c.num_layers <= UNROLLED[platform()] and self.remat == "none" else 1
        scan = nn.scan(Layer, variable_axes={"params": 0}, split_rngs={"params": True},
                       in_axes=(0, 0, nn.broadcast),  # pyright: ignore[reportArgumentType]
                       length=c.num_layers, unroll=unroll)
        self.layers = scan(c, self.remat, self.attention, self.matmul)
        self.final_norm = RMSNorm(c.norm_eps, c.norm_offset)
        if not c.tied:
            self.lm_head = OutputKernel(c, self.dtype)

    def __call__(self, tokens: Array | None, positions: Array | None = None, segment_ids: Array | None = None, *,
                 inputs_embeds: Array | None = None, cache: Cache | None = None) -> Array:
        """tokens i32 [B,T] -> logits float32 [B,T,V]; arguments as for `hidden`."""
        out = self.hidden(tokens, positions, segment_ids, inputs_embeds=inputs_embeds, cache=cache)
        kernel = self.embed.variables["params"]["embedding"] if self.config.tied else self.lm_head()
        return constrain(self._head(kernel).logits(out.hidden), "logits")

    def hidden(self, tokens: Array | None, positions: Array | None = None, segment_ids: Array | None = None, *,
               inputs_embeds: Array | None = None, cache: Cache | None = None, taps: Sequence[int] = ()) -> Hidden:
        """Final-norm states, tapped layers and the advanced cache.

        tokens        i32 [B,T]; ignored where inputs_embeds [B,T,D] (already scaled) is given
        positions     i32 [B,T] for the rotary embedding; by default counted from the start of each segment, or
                      continued from the cache
        segment_ids   i32 [B,T]: tokens see earlier tokens of the same id only; 0 is padding. With a cache a row is
                      one document: any other id is a token to store, 0 is not stored
        cache         from `init_cache`: new tokens follow the `lengths` tokens that each row holds
        taps          layers (0 to L-1, negative from the end) whose outputs to return
        """
        c = self.config
        given: Any = tokens if inputs_embeds is None else inputs_embeds
        length = given.shape[1]
        parts = context_parts(length) if cache is None else 1
        order = np.arange(length, dtype=np.int32) if parts == 1 else zigzag(length, parts)
        if positions is None and cache is None:
            positions = np.arange(length)[None] if segment_ids is None else segment_positions(segment_ids)
        if parts > 1:
            tokens, positions, segment_ids, inputs_embeds = (
                None if x is None else x[:, order] for x in (tokens, positions, segment_ids, inputs_embeds))
        x = self.embed(tokens) if inputs_embeds is None else inputs_embeds.astype(self.dtype)
        shared, lengths = self._shared(x.shape, order, positions, segment_ids, cache, taps)
        state = State(x=constrain(x, "hidden"), k=None if cache is None else cache.k,
                      v=None if cache is None else cache.v,
                      taps=jnp.zeros((len(taps), *x.shape), self.dtype) if taps else None)
        index, slides = jnp.arange(c.num_layers, dtype=jnp.int32), jnp.asarray(np.array(c.sliding))
        state, routing = self.layers(state, index, slides, shared)
        if cache is not None:
            cache = Cache(k=state.k, v=state.v, lengths=lengths)
        ordered = lambda x: constrain(x, "hidden") if parts == 1 else straightened(x, parts)
        return Hidden(hidden=ordered(self.final_norm(state.x)), cache=cache, routing=routing,
                      taps=() if state.taps is None else tuple(ordered(state.taps[i]) for i in range(len(taps))))

    def embedding(self, tokens: Array) -> Array:
        """[B,T,D] what the first layer reads of each token; `method="embedding"`."""
        return self.embed(tokens)

    def _shared(self, shape: tuple[int, ...], order: np.ndarray, positions: Array | None, segment_ids: Array | None,
                cache: Cache | None, taps: Sequence[int]) -> tuple[Shared, Array | None]:
        """order [T]: which token of the row stands where -> what all layers see, and the cache's new lengths."""
        c, a = self.config, self.config.attention
        rows, tokens = shape[:2]
        if cache is None:
            index = jnp.asarray(order)[None]
            layout = Layout(q_index=index, k_index=index, q_segments=segment_ids, k_segments=segment_ids,
                            plain=bool(order[-1] == tokens - 1))
            real = slot = lengths = None
        else:
            real = jnp.ones((rows, tokens), bool) if segment_ids is None else segment_ids != 0
            slot, lengths = slots(cache.lengths, real)
            layout = Layout(q_index=slot, k_index=jnp.arange(cache.capacity, dtype=jnp.int32)[None])
            positions = jnp.maximum(slot, 0) if positions is None else positions
        assert positions is not None
        where = jnp.broadcast_to(positions, (rows, tokens))
        longest = tokens if cache is None else cache.capacity
        local = None if a.local_rope is None else a.local_rope.tables(where, c.head_dim, longest)
        picked = jnp.asarray([self._layer_number(t) for t in taps], jnp.int32) if taps else None
        return Shared(layout=layout, rope=a.rope.tables(where, c.head_dim, longest), local_rope=local,
                      slots=slot, real=real, taps=picked,
                      tokens=None if segment_ids is None else segment_ids != 0), lengths

    def _layer_number(self, tap: int) -> int:
        total = self.config.num_layers
        if not -total <= tap < total:
            raise ValueError(f"tap {tap}: the model has layers 0 to {total - 1} (or -{total} to -1)")
        return tap % total

    def _head(self, kernel: Array) -> Head:
        return Head(kernel=kernel, soft_cap=self.config.logit_soft_cap, real=self.config.real_vocab)

    def head(self, params: Mapping[str, Any]) -> Head:
        """The output head out of `params`; the embedding itself where the model is tied."""
        return self._head(params["embed"]["embedding"] if self.config.tied else params["lm_head"]["kernel"])

    def init_cache(self, batch: int, length: int, dtype: Any = None) -> Cache:
        """An empty cache for `batch` rows of at most `length` tokens, in `dtype` (the compute dtype by default)."""
        c = self.config
        return new_cache(c.num_layers, batch, c.num_kv_heads, length, c.head_dim, dtype or self.dtype)
