"""Losses on the tokens where the student is uncertain, and the threshold that follows their share."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distill_jax.losses.rows.divergences import forward_kl
from distill_jax.losses.rows.selective import Selective, uncertain
from distill_jax.losses.targets import Full
from distill_jax.objective.controllers import EntropyQuantile

Z = jnp.array([[0.0, 0.0, 0.0, 0.0], [9.0, 0.0, 0.0, 0.0], [1.0, 1.0, -50.0, -50.0]])  # H = ln 4, 0.0037, ln 2
T = Full(jnp.array([[0.0, 1.0, 2.0, 3.0]] * 3))


def test_takes_rows_above_the_threshold_and_keeps_their_gradient():
    loss = Selective(loss=forward_kl, share=0.25)
    got, back = jax.vjp(lambda z: loss(z, T, threshold=jnp.float32(0.7)), Z)
    want, whole = jax.vjp(lambda z: forward_kl(z, T), Z)
    np.testing.assert_array_equal(uncertain(Z, threshold=0.7), [1, 0, 0])
    np.testing.assert_array_equal(uncertain(Z, threshold=0.5), [1, 0, 1])
    np.testing.assert_allclose(got, np.asarray(want) * 4 * [1, 0, 0], rtol=1e-6)
    ones = jnp.ones(3)
    np.testing.assert_allclose(back(ones)[0], np.asarray(whole(ones)[0]) * 4 * [[1], [0], [0]], rtol=1e-6)
    assert not np.any(jax.grad(lambda z: uncertain(z, threshold=0.7).sum())(Z)), "which rows are taken is no gradient"


def test_extreme_logits_have_no_nan():
    z = jnp.array([[1e4, -1e4, 0.0], [1e4, 1e4, 1e4]], jnp.bfloat16).astype(jnp.float32)
    loss = lambda z: Selective(loss=forward_kl)(z, Full(-z), threshold=jnp.float32(0.5)).sum()
    value, grad = jax.value_and_grad(loss)(z)
    assert np.isfinite(value) and np.isfinite(grad).all() and not grad[0].any()


def test_the_threshold_settles_where_the_share_is_above():
    """Entropies that are exponential with mean 2: the 80% quantile is 2 ln 5."""
    c = EntropyQuantile(share=0.2, rate=0.2)
    rng, state, update, seen = np.random.default_rng(0), c.init(), jax.jit(c.update), []
    for step in range(300):
        above = np.mean(rng.exponential(2.0, 500) > float(state))
        state = update(state, {"uncertain": jnp.float32(above)}, step)
        seen.append(float(state))
    assert abs(np.mean(seen[150:]) - 2 * np.log(5)) < 0.1 and np.std(seen[150:]) < 0.2
    hand = c.update(jnp.float32(2.0), {"uncertain": jnp.float32(0.7)}, 0)
    assert np.isclose(hand, 2.0 * np.exp(0.2 * 0.5))
    assert c.update(jnp.float32(2.0), {"uncertain": jnp.float32(np.nan)}, 0) == 2.0
    assert c.update(c.low * jnp.float32(1.0), {"uncertain": jnp.float32(0.0)}, 0) == np.float32(c.low)


def test_wrong_settings_are_named():
    with pytest.raises(ValueError, match=r"Selective\.share"):
        Selective(loss=forward_kl, share=0.0)
    with pytest.raises(ValueError, match="low <= start"):
        EntropyQuantile(start=30.0)
    with pytest.raises(ValueError, match="watches the term 'uncertain'; measured: \\['kd'\\]"):
        EntropyQuantile().update(jnp.float32(1), {"kd": jnp.float32(1)}, 0)
