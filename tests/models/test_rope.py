"""Rotary embeddings: hand values and the properties that define them."""

import math

import jax.numpy as jnp
import numpy as np
import pytest

from distill_jax.models.rope import Dynamic, Linear, Llama3, Rope, Yarn, rotate


def test_plain_angles():
    cos, sin = Rope(theta=100.0).tables(jnp.asarray([[0, 3]]), 4, 2)
    np.testing.assert_allclose(cos[0, 1], [math.cos(3), math.cos(3 / 10)], rtol=1e-6)
    np.testing.assert_allclose(sin[0, 1], [math.sin(3), math.sin(3 / 10)], rtol=1e-6)
    np.testing.assert_array_equal(cos[0, 0], [1, 1])


def test_rotation_pairs_halves_and_leaves_the_rest():
    x = jnp.asarray([1.0, 2.0, 3.0, 4.0, 5.0, 6.0]).reshape(1, 1, 1, 6)
    cos, sin = jnp.zeros((1, 1, 2)), jnp.ones((1, 1, 2))  # a quarter turn of the first four
    np.testing.assert_array_equal(rotate(x, cos, sin).ravel(), [-3, -4, 1, 2, 5, 6])


def test_scores_depend_on_distance_only():
    rope = Rope(theta=1e4, scaling=Yarn(factor=4.0, original=16))
    rng = np.random.default_rng(0)
    q, k = (jnp.asarray(rng.normal(size=(1, 1, 1, 8)), jnp.float32) for _ in range(2))

    def score(m, n):
        turn = lambda x, p: rotate(x, *rope.tables(jnp.asarray([[p]]), 8, 64))
        return float(jnp.sum(turn(q, m) * turn(k, n)))

    assert score(9, 4) == pytest.approx(score(45, 40), abs=1e-4)
    assert abs(score(9, 4) - score(9, 5)) > 1e-3


def test_linear_divides_positions():
    got = Rope(scaling=Linear(factor=4.0)).tables(jnp.asarray([[8]]), 8, 9)
    np.testing.assert_allclose(got[0], Rope().tables(jnp.asarray([[2]]), 8, 9)[0], rtol=1e-6)


def test_dynamic_is_plain_within_the_context_and_stretches_beyond():
    rope, at = Rope(scaling=Dynamic(factor=2.0, original=64)), jnp.asarray([[50]])
    np.testing.assert_array_equal(rope.tables(at, 8, 64)[0], Rope().tables(at, 8, 64)[0])
    base = 1e4 * (2 * 128 / 64 - 1) ** (8 / 6)
    np.testing.assert_allclose(rope.tables(at, 8, 128)[0], Rope(theta=base).tables(at, 8, 128)[0], rtol=1e-5)


def test_llama3_keeps_short_and_divides_long_wavelengths():
    scaling = Llama3(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original=8192)
    freq, scale = scaling.frequencies(5e5, 128, 0)
    plain = 1.0 / 5e5 ** (np.arange(0, 128, 2) / 128)
    wavelength = 2 * np.pi / plain
    np.testing.assert_allclose(freq[wavelength < 2048], plain[wavelength < 2048], rtol=1e-6)
    np.testing.assert_allclose(freq[wavelength > 8192], plain[wavelength > 8192] / 8, rtol=1e-6)
    middle = (wavelength > 2048) & (wavelength < 8192)
    blend = (8192 / wavelength[middle] - 1) / 3
    np.testing.assert_allclose(freq[middle], plain[middle] * ((1 - blend) / 8 + blend), rtol=1e-5)
    assert scale == 1.0 and middle.sum() > 3


def test_yarn_magnitude():
    assert Yarn(factor=4.0, original=16).frequencies(1e4, 8, 0)[1] == pytest.approx(0.1 * math.log(4) + 1)
    assert Yarn(factor=4.0, original=16, attention_factor=0.7).frequencies(1e4, 8, 0)[1] == 0.7
    deepseek = Yarn(factor=40.0, original=4096, mscale=1.0, mscale_all_dim=1.0)
    assert deepseek.frequencies(1e4, 64, 0)[1] == 1.0
