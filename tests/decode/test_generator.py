"""The decode loop and the Generator against the full forward pass of real (tiny) models."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distill_jax.decode import Generator, Sampling, generator, loop
from distill_jax.objective.lift import lift_tokens
from distill_jax.sharding import make_mesh, param_shardings
from tests.models.common import EVERYTHING, PLAIN, SPARSE, make

LOGPROB_TOLERANCE = 2e-5
"""Decode and trainer compute the same log-probs by other routes (one token and a cache, a whole row); float32."""


def prompts(lengths, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(1, 57, n).astype(np.int32) for n in lengths]


def full_logprobs(model, params, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of one row: log-softmax [T,V] of the plain forward pass, and the trainer's log-prob of each token [T]."""
    padded = np.zeros((1, 24), np.int32)
    padded[0, :len(ids)] = ids
    logp, trainer = forward(model, params, padded)
    return np.asarray(logp)[0, :len(ids)], np.asarray(trainer)[0, :len(ids)]


@partial(jax.jit, static_argnums=0)
def forward(model, params, tokens):
    hidden = model.apply({"params": params}, tokens, method="hidden").hidden
    head = model.head(params)
    return jax.nn.log_softmax(head.logits(hidden), -1), lift_tokens(hidden, head, tokens)[0]


@pytest.mark.parametrize("config, sampling", [
    (PLAIN, Sampling(temperature=0.9, max_new_tokens=9)), (EVERYTHING, Sampling(max_new_tokens=9)),
    (SPARSE, Sampling(max_new_tokens=9)),
], ids=["plain-sampled", "everything-greedy", "experts-greedy"])
def test_agrees_with_the_full_forward(config, sampling, monkeypatch):
    monkeypatch.setattr(generator, "PASSES", 3)  # several calls: the cache grows
    model, params = make(config)
    asked = prompts([5, 11, 1])
    for prompt, got in zip(asked, Generator(model, params, batch_size=4).generate(asked, sampling, [7, 8, 9])):
        row = np.concatenate([prompt, got.ids])
        table, trainer = full_logprobs(model, params, row)
        assert len(got.ids) == 9 and got.finish == "length"
        if sampling.greedy:
            assert (got.ids == table[len(prompt) - 1:-1].argmax(-1)).all()
        np.testing.assert_allclose(got.logprobs, trainer[len(prompt):], atol=LOGPROB_TOLERANCE)
        if not sampling.greedy:
            tempered = jax.nn.log_softmax(jnp.asarray(table) / 0.9, -1)
            want = np.asarray(tempered)[np.arange(len(prompt) - 1, len(row) - 1), got.ids]
            np.testing.assert_allclose(got.behaviour, want, atol=LOGPROB_TOLERANCE)


def test_stop_ids_end_a_row_and_only_that_row():
    model, params = make(PLAIN)
    asked, free = prompts([6, 9, 4]), Sampling(temperature=1.5, max_new_tokens=12)
    gen = Generator(model, params, batch_size=4)
    long = gen.generate(asked, free, [1, 2, 3])
    stop = int(long[0].ids[4])
    for want, got in zip(long, gen.generate(asked, Sampling(temperature=1.5, max_new_tokens=12, stop_ids=(stop, 60)),
                                            [1, 2, 3])):
        cut = next((i + 1 for i, t in enumerate(want.ids) if t in (stop, 60)), 12)
        assert got.ids.tolist() == want.ids[:cut].tolist()  # the stop token is kept
        assert got.finish == ("stop" if want.ids[cut - 1] in (stop, 60) else "length")
        assert len(got.logprobs) == len(got.behaviour) == cut


def test_ends_early_when_all_rows_have_stopped():
    model, params = make(PLAIN)
    every = Sampling(max_new_tokens=50, stop_ids=tuple(range(61)))
    gen = Generator(model, params, batch_size=2)
    assert [len(c.ids) for c in gen.generate(prompts([3, 4]), every, [0, 0])] == [1, 1]
    assert gen.usage.passes == 0 and gen.usage.tokens == 2


def test_order_seeds_and_neighbours():
    """Results come in the order of the prompts; another batch around a prompt changes nothing of it."""
    model, params = make(PLAIN)
    lengths = [3, 30, 8, 17, 5, 24, 9]
    asked, sampling = prompts(lengths), Sampling(temperature=1.0, top_p=0.95, max_new_tokens=6)
    gen = Generator(model, params, batch_size=4, buckets=(16, 32))
    together = gen.generate(asked, sampling, range(7))
    one_bucket = Generator(model, params, batch_size=8, buckets=(32,)).generate(asked, sampling, range(7))
    alone = Generator(model, params, buckets=(16, 32)).generate([asked[3]], sampling, [3])
    for a, b in zip(together, one_bucket):
        assert a.ids.tolist() == b.ids.tolist()
        np.testing.assert_allclose(a.logprobs, b.logprobs, atol=LOGPROB_TOLERANCE)
    assert alone[0].ids.tolist() == together[3].ids.tolist()
    again = gen.generate(asked, sampling, range(7))
    assert all((a.logprobs == b.logprobs).all() for a, b in zip(together, again))  # to the bit
    twice = gen.generate([asked[2]] * 4, sampling, [5, 6 + 2**40, 6, 7])
    assert twice[0].ids.tolist() != twice[1].ids.tolist() == twice[2].ids.tolist()


def test_few_compiles():
    """One a bucket and a capacity; other prompts, seeds, limits and numbers of requests compile nothing."""
    model, params = make(PLAIN, seed=5)
    programs = loop.programs(None)
    count = lambda: {name: getattr(programs, name)._cache_size() for name in ("prefill", "insert", "advance")}
    sampling = Sampling(temperature=0.7, max_new_tokens=70, stop_ids=(5, 6))
    ask = lambda n, seed, **kwargs: Generator(model, params, batch_size=4, buckets=(8, 16)).generate(
        prompts(np.random.default_rng(seed).permutation([3, 9, 7, 12, 4, 8, 2, 6] * 2)[:n], seed), sampling, range(n),
        **kwargs)
    ask(16, 0)
    before = count()
    for seed in range(1, 4):
        ask(16 - seed, seed)
    assert count() == before
    seen = []
    ask(8, 0, progress=seen.append)
    assert seen[-1] == 8 and seen == sorted(set(seen))


def test_default_buckets():
    assert [generator.bucket(n) for n in (1, 8, 9, 12, 13, 16, 17, 24, 25, 33, 48, 49, 65, 1000)] == [
        8, 8, 12, 12, 16, 16, 24, 24, 32, 48, 48, 64, 96, 1024]


@pytest.mark.parametrize("shape", [(2, 2, 2), (1, 4, 2)])
def test_on_a_mesh(shape):
    model, params = make(PLAIN)
    mesh = make_mesh(*shape)
    placed = jax.device_put(params, param_shardings(mesh, params))
    asked, sampling = prompts([5, 9, 3, 7, 6]), Sampling(temperature=1.0, max_new_tokens=5)
    want = Generator(model, params, batch_size=8).generate(asked, sampling, range(5))
    got = Generator(model, placed, batch_size=8, mesh=mesh).generate(asked, sampling, range(5))
    for a, b in zip(want, got):
        assert a.ids.tolist() == b.ids.tolist()
        np.testing.assert_allclose(a.logprobs, b.logprobs, atol=LOGPROB_TOLERANCE)


def test_bad_requests():
    model, params = make(PLAIN)
    gen, sampling = Generator(model, params, buckets=(8,)), Sampling(max_new_tokens=4)
    assert gen.generate([], sampling, []) == []
    with pytest.raises(ValueError, match="as many seeds"):
        gen.generate(prompts([3]), sampling, [])
    with pytest.raises(ValueError, match="prompt 1 is empty"):
        gen.generate([*prompts([3]), np.zeros(0, np.int32)], sampling, [0, 1])
    with pytest.raises(ValueError, match="fits no bucket"):
        gen.generate(prompts([9]), sampling, [0])
    with pytest.raises(ValueError, match="context of 4096"):
        gen.generate(prompts([4000]), Sampling(max_new_tokens=100), [0])
    with pytest.raises(ValueError, match="multiple of 4"):
        Generator(model, params, batch_size=6, mesh=make_mesh(2, 2, 2))


def test_bfloat16_runs_in_bfloat16_and_agrees():
    model, params = make(PLAIN, dtype=jnp.bfloat16)
    prompt = prompts([7])
    got = Generator(model, params).generate(prompt, Sampling(max_new_tokens=6), [0])[0]
    _, trainer = full_logprobs(model, params, np.concatenate([prompt[0], got.ids]))
    np.testing.assert_allclose(got.logprobs, trainer[7:], atol=0.03)
