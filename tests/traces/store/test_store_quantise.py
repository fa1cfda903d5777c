"""Accuracy of stored log-probs, against the bounds that `quantise` states."""

import math

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import distill_jax.traces.store.quantise as q
from distill_jax.traces.store.signals import SignalHeader, TopKRow
from tests.traces.store.store_builders import through_codec

KL_PER_NAT = {"u8": 24 / (2 * 255**2), "u16": 96 / (2 * 65535**2)}


def stored(logprobs: np.ndarray, precision: str, tail: np.ndarray | None = None) -> TopKRow:
    """One row through the codec: logprobs [T,K] of distinct ids."""
    t, k = logprobs.shape
    row = TopKRow(ids=np.tile(np.arange(k), (t, 1)), logprobs=logprobs, mask=np.ones(t, bool), tail=tail)
    return through_codec(SignalHeader(kind="topk", k=k, precision=precision), row)


def by_id(row: TopKRow) -> np.ndarray:
    """Log-probs in the order of the ids."""
    return np.take_along_axis(row.logprobs, np.argsort(row.ids, axis=1), axis=1).astype(np.float64)


def test_grid_points_by_hand():
    """Code 255 is -24, code 0 is 0, and code 51 = 255/5 is -24/25."""
    assert q.grid("u8")[[0, 51, 255]].tolist() == pytest.approx([0.0, -24 / 25, -24.0])
    assert q.encode(np.float32([0.0, -0.96, -24.0, -500.0]), "u8").tolist() == [0, 51, 255, 255]
    assert q.decode(np.uint8([51]), "u8")[0] == np.float32(-0.96)


@given(st.floats(0, 23.875, width=32), st.sampled_from(["u8", "u16"]))
def test_nearest_grid_point(x, precision):
    p = q.PRECISIONS[precision]
    code = int(q.encode(np.float32([-x]), precision)[0])
    grid = q.grid(precision)
    best = np.abs(grid + x).min()
    assert abs(grid[code] + x) <= best + 1e-6 * max(x, 1e-3)
    assert abs(grid[code] + x) <= math.sqrt(x * p.range) / p.steps + p.range / p.steps**2 + 1e-6


@pytest.mark.parametrize("precision", ["u8", "u16"])
def test_every_code_round_trips(precision):
    codes = np.arange(q.PRECISIONS[precision].steps + 1)
    np.testing.assert_array_equal(q.encode(q.grid(precision).astype(np.float32), precision), codes)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from([0.05, 0.5, 2.0, 8.0]), st.sampled_from(["u8", "u16", "f16", "f32"]))
@example(954670315, 8.0, "f32")  # float32 log-probs whose probabilities sum to 1 + 2e-8
def test_kl_bound_and_mass(seed, sharpness, precision):
    """KL over (kept outcomes, tail) stays under the stated bound; tail and kept mass are the teacher's; the decoded
    probabilities never exceed 1."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(16, 200)) * sharpness
    lp = np.sort(logits - np.log(np.exp(logits).sum(1, keepdims=True)), 1)[:, ::-1][:, :64]
    p = np.exp(lp)
    tail = 1 - p.sum(1)
    got = stored(lp.astype(np.float32), precision, tail.astype(np.float32))
    decoded = np.exp(by_id(got))
    mass = decoded.sum(1)
    assert np.all(mass <= (1 + 1e-6 if precision == "f32" else 1))  # f32 is what it was given, rounding included
    assert got.tail is not None
    np.testing.assert_allclose(got.tail, np.maximum(tail, 2.0**-20 if precision[0] == "u" else 0), rtol=1.2e-4,
                               atol=2e-6)
    kl = (p * (lp - np.log(decoded))).sum(1) + np.where(
        tail > 1e-12, tail * np.log(np.maximum(tail, 1e-300) / np.maximum(got.tail, 1e-300)), 0)
    entropy = -(p * lp).sum(1)
    if precision[0] == "u":
        np.testing.assert_allclose(mass, 1 - got.tail, atol=1e-6)
        # the second term of the spacing, the tail's own error (1.1e-4 relative, floor 2^-20), and float32
        allowed = 1.1 * (KL_PER_NAT[precision] * entropy + (24 / 255**2) ** 2 / 8) + 2e-6
        assert np.all(kl <= allowed), (kl / allowed).max()
    elif precision == "f16":
        assert np.all(np.abs(by_id(got) - lp) <= np.abs(lp) * 2.0**-10 + 1e-6)
    else:
        np.testing.assert_allclose(by_id(got), lp, atol=1e-6, rtol=2e-7)


def test_kl_on_average_is_a_third_of_the_bound():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(4000, 64)) * 2
    lp = logits - np.log(np.exp(logits).sum(1, keepdims=True)) + np.log(0.9)
    decoded = by_id(stored(lp.astype(np.float32), "u8"))
    p = np.exp(lp)
    kl, entropy = (p * (lp - decoded)).sum(1).mean(), -(p * lp).sum(1).mean()
    assert 0.2 * KL_PER_NAT["u8"] * entropy < kl < 0.45 * KL_PER_NAT["u8"] * entropy


def test_f32_is_exact():
    rng = np.random.default_rng(0)
    lp = (rng.normal(size=(50, 7)) - 5).astype(np.float32)
    got = stored(lp, "f32")
    np.testing.assert_array_equal(by_id(got).astype(np.float32), lp)


def test_tail_codes():
    codes = np.arange(q.TAIL_STEPS + 1)
    np.testing.assert_array_equal(q.encode_tail(q.decode_tail(codes)), codes)
    assert q.decode_tail(np.array([q.TAIL_STEPS]))[0] == 1.0
    assert q.decode_tail(q.encode_tail(np.array([0.0])))[0] == pytest.approx(2.0**-20)


def test_certain_teacher():
    """All mass on one outcome: the log-prob comes back as nearly 0, never above it."""
    got = stored(np.array([[0.0, -50.0, -90.0]], np.float32), "u8")
    assert -2e-6 < got.logprobs[0, 0] <= 0 and got.logprobs[0, 1] <= -23.9
