"""RMSNorm: values and gradients against the plain formula, what it keeps, dtypes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from distill_jax.models.norm import rms_norm

rng = np.random.default_rng(0)


def plain(x, scale, eps, offset):
    f = x.astype(jnp.float32)
    y = f * jax.lax.rsqrt(jnp.mean(jnp.square(f), axis=-1, keepdims=True) + eps)
    return (y * (offset + scale).reshape((1,) * (x.ndim - 1) + (-1,))).astype(x.dtype)


def test_by_hand():
    """rms of (3, 4, 0, 0) is 2.5; Gemma's weight is stored less 1."""
    x = jnp.asarray([[3.0, 4.0, 0.0, 0.0]])
    np.testing.assert_allclose(rms_norm(x, jnp.asarray([1.0, 2.0, 1.0, 1.0]), 0.0, 0.0), [[1.2, 3.2, 0, 0]], rtol=1e-6)
    np.testing.assert_allclose(rms_norm(x, jnp.zeros(4), 0.0, 1.0), [[1.2, 1.6, 0, 0]], rtol=1e-6)


@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gradients_are_those_of_the_formula(dtype, offset):
    x = jnp.asarray(rng.normal(size=(2, 5, 16)) * 3, dtype)
    scale, out = jnp.asarray(rng.normal(size=16), jnp.float32), jnp.asarray(rng.normal(size=(2, 5, 16)), dtype)
    found, ours = jax.vjp(lambda x, s: rms_norm(x, s, 1e-6, offset), x, scale)
    expected, theirs = jax.vjp(lambda x, s: plain(x, s, 1e-6, offset), x, scale)
    np.testing.assert_array_equal(found, expected)
    for a, b in zip(ours(out), theirs(out), strict=True):
        assert a.dtype == b.dtype
        tolerance = 1e-5 if dtype == "float32" else 2e-2
        np.testing.assert_allclose(a.astype(jnp.float32), b.astype(jnp.float32), rtol=tolerance, atol=tolerance)


def test_gradients_numerically():
    x, scale = jnp.asarray(rng.normal(size=(3, 8)), jnp.float32), jnp.asarray(rng.normal(size=8), jnp.float32)
    check_grads(lambda x, s: rms_norm(x, s, 1e-5, 0.0), (x, scale), order=1, modes=["rev"], atol=1e-2, rtol=1e-2)


def test_only_the_input_is_kept():
    """In bfloat16: x and the scale, nothing in float32 of x's size."""
    x, scale = jnp.ones((4, 64, 32), jnp.bfloat16), jnp.ones(32)
    _, back = jax.vjp(lambda x, s: rms_norm(x, s, 1e-6, 0.0), x, scale)
    kept = [a for a in jax.tree.leaves(back) if getattr(a, "ndim", 0)]
    assert sum(a.size * a.dtype.itemsize for a in kept) <= x.size * 2 + scale.size * 4
