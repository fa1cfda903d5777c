"""`models.product` is what it replaces: values and gradients, in every dtype, for any number of tokens."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from distill_jax.models.layers import ACTIVATIONS
from distill_jax.models.product import gated, product


def arrays(dtype, *shapes):
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.standard_normal(s), dtype) for s in shapes]


@pytest.mark.parametrize("tokens", [1, 7, 16])
@pytest.mark.parametrize("dtype, rtol", [("float32", 1e-5), ("bfloat16", 2e-2)])
def test_product(tokens, dtype, rtol):
    x, kernel, grad = arrays(dtype, (tokens, 12), (12, 20), (tokens, 20))
    got, back = jax.vjp(product, x, kernel)
    assert got.dtype == dtype and [g.dtype for g in back(grad)] == [dtype, dtype]
    wide = lambda a: np.asarray(a, np.float64)
    for value, want in zip((got, *back(grad)), (
            wide(x) @ wide(kernel), wide(grad) @ wide(kernel).T, wide(x).T @ wide(grad))):
        np.testing.assert_allclose(wide(value), want, rtol=rtol, atol=rtol * np.abs(want).max())


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_gated(name):
    activation = ACTIVATIONS[name]
    gate, up = arrays("float32", (5, 6), (5, 6))
    np.testing.assert_allclose(gated(activation, gate, up), activation(gate) * up, rtol=1e-6)
    check_grads(lambda g, u: gated(activation, g, u), (gate, up), order=1, modes=["rev"], rtol=2e-2)
    half = gated(activation, gate.astype(jnp.bfloat16), up.astype(jnp.bfloat16))
    assert half.dtype == jnp.bfloat16
    np.testing.assert_allclose(half.astype(jnp.float32), activation(gate) * up, rtol=4e-2, atol=4e-2)
