"""Systematic draws: the right ones on average, never far from it, and merged without loss."""

import jax
import jax.numpy as jnp
import numpy as np

from distill_jax.rollout.draws import BLOCK, merge, systematic, uniform

V, N, SHIFTS = 2 * BLOCK + 77, 9, 256


def distributions() -> np.ndarray:
    """Flat, peaked, and with most ids impossible; not normalised to the last bit."""
    rng = np.random.default_rng(0)
    flat = rng.random(V)
    peaked = np.exp(4 * rng.normal(size=V))
    sparse = np.zeros(V)
    sparse[[3, BLOCK - 1, BLOCK, V - 1]] = [0.5, 0.2, 0.2, 0.1]
    return np.stack([x / x.sum() for x in (flat, peaked, sparse)])


def test_draws_are_unbiased_and_within_one_of_their_expectation():
    p = distributions()
    u = jnp.asarray((np.arange(SHIFTS) + 0.5) / SHIFTS, jnp.float32)
    draw = jax.jit(jax.vmap(lambda u: merge(systematic(jnp.asarray(p, jnp.float32), jnp.full(len(p), u), N),
                                            jnp.full((len(p), N), 1.0 / N, jnp.float32))))
    ids, weights = (np.asarray(x) for x in draw(u))
    mean = np.zeros_like(p)
    for row in range(len(p)):
        counts = np.zeros((SHIFTS, V))
        for shift in range(SHIFTS):
            there = ids[shift, row] >= 0
            assert len(set(ids[shift, row][there])) == there.sum() and np.isclose(weights[shift, row].sum(), 1)
            counts[shift, ids[shift, row][there]] = weights[shift, row][there] * N
        assert np.abs(counts - N * p[row]).max() < 1 + 1e-3
        assert not counts[:, p[row] == 0].any()
        mean[row] = counts.mean(axis=0) / N
    np.testing.assert_allclose(mean, p, atol=2 / (N * SHIFTS))


def test_places_at_the_edges_are_drawn_from_what_has_mass():
    p = jnp.zeros((2, 2 * BLOCK)).at[0, 5].set(0.3).at[1, 2 * BLOCK - 3].set(1.0)
    for u in (0.0, np.nextafter(np.float32(1), np.float32(0))):
        assert np.asarray(systematic(p, jnp.full(2, u, jnp.float32), 4)).tolist() == [[5] * 4, [2 * BLOCK - 3] * 4]


def test_uniform_is_a_function_of_row_and_place():
    one = uniform(jnp.uint32([7, 7, 8, 7]), jnp.int32([1, 2, 1, 1]))
    assert one[0] == one[3] and len({float(x) for x in one}) == 3 and bool(jnp.all((one >= 0) & (one < 1)))
