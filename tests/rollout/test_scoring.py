"""Offline teacher signals against the dense log-softmax of the same model."""

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distill_jax.core.head import Head
from distill_jax.core.roles import ANSWER, QUESTION, SUPERVISED, TEMPLATE, THINK
from distill_jax.rollout import scoring
from distill_jax.rollout.scoring import Scorer, SignalSpec, Totals, score_rows
from distill_jax.sharding import make_mesh, param_shardings
from tests.models.common import EVERYTHING, PLAIN, make


@dataclass
class Row:
    tokens: np.ndarray
    roles: np.ndarray


def some_rows(lengths, seed=0) -> list[Row]:
    rng = np.random.default_rng(seed)
    kinds = [int(r) for r in (TEMPLATE, QUESTION, THINK, ANSWER)]
    return [Row(tokens=rng.integers(1, 57, n).astype(np.int32), roles=rng.choice(kinds, n).astype(np.uint8))
            for n in lengths]


@functools.partial(jax.jit, static_argnums=0)
def forward(model, params, tokens):
    return model.apply({"params": params}, tokens)


def dense(model, params, row: Row) -> np.ndarray:
    """float64 [T,V]: entry t is the teacher's distribution of token t; nan at t = 0."""
    padded = np.zeros((1, 24), np.int32)
    padded[0, :len(row.tokens)] = row.tokens
    logits = np.asarray(forward(model, params, padded)[0, :len(row.tokens)], np.float64)
    logp = logits - np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1, keepdims=True)) - logits.max(
        -1, keepdims=True)
    return np.concatenate([np.full((1, logits.shape[1]), np.nan), logp[:-1]])


@pytest.mark.parametrize("config", [PLAIN, EVERYTHING], ids=["plain", "everything"])
def test_top_k_and_token_against_the_dense_model(config):
    model, params = make(config)
    rows = some_rows([9, 21, 2, 13, 5])
    scorer = Scorer(model, params, SignalSpec.parse("topk:4"), batch_tokens=48, chunk=7, buckets=(24,))
    signals, totals = scorer(rows)
    nll, entropy, mass = np.zeros(9), np.zeros(9), np.zeros(9)
    tokens = score_rows(model, params, rows, SignalSpec.parse("token"), buckets=(24,))
    for row, got, token in zip(rows, signals, tokens):
        table = dense(model, params, row)
        want = np.isin(row.roles, SUPERVISED) & (np.arange(len(row.tokens)) > 0)
        assert (got.mask == want).all() and (token.mask == want).all()
        best = np.argsort(-table, axis=1, kind="stable")[:, :4]
        assert (got.ids[want] == best[want]).all() and (got.ids[~want] == -1).all()
        np.testing.assert_allclose(got.logprobs[want], np.take_along_axis(table, best, 1)[want], atol=2e-5)
        assert np.isneginf(got.logprobs[~want]).all()
        left = 1 - np.exp(np.take_along_axis(table, best, 1)).sum(1)
        np.testing.assert_allclose(got.tail[want], left[want], atol=2e-6)
        realised = table[np.arange(len(row.tokens)), row.tokens]
        np.testing.assert_allclose(token.logprobs[want], realised[want], atol=2e-5)
        h = -np.nansum(np.exp(table) * np.where(np.exp(table) > 0, table, 0), axis=1)
        for total, value in ((nll, -realised), (entropy, h), (mass, 1 - left)):
            np.add.at(total, row.roles[want], value[want])
    for name, total in (("nll", nll), ("entropy", entropy), ("mass", mass)):
        np.testing.assert_allclose(getattr(totals, name), total, rtol=1e-5, atol=1e-5)
    means = totals.means()
    n = sum(int(s.mask.sum()) for s in signals)
    assert means["tokens"] == n and set(means["by_role"]) == {"think", "answer"}
    assert means["nll"] == pytest.approx(nll.sum() / n, rel=1e-5)
    assert Totals.from_json(totals.to_json()).means() == means


def test_all_roles_and_fewer_real_ids():
    model, params = make(PLAIN)
    rows = some_rows([12, 3])
    got = score_rows(model, params, rows, SignalSpec.parse("topk:57"), on=None, real=57)
    for row, signal in zip(rows, got):
        assert signal.mask.tolist() == [False] + [True] * (len(row.tokens) - 1)
        assert signal.ids.max() < 57  # the four ids of vocabulary padding get nothing
        np.testing.assert_allclose(np.exp(signal.logprobs[1:]).sum(1), 1, atol=1e-5)
        assert (signal.tail[1:] == 0).all()


def test_same_bits_again_and_padding_changes_nothing():
    model, params = make(PLAIN)
    rows, spec = some_rows([9, 14, 3, 11]), SignalSpec.parse("topk:3")
    once = score_rows(model, params, rows, spec, batch_tokens=32)
    again = score_rows(model, params, rows, spec, batch_tokens=32)
    wide = score_rows(model, params, rows, spec, batch_tokens=96, buckets=(48,))
    for a, b, c in zip(once, again, wide):
        assert a.ids.tobytes() == b.ids.tobytes() and a.logprobs.tobytes() == b.logprobs.tobytes()
        assert (a.ids == c.ids).all()
        np.testing.assert_allclose(a.logprobs[a.mask], c.logprobs[a.mask], atol=2e-5)


def test_compiles_once_per_bucket():
    model, params = make(PLAIN, seed=9)
    before = scoring._compiled(None)._cache_size()
    score_rows(model, params, some_rows([15, 3, 16, 9, 4, 14]), SignalSpec.parse("token"), batch_tokens=32,
               buckets=(8, 16))
    assert scoring._compiled(None)._cache_size() - before == 2


def test_no_logits_of_the_whole_batch():
    model, params = make(PLAIN)
    b, t, v = 4, 96, PLAIN.vocab_size
    for spec in ("topk:4", "sampled:5:0.8", "hidden", "token"):
        static = scoring._Static(spec=SignalSpec.parse(spec), chunk=32, real=v)
        jaxpr = jax.make_jaxpr(scoring._score, static_argnums=(0, 6))(
            model, params, jnp.zeros((b, t), jnp.int32), jnp.zeros(b, jnp.int32), jnp.zeros((b, t), bool),
            jnp.zeros(b, jnp.uint32), static)
        assert f"f32[32,{v}]" in str(jaxpr)
        for shape in (f"[{b},{t},{v}]", f"[{b * t},{v}]"):
            assert shape not in str(jaxpr)


@pytest.mark.parametrize("shape", [(2, 2, 2), (8, 1, 1)])
def test_on_a_mesh(shape):
    model, params = make(PLAIN)
    mesh = make_mesh(*shape)
    placed = jax.device_put(params, param_shardings(mesh, params))
    rows, spec = some_rows([9, 14, 3, 11, 2, 7, 16, 5, 8, 1]), SignalSpec.parse("topk:5")
    want, totals = Scorer(model, params, spec, batch_tokens=64)(rows)
    got, sharded = Scorer(model, placed, spec, batch_tokens=64, mesh=mesh)(rows)
    for a, b in zip(want, got):
        assert (a.mask == b.mask).all() and (a.ids == b.ids).all()
        np.testing.assert_allclose(a.logprobs[a.mask], b.logprobs[a.mask], atol=2e-5)
    np.testing.assert_allclose(totals.nll, sharded.nll, rtol=1e-5)


def test_bad_requests():
    model, params = make(PLAIN)
    for text in ("topk", "topk:0", "topk:x", "token:3", "kl", "sampled", "sampled:4:x", "hidden:u8"):
        with pytest.raises(ValueError, match="expected topk:K"):
            SignalSpec.parse(text)
    for text in ("topk:64", "token", "sampled:50", "sampled:50:0.8", "hidden", "hidden:int8"):
        assert str(SignalSpec.parse(text)) == text
    with pytest.raises(ValueError, match="above 0"):
        SignalSpec(kind="sampled", k=4, temperature=0.0)
    with pytest.raises(ValueError, match="only 61 token ids"):
        Scorer(model, params, SignalSpec.parse("topk:62"))
    with pytest.raises(ValueError, match="context is 4096"):
        score_rows(model, params, some_rows([4097]), SignalSpec.parse("token"))
    odd = Row(tokens=np.array([1, 61], np.int32), roles=np.array([1, 4], np.uint8))
    with pytest.raises(ValueError, match="token id 61"):
        score_rows(model, params, [odd], SignalSpec.parse("token"))


def test_draws_and_states_against_the_dense_model():
    """Shares of the draws are within one draw of the probabilities and depend on the row alone; states and head give
    the teacher's own logits."""
    model, params = make(EVERYTHING)
    rows = some_rows([9, 21, 13])
    sampled = Scorer(model, params, SignalSpec.parse("sampled:20"), chunk=7, buckets=(24,))(rows)[0]
    alone = Scorer(model, params, SignalSpec.parse("sampled:20"), chunk=7, buckets=(24,))(rows[1:2])[0]
    assert alone[0].ids.tobytes() == sampled[1].ids.tobytes()
    scorer = Scorer(model, params, SignalSpec.parse("hidden"), chunk=7, buckets=(24,))
    stored = scorer.head
    head = Head(kernel=stored.kernel, bias=stored.bias, scale=stored.scale, soft_cap=stored.soft_cap, real=stored.real)
    for row, draws, states in zip(rows, sampled, scorer(rows)[0]):
        table = dense(model, params, row)[draws.mask]
        shares = np.zeros_like(table)
        for t, (ids, weights) in enumerate(zip(draws.ids[draws.mask], draws.weights[draws.mask])):
            shares[t, ids[ids >= 0]] = weights[ids >= 0]
        np.testing.assert_allclose(shares.sum(1), 1, atol=1e-6)
        np.testing.assert_allclose(shares * 20, np.rint(shares * 20), atol=1e-4)
        assert np.abs(shares - np.exp(table)).max() < 1 / 20 + 1e-5
        logits = np.asarray(head.logits(jnp.asarray(states.states[states.mask])), np.float64)
        np.testing.assert_allclose(logits - np.logaddexp.reduce(logits, axis=1)[:, None], table, atol=3e-5)


def test_draws_at_another_temperature_are_weighed_back():
    model, params = make(PLAIN)
    rows = some_rows([9, 21])
    got = score_rows(model, params, rows, SignalSpec.parse("sampled:500:2"), buckets=(24,))
    for row, draws in zip(rows, got):
        for t in np.flatnonzero(draws.mask):
            there = draws.ids[t] >= 0
            share = np.zeros(61)
            share[draws.ids[t][there]] = draws.weights[t][there]
            np.testing.assert_allclose(share, np.exp(dense(model, params, row)[t]), atol=0.016)


def test_a_row_of_nan_is_masked_and_not_counted():
    model, params = make(EVERYTHING)
    params = jax.tree.map(lambda x: x, params)
    broken = dict(params) | {"embed": jax.tree.map(lambda x: x.at[7].set(jnp.nan), params["embed"])}
    rows = some_rows([9, 9])
    rows[0].tokens[:], rows[1].tokens[:] = 3, 3
    rows[1].tokens[0] = 7
    for spec in ("topk:3", "sampled:5"):
        signals, totals = Scorer(model, broken, SignalSpec.parse(spec), buckets=(24,))(rows)
        assert signals[0].mask.any() and not signals[1].mask.any()
        assert totals.count.sum() == signals[0].mask.sum() and np.isfinite(totals.nll).all()
