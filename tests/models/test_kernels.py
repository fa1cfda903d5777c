"""Attention kernels of single platforms against the reference, forward and backward; here interpreted, or by their XLA
twin. What no test here can say is how they run on their device."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distill_jax.core.platform import compiling_for
from distill_jax.models.attention import attend, reference
from distill_jax.models.kernels import has_tokamax, preferred, refuses, splash, tokamax
from distill_jax.models.scores import Layout, Score
from tests.models.test_attention import inputs, packed, value_and_grads


def plain(t, segments=None):
    order = jnp.arange(t)[None]
    return Layout(q_index=order, k_index=order, q_segments=segments, k_segments=segments, plain=True)


CASES = [  # head_dim, heads, kv heads, tokens, window, soft cap, packed
    (64, 4, 2, 256, None, None, True), (96, 2, 1, 200, 50, None, True), (128, 4, 4, 256, None, 2.0, False),
    (256, 2, 1, 130, 7, 1.5, True)]


def compare(fn, head_dim, heads, kv, t, window, cap, pack, atol=3e-5):
    q, k, v = inputs(b=2, h=heads, kv=kv, t=t, d=head_dim)
    layout = plain(t, packed(np.random.default_rng(3), 2, t) if pack else None)
    score = Score(scale=head_dim ** -0.5, window=window, soft_cap=cap)
    got = value_and_grads(fn, score, q, k, v, layout)
    for a, b in zip(got, value_and_grads(reference, score, q, k, v, layout)):
        np.testing.assert_allclose(a, b, atol=atol)


@pytest.mark.parametrize("case", CASES)
def test_splash_interpreted(case):
    compare(splash, *case)


@pytest.mark.skipif(not has_tokamax(), reason="tokamax is not installed (distill_jax[tokamax], Python 3.12 or later)")
@pytest.mark.parametrize("case", CASES)
def test_what_tokamax_is_asked_for(case):
    compare(functools.partial(tokamax, "xla"), *case)


def test_splash_in_bfloat16():
    q, k, v = inputs(t=128, d=64, dtype=jnp.bfloat16)
    score = Score(scale=0.125)
    got, want = splash(q, k, v, plain(128), score), reference(q, k, v, plain(128), score)
    assert got.dtype == jnp.bfloat16
    np.testing.assert_allclose(got.astype(jnp.float32), want.astype(jnp.float32), atol=0.03)


def test_who_serves_what():
    q = jnp.zeros((1, 2, 512, 64), jnp.bfloat16)
    cached = Layout(q_index=jnp.zeros((1, 512), jnp.int32), k_index=jnp.arange(512)[None])
    assert preferred(q, plain(512)) is None, "no kernel on a CPU"
    with compiling_for("tpu"):
        assert preferred(q, plain(512)) == "splash" and preferred(q, cached) is None
        assert preferred(q.astype(jnp.float32), plain(512)) is None, "float32 is wanted exact"
        assert refuses("triton", q, plain(512))
    with compiling_for("gpu"):
        assert refuses("splash", q, plain(512)) == "it is for TPU"
    assert "cache" in (refuses("splash", q, cached) or "")
    with pytest.raises(ValueError, match=r"'mosaic' cannot serve this: .*; use auto, reference or chunked"):
        attend(q, q, q, plain(512), Score(scale=1.0), "mosaic")


def test_a_packed_row_through_a_model_on_a_mesh():
    """Forced splash under fsdp x tensor equals the reference on one device, gradients too."""
    from distill_jax.models.config import AttentionConfig, ModelConfig
    from distill_jax.models.transformer import Transformer, init_params
    from distill_jax.sharding import make_mesh

    config = ModelConfig(vocab_size=32, hidden_size=32, mlp_size=64, num_layers=1, num_heads=4, num_kv_heads=2,
                         head_dim=64, context_length=128, attention=AttentionConfig())
    params = init_params(Transformer(config), jax.random.key(0))
    tokens = np.random.default_rng(0).integers(0, 32, (4, 128)).astype(np.int32)
    segments = packed(np.random.default_rng(4), 4, 128)

    def loss(params, name):
        hidden = Transformer(config, attention=name).apply({"params": params}, tokens, None, segments, method="hidden")
        return jnp.sum(jnp.where((segments != 0)[..., None], jnp.sin(hidden.hidden), 0.0))

    want = jax.jit(jax.value_and_grad(functools.partial(loss, name="reference")))(params)
    with jax.set_mesh(make_mesh(fsdp=2, tensor=2, devices=jax.devices()[:4])):
        got = jax.jit(jax.value_and_grad(functools.partial(loss, name="splash")))(params)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want)):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6 * float(np.abs(b).max()))
