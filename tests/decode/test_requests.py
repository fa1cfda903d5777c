"""What requests may ask: shared prompts, refilled slots, limits, forced and injected tokens, stop strings.

The reference is a request that is answered alone, in one go, by the same model.
"""

from dataclasses import replace

import jax
import numpy as np
import pytest

from distill_jax.decode import Generator, Injection, Request, Sampling, generator, loop
from distill_jax.sharding import make_mesh, param_shardings
from tests.decode.test_generator import LOGPROB_TOLERANCE, full_logprobs, prompts
from tests.models.common import EVERYTHING, PLAIN, make

STOP = (3, 4)
FREE = Sampling(temperature=1.0, max_new_tokens=40, stop_ids=STOP)
BYTES = lambda i: bytes([65 + i])  # ids 0 to 60: one character each


def same(a, b) -> None:
    assert a.ids.tolist() == b.ids.tolist() and a.finish == b.finish
    assert a.injected.tolist() == b.injected.tolist()
    np.testing.assert_allclose(a.logprobs, b.logprobs, atol=LOGPROB_TOLERANCE)
    np.testing.assert_allclose(a.behaviour, b.behaviour, atol=LOGPROB_TOLERANCE)


def engine(model, params, batch_size: int = 4, **kwargs) -> Generator:
    return Generator(model, params, batch_size=batch_size, buckets=(16,), token_bytes=BYTES, **kwargs)  # few compiles


def groups(n: int, samples: int) -> list[Request]:
    asked = prompts(np.random.default_rng(1).integers(3, 15, n))
    return [Request(prompt=p, seed=10 * i + s) for i, p in enumerate(asked) for s in range(samples)]


@pytest.mark.parametrize("config", [PLAIN, EVERYTHING], ids=["plain", "everything"])
def test_groups_and_refill_change_nothing(config, monkeypatch):
    """Ragged answers of shared prompts through four slots: as one by one without either, and every prompt is computed
    once."""
    monkeypatch.setattr(generator, "REFILL_COST", 2.0)  # at one free slot of four
    monkeypatch.setattr(generator, "SHRINK_FROM", 40)  # the last answer is written alone
    model, params = make(config)
    asked = groups(7, 3)
    plain = engine(model, params, 32, share_prompts=False, refill=False)
    want = plain.complete(asked, FREE)
    gen = engine(model, params)
    for a, b in zip(want, gen.complete(asked, FREE)):
        same(a, b)
    lengths = [len(c.ids) for c in want]
    assert min(lengths) < 10 < 30 < max(lengths)
    assert (plain.usage.prompts, gen.usage.prompts) == (21, 7) and gen.usage.refills > 5
    assert gen.usage.tokens == plain.usage.tokens == sum(lengths)
    assert gen.usage.slot_passes < 4 * gen.usage.passes
    # a lower bound of any schedule, and what a batch that waits for its last row would need
    batches = sum(max(lengths[i:i + 4]) for i in range(0, 21, 4))
    assert sum(lengths) / 4 - 21 <= gen.usage.passes < batches


def test_the_order_of_requests_changes_nothing():
    model, params = make(PLAIN)
    asked = [replace(r, max_new_tokens=5 + i) for i, r in enumerate(groups(6, 2))]
    gen, order = engine(model, params), np.random.default_rng(0).permutation(12)
    want, got = gen.complete(asked, FREE), gen.complete([asked[i] for i in order], FREE)
    for place, i in enumerate(order):
        same(want[i], got[place])


def test_limits_of_requests():
    model, params = make(PLAIN)
    gen = engine(model, params)
    asked = groups(5, 1)
    whole = gen.complete(asked, FREE)
    for limit, want, got in zip((1, 2, 7, 39, 60), whole, gen.complete(
            [replace(r, max_new_tokens=n) for r, n in zip(asked, (1, 2, 7, 39, 60))], FREE)):
        n = min(limit, len(want.ids))
        assert got.ids[:40].tolist() == want.ids[:n].tolist() or limit > 40
        assert got.ids[:n].tolist() == want.ids[:n].tolist() and len(got.ids) <= limit
        assert got.finish == ("stop" if got.ids[-1] in STOP else "length")


def test_forced_tokens():
    """They are answered behind, whatever was sampled; their log-probs are the model's, their behaviour as said."""
    model, params = make(PLAIN)
    prompt = prompts([6])[0]
    asked = [Request(prompt=prompt, seed=1), Request(prompt=prompt, seed=1, forced=(20,), forced_logprobs=(-0.5,)),
             Request(prompt=prompt, seed=1, forced=(3, 4, 9), max_new_tokens=8),  # stop ids, but forced
             Request(prompt=prompt, seed=1, forced=(9, 9, 9), max_new_tokens=2)]
    gen = engine(model, params)
    got = gen.complete(asked, FREE)
    assert gen.usage.prompts == 1
    assert got[1].ids[0] == 20 and got[1].behaviour[0] == -0.5
    assert got[2].ids[:3].tolist() == [3, 4, 9] and (got[2].behaviour[:3] == 0).all() and len(got[2].ids) > 3
    assert got[3].ids.tolist() == [9, 9] and got[3].finish == "length" and not got[3].injected.any()
    # a forced token that would have been sampled changes nothing else
    first = Request(prompt=prompt, seed=1, forced=(int(got[0].ids[0]),), forced_logprobs=(float(got[0].behaviour[0]),))
    same(got[0], gen.complete([first] * 4, FREE)[0])
    for c in got:
        ids = np.concatenate([prompt, c.ids[:18]])
        trainer = full_logprobs(model, params, ids)[1][len(prompt):]
        np.testing.assert_allclose(c.logprobs[:18], trainer, atol=LOGPROB_TOLERANCE)


def test_injections():
    """At a budget and in place of an end; the model goes on behind them, as if prompt and answer had been a prompt."""
    model, params = make(PLAIN)
    asked = groups(6, 1)
    gen = engine(model, params)
    free = gen.complete(asked, FREE)
    notes = (Injection(ids=(7, 8, 9)), Injection(ids=(50, 51), after=5))
    got = gen.complete([replace(r, injections=notes, max_new_tokens=30) for r in asked], FREE)
    kinds = set()
    for request, before, after in zip(asked, free, got):
        ids, spans = after.ids.tolist(), np.flatnonzero(after.injected)
        n = len(before.ids)
        if n <= 5 and before.finish == "stop":
            assert spans[:3].tolist() == [n, n + 1, n + 2] and ids[:n + 3] == [*before.ids.tolist(), 7, 8, 9]
            kinds.add("stop")
        else:
            assert spans[:2].tolist() == [5, 6] and ids[:7] == [*before.ids[:5].tolist(), 50, 51]
            kinds.add("budget")
        assert (after.behaviour[after.injected] == 0).all()
        assert len(ids) <= 30 and (after.finish == "length") == (len(ids) == 30 and ids[-1] not in STOP)
        row = np.concatenate([request.prompt, ids])[:24]
        np.testing.assert_allclose(after.logprobs[:len(row) - len(request.prompt)],
                                   full_logprobs(model, params, row)[1][len(request.prompt):], atol=LOGPROB_TOLERANCE)
    assert kinds == {"stop", "budget"}


def test_injections_at_both_ends_of_their_range():
    model, params = make(PLAIN)
    request = Request(prompt=prompts([4])[0], seed=3, forced=(9, 9), max_new_tokens=6, injections=(
        Injection(ids=(11,), after=1),  # inside the forced tokens: too late for it
        Injection(ids=(12,), after=2), Injection(ids=(13, 14, 15), after=5), Injection(ids=(16,), after=6)))
    got = engine(model, params).complete([request] * 4, FREE)[0]
    assert got.ids[:3].tolist() == [9, 9, 12] and got.ids[5] == 13 and len(got.ids) == 6
    assert got.injected.tolist() == [False, False, True, False, False, True]


def test_stop_strings(monkeypatch):
    """The answer ends with the token that completes the string, however often the host looks; prompts, forced and
    injected tokens do not count; behind an injection the answer goes on from that token."""
    monkeypatch.setattr(generator, "PASSES_WITH_STRINGS", 3)
    model, params = make(PLAIN)
    asked = groups(6, 2)
    free = Sampling(temperature=1.0, max_new_tokens=24)
    gen = engine(model, params)
    whole = gen.complete(asked, free)
    strings = tuple(bytes(65 + int(i) for i in c.ids[at:at + 2]).decode() for c, at in zip(whole[:8], range(3, 19, 2)))
    cut = gen.complete(asked, replace(free, stop_strings=strings))
    text = lambda c: "".join(BYTES(int(i)).decode() for i in c.ids)
    for want, got in zip(whole, cut):
        ends = [text(want).find(s) + 2 for s in strings if s in text(want)]
        n = min(ends, default=24)
        assert got.ids.tolist() == want.ids[:n].tolist() and got.finish == ("stop" if ends else "length")
        assert len(got.logprobs) == len(got.behaviour) == n
    note = Injection(ids=tuple(strings[0].encode()[i] - 65 for i in (0, 1)))
    got = gen.complete([replace(r, injections=(note,)) for r in asked], replace(free, stop_strings=strings))
    for request, short, long in zip(asked, cut, got):
        n = len(short.ids)
        assert long.ids[:n].tolist() == short.ids.tolist()
        if short.finish == "stop" and n < 22:
            assert long.injected[n:n + 2].all() and len(long.ids) > n + 2
            row = np.concatenate([request.prompt, long.ids])[:24]
            np.testing.assert_allclose(long.logprobs[:len(row) - len(request.prompt)], full_logprobs(
                model, params, row)[1][len(request.prompt):], atol=LOGPROB_TOLERANCE)


def test_everything_at_once_on_a_mesh(monkeypatch):
    """Slots over data x fsdp, heads over tensor; the same answers, and nothing is compiled when slots are refilled."""
    monkeypatch.setattr(generator, "SHRINK_FROM", 40)
    monkeypatch.setattr(generator, "SHRINK", 2)
    model, params = make(PLAIN)
    mesh = make_mesh(2, 2, 2)
    placed = jax.device_put(params, param_shardings(mesh, params))
    asked = [replace(r, forced=(20,) if i % 3 == 0 else (), injections=(Injection(ids=(9, 8), after=6),))
             for i, r in enumerate(groups(6, 3))]
    rules = replace(FREE, stop_strings=("AB", "C"))
    want = engine(model, params, 32, refill=False).complete(asked, rules)
    gen = engine(model, placed, 8, mesh=mesh)
    for a, b in zip(want, gen.complete(asked, rules)):
        same(a, b)
    counts = [f._cache_size() for f in loop.programs(mesh)]
    gen.complete(asked[::-1], rules)  # slots are where they were, whichever program touched them last
    assert [f._cache_size() for f in loop.programs(mesh)] == counts


def test_parameters_are_not_copied():
    """In float32 the programs are called with the caller's own arrays."""
    model, params = make(PLAIN)
    gen = Generator(model, params)
    assert generator._Work(gen, groups(1, 1), FREE, None).params is params
    low = replace_dtype(model)
    cast = generator._Work(Generator(low, params), groups(1, 1), FREE, None).params
    kinds = {str(x.dtype) for x in jax.tree.leaves(cast)}
    assert kinds == {"bfloat16", "float32"}  # norm scales stay


def replace_dtype(model):
    return model.clone(dtype=jax.numpy.bfloat16)


def test_refill_at():
    assert [generator.refill_at(256, n) for n in (1, 12, 34, 256, 1024, 16384)] == [256, 256, 128, 32, 16, 4]
    assert generator.refill_at(4, 10**6) == 1


def test_bad_requests():
    prompt = prompts([3])[0]
    for kwargs, says in (({"forced": (1,), "forced_logprobs": (0.0, 1.0)}, "one a token"),
                         ({"max_new_tokens": 0}, "at least 1"),
                         ({"injections": (Injection(ids=(1,), after=4), Injection(ids=(1,), after=4))}, "ascending")):
        with pytest.raises(ValueError, match=says):
            Request(prompt=prompt, **kwargs)
    with pytest.raises(ValueError, match="empty"):
        Injection(ids=())
    with pytest.raises(ValueError, match=r"Request\.forced"):
        Injection(ids=(1,), after=0)
    model, params = make(PLAIN)
    with pytest.raises(ValueError, match="token_bytes"):
        Generator(model, params).complete([Request(prompt=prompt)], Sampling(stop_strings=("x",)))
    with pytest.raises(ValueError, match="context of 4096"):
        Generator(model, params).complete([Request(prompt=prompt, max_new_tokens=4096)], Sampling())
