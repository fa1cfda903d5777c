"""Attention: against NumPy by the definition; the memory-linear form against the dense one, both ways."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distill_jax.models.attention import attend, choose, reference
from distill_jax.models.chunked import _ranges, _Static, chunked
from distill_jax.models.config import AttentionConfig, ModelConfig
from distill_jax.models.scores import Layout, Score
from distill_jax.models.transformer import Transformer, init_params


def inputs(b=2, h=4, kv=2, t=37, s=None, d=8, seed=0, dtype=np.float32):
    rng = np.random.default_rng(seed)
    shapes = (b, h, t, d), (b, kv, s or t, d), (b, kv, s or t, d)
    return tuple(jnp.asarray(rng.normal(size=x), dtype) for x in shapes)


def packed(rng, b, t, most=4):
    """Segment ids of packed rows: documents from 1, padding 0 at the end."""
    rows = np.zeros((b, t), np.int32)
    for row in rows:
        ends = np.sort(rng.integers(1, t + 1, size=rng.integers(1, most + 1)))
        start = 0
        for i, end in enumerate(ends):
            row[start:end] = i + 1
            start = end
    return jnp.asarray(rows)


def causal(t, segments=None):
    order = jnp.arange(t)[None]
    return Layout(q_index=order, k_index=order, q_segments=segments, k_segments=segments)


def by_definition(q, k, v, segments, scale, window, cap):
    """Softmax over the keys each query may see, one query at a time, in float64."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    b, h, t, _ = q.shape
    out = np.zeros_like(q)
    for i, j, n in np.ndindex(b, h, t):
        seen = [m for m in range(n + 1) if (window is None or n - m < window)
                and (segments is None or segments[i, m] == segments[i, n])]
        g = j // (h // k.shape[1])
        s = scale * k[i, g, seen] @ q[i, j, n]
        s = s if cap is None else cap * np.tanh(s / cap)
        p = np.exp(s - s.max())
        out[i, j, n] = (p / p.sum()) @ v[i, g, seen]
    return out


@pytest.mark.parametrize("window, cap, pack", [
    (None, None, False), (5, None, True), (None, 2.0, True), (3, 1.5, False)])
def test_reference_is_the_definition(window, cap, pack):
    q, k, v = inputs(t=13)
    segments = packed(np.random.default_rng(1), 2, 13) if pack else None
    got = reference(q, k, v, causal(13, segments), Score(scale=0.4, window=window, soft_cap=cap))
    want = by_definition(q, k, v, None if segments is None else np.asarray(segments), 0.4, window, cap)
    np.testing.assert_allclose(got, want, atol=2e-6)


@functools.partial(jax.jit, static_argnums=(0, 1))
def value_and_grads(fn, score, q, k, v, layout):
    def loss(q, k, v):
        out = fn(q, k, v, layout, score)
        weight = jnp.sin(jnp.arange(out.size, dtype=jnp.float32)).reshape(out.shape)
        return jnp.sum(out.astype(jnp.float32) * weight), out

    (_, out), grads = jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)(q, k, v)
    return out, *grads


BLOCKS = {n: functools.partial(chunked, block=n) for n in (8, 16, 64)}


@pytest.mark.parametrize("block, window, cap", [(8, None, None), (16, 5, 2.0), (8, 20, None), (64, 3, None)])
@pytest.mark.parametrize("pack", [False, True], ids=["one", "packed"])
def test_chunked_equals_reference(block, window, cap, pack):
    q, k, v = inputs()
    layout = causal(37, packed(np.random.default_rng(2), 2, 37) if pack else None)
    score = Score(scale=0.4, window=window, soft_cap=cap)
    want = value_and_grads(reference, score, q, k, v, layout)
    got = value_and_grads(BLOCKS[block], score, q, k, v, layout)
    for a, b in zip(got, want):
        np.testing.assert_allclose(a, b, atol=2e-5)


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10**6), window=st.sampled_from([None, 3, 9]))
def test_chunked_equals_reference_for_any_packing(seed, window):
    """One compiled shape, random packings: what the block bounds skip must be invisible."""
    q, k, v = inputs(b=1, t=24, seed=seed)
    layout = causal(24, packed(np.random.default_rng(seed), 1, 24, most=6))
    score = Score(scale=0.4, window=window)
    for a, b in zip(value_and_grads(BLOCKS[8], score, q, k, v, layout),
                    value_and_grads(reference, score, q, k, v, layout)):
        np.testing.assert_allclose(a, b, atol=2e-5)


def test_chunked_with_offsets_of_a_cache():
    """Queries that start at another slot in every row, and fewer than the keys."""
    q, k, v = inputs(t=10, s=32)
    layout = Layout(q_index=jnp.asarray([[5], [20]]) + jnp.arange(10)[None], k_index=jnp.arange(32)[None])
    for window in (None, 4):
        score = Score(scale=0.4, window=window)
        np.testing.assert_allclose(BLOCKS[8](q, k, v, layout, score), reference(q, k, v, layout, score), atol=2e-6)


def test_chunked_in_bfloat16():
    q, k, v = inputs(dtype=jnp.bfloat16)
    got = value_and_grads(BLOCKS[8], Score(scale=0.4), q, k, v, causal(37))
    want = value_and_grads(reference, Score(scale=0.4), *(x.astype(jnp.float32) for x in (q, k, v)), causal(37))
    assert {x.dtype for x in got} == {jnp.dtype(jnp.bfloat16)}
    for a, b in zip(got, want):
        np.testing.assert_allclose(a.astype(jnp.float32), b, atol=0.06)


def test_blocks_nothing_sees_are_skipped():
    """32 tokens in blocks of 8, documents of 16: the second document starts at the third block of keys."""
    segments = jnp.asarray([[1] * 16 + [2] * 16])
    first, last = _ranges(_Static(Score(scale=1.0), 8, 8), causal(32, segments))
    assert first.tolist() == [0, 0, 2, 2] and last.tolist() == [1, 2, 3, 4]
    first, last = _ranges(_Static(Score(scale=1.0, window=8), 8, 8), causal(32))
    assert first.tolist() == [0, 0, 1, 2] and last.tolist() == [1, 2, 3, 4]


def test_auto_is_dense_up_to_a_thousand_tokens():
    assert choose(1024, 1024) == "reference" and choose(1025, 1025) == "chunked"
    assert choose(1, 100_000) == "reference"  # a decoding step
    with pytest.raises(ValueError, match="reference, chunked"):
        attend(*inputs(), causal(37), Score(scale=1.0), "fast")


def sizes(jaxpr):
    """Shapes of every value in a jaxpr and the jaxprs inside it."""
    for eqn in jaxpr.eqns:
        yield from (v.aval.shape for v in eqn.outvars if hasattr(v.aval, "shape"))
        nested = lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")
        for sub in jax.tree.leaves(list(eqn.params.values()), is_leaf=nested):
            inner = getattr(sub, "jaxpr", sub)
            if hasattr(inner, "eqns"):
                yield from sizes(inner)


@pytest.mark.parametrize("remat", ["none", "full", "dots"])
def test_no_square_of_the_row_in_a_training_step(remat):
    """T = 2048, forward and backward, windows and packing: no array has two dimensions of T or more."""
    config = ModelConfig(vocab_size=61, hidden_size=16, mlp_size=24, num_layers=2, num_heads=2, num_kv_heads=1,
                         head_dim=8, attention=AttentionConfig(window=300, sliding=(True, False)))
    model = Transformer(config, remat=remat)
    params = jax.eval_shape(lambda: init_params(model, jax.random.key(0)))
    t = 2048
    row = jax.ShapeDtypeStruct((1, t), jnp.int32)

    def loss(params, tokens, segments):
        return model.apply({"params": params}, tokens, segment_ids=segments, method="hidden").hidden.sum()

    shapes = list(sizes(jax.make_jaxpr(jax.grad(loss))(params, row, row).jaxpr))
    assert (1, t, 24) in shapes, "the walk found the model's own activations"
    assert not [s for s in shapes if sum(d >= t for d in s) > 1]
    dense = Transformer(config, attention="reference")
    found = jax.make_jaxpr(lambda p, x: dense.apply({"params": p}, x, method="hidden").hidden)(params, row)
    assert [s for s in sizes(found.jaxpr) if sum(d >= t for d in s) > 1], "the walk sees such arrays where they are"
