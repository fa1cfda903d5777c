"""Tiny models shared by the tests of `models`."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from distill_jax.models.config import AttentionConfig, ModelConfig, MoE
from distill_jax.models.rope import Rope
from distill_jax.models.transformer import Transformer, init_params

PLAIN = ModelConfig(vocab_size=61, hidden_size=32, mlp_size=48, num_layers=2, num_heads=4, num_kv_heads=2,
                    head_dim=8, attention=AttentionConfig(qkv_bias=True))

EVERYTHING = ModelConfig(  # every switch at once: alternating windows, caps, norms, partial and local rotation
    vocab_size=61, hidden_size=32, mlp_size=48, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=12,
    attention=AttentionConfig(qkv_bias=True, out_bias=True, qk_norm=True, scale=0.3, soft_cap=5.0, window=4,
                              sliding=(True, False, True), rope=Rope(theta=1e5, fraction=0.5),
                              local_rope=Rope(theta=1e4, fraction=0.5)),
    activation="gelu_tanh", mlp_bias=True, norm_offset=1.0, post_norms=True, tied=False, embed_scale=5.0,
    logit_soft_cap=4.0, real_vocab=57, init_std=0.2)


SPARSE = dataclasses.replace(PLAIN, model_type="qwen3_moe", tied=False, attention=AttentionConfig(qk_norm=True),
                             moe=MoE(experts=8, top_k=2, size=16))


@functools.cache
def make(config: ModelConfig, seed: int = 0, **kwargs):
    """A model whose biases and norms are random too, so that a mistake in them shows."""
    model = Transformer(config, **kwargs)
    params = init_params(model, jax.random.key(seed))
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(seed + 1), len(leaves))
    noisy = [x + 0.1 * jax.random.normal(k, x.shape, x.dtype) for x, k in zip(leaves, keys)]
    return model, jax.tree.unflatten(tree, noisy)


def tokens(rows: int, length: int, vocab: int = 57, seed: int = 3) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).integers(0, vocab, (rows, length)), jnp.int32)
