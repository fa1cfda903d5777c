"""Completions of ids from a (stub) server: what is asked, what is read, forced and injected tokens, trouble.

The stub continues a prompt of ids by a rule: last id + 1, modulo 50; 7 is its end of text.
"""

import numpy as np
import pytest

from distill_jax.data.tokenizer import load_tokenizer
from distill_jax.decode import Generator, Injection, Request, Sampling
from distill_jax.rollout.completions import Completions, parse
from distill_jax.rollout.engine import Engine
from distill_jax.rollout.generation import sample_traces
from distill_jax.traces.formats.questions import prompt_only
from distill_jax.traces.world.generate import WorldSpec, traces
from distill_jax.traces.world.tokenizer import build_tokenizer
from tests.jobs.stub_server import serving
from tests.models.common import PLAIN, make

RULES = Sampling(temperature=1.0, max_new_tokens=6, stop_ids=(7,))


def choice(ids, finish, style="token_ids", **fields):
    said = {"tokens": [f"token_id:{i}" for i in ids], "token_logprobs": [-float(i) for i in ids]}
    more = {"token_ids": ids} if style == "token_ids" else {}
    return {"choices": [{"text": "x", "finish_reason": finish, "logprobs": said, **more, **fields}]}


def count_up(body, style="token_ids"):
    ids, last = [], body["prompt"][-1]
    while len(ids) < body["max_tokens"] and (not ids or ids[-1] not in body["stop_token_ids"]):
        last = (last + 1) % 50
        ids.append(last)
    return 200, choice(ids, "stop" if ids[-1] in body["stop_token_ids"] else "length", style)


def ask(url, requests, sampling=RULES, processed=False, **kwargs):
    engine = Engine(url=url, model="m", pause=0.001, **kwargs)
    return Completions(engine=engine, processed=processed).complete(requests, sampling)


def of(*ids, **kwargs):
    return Request(prompt=np.array(ids, np.int32), **kwargs)


@pytest.mark.parametrize("style", ["token_ids", "tokens_as_ids"])
def test_requests_and_replies(style):
    with serving(lambda body: count_up(body, style)) as (url, seen):
        got = ask(url, [of(1, 4, seed=2**40 + 5), of(20, max_new_tokens=3)], Sampling(
            temperature=1.0, max_new_tokens=6, stop_ids=(7,), stop_strings=("END",)))
    assert [c.ids.tolist() for c in got] == [[5, 6, 7], [21, 22, 23]] and [c.finish for c in got] == ["stop", "length"]
    assert got[0].logprobs.tolist() == got[0].behaviour.tolist() == [-5, -6, -7] and not got[0].injected.any()
    assert got[0].ids.dtype == np.int32 and got[0].logprobs.dtype == np.float32
    first = next(b for b in seen if b["prompt"] == [1, 4])
    assert (first["max_tokens"], first["seed"], first["stop"], first["stop_token_ids"]) == (6, 5, ["END"], [7])
    assert first["ignore_eos"] and first["include_stop_str_in_output"] and "top_k" not in first


def test_what_the_log_probs_are():
    """The model's, those of the rules, or unknown: never one in the place of the other."""
    warm = Sampling(temperature=0.5, max_new_tokens=2)
    with serving(count_up) as (url, _):
        raw, done = ask(url, [of(1)], warm)[0], ask(url, [of(1)], warm, processed=True)[0]
        greedy = ask(url, [of(1)], Sampling(max_new_tokens=2))[0]
    assert raw.logprobs.tolist() == [-2, -3] and np.isnan(raw.behaviour).all()
    assert done.behaviour.tolist() == [-2, -3] and np.isnan(done.logprobs).all()
    assert greedy.logprobs.tolist() == [-2, -3] and greedy.behaviour.tolist() == [0, 0]


def test_forced_and_injected():
    notes = (Injection(ids=(10, 11), after=3), Injection(ids=(30,)))
    with serving(count_up) as (url, seen):
        plain, cut = ask(url, [of(20, forced=(1, 2), forced_logprobs=(-0.5, -0.25), injections=notes, max_new_tokens=8),
                               of(20, forced=(1, 2), max_new_tokens=1)])
        stopped = ask(url, [of(5, injections=notes)])[0]
    assert plain.ids.tolist() == [1, 2, 3, 10, 11, 12, 13, 14] and plain.finish == "length"
    assert plain.injected.tolist() == [False] * 3 + [True] * 2 + [False] * 3
    np.testing.assert_array_equal(plain.behaviour, [-0.5, -0.25, -3, 0, 0, -12, -13, -14])
    np.testing.assert_array_equal(np.isnan(plain.logprobs), [True, True, False, True, True, False, False, False])
    assert cut.ids.tolist() == [1] and cut.finish == "length"
    assert stopped.ids.tolist() == [6, 7, 30, 10, 11, 12]
    assert stopped.injected.tolist() == [False] * 2 + [True] * 3 + [False]
    assert len({b["seed"] for b in seen if b["prompt"][0] == 20}) == 2  # another draw behind an injection


def test_the_same_as_with_the_model_at_hand():
    """A server that decodes greedily with a model, against the Generator of that model."""
    model, params = make(PLAIN)
    gen = Generator(model, params, batch_size=1, buckets=(32,))

    def reply(body):
        rules = Sampling(max_new_tokens=body["max_tokens"], stop_ids=tuple(body["stop_token_ids"]))
        c = gen.generate([np.array(body["prompt"], np.int32)], rules, [0])[0]
        return 200, choice(c.ids.tolist(), c.finish, logprobs={"token_logprobs": c.logprobs.tolist()})

    prompt = np.array([3, 14, 15, 9], np.int32)
    free = gen.generate([prompt], Sampling(max_new_tokens=12), [0])[0].ids
    rules = Sampling(max_new_tokens=12, stop_ids=(int(free[4]),))
    asked = [Request(prompt=prompt), Request(prompt=prompt, forced=(int(free[0]), 44), max_new_tokens=5), Request(
        prompt=prompt, injections=(Injection(ids=(7, 8), after=2), Injection(ids=(9,)), Injection(ids=(1,), after=8)))]
    with serving(reply) as (url, _):
        got = ask(url, asked, rules, parallel=1)
    for a, b in zip(gen.complete(asked, rules), got):
        assert a.ids.tolist() == b.ids.tolist() and a.finish == b.finish
        assert a.injected.tolist() == b.injected.tolist() and a.behaviour.tolist() == b.behaviour.tolist()
        known = ~np.isnan(b.logprobs)
        assert known.sum() >= (~a.injected).sum() - 2
        np.testing.assert_allclose(a.logprobs[known], b.logprobs[known], atol=2e-5)


def test_trouble_that_passes():
    """5xx, 429, no JSON, a connection dropped before the answer and in the middle of it: tried again, and reported."""
    trouble = [(503, {}), (429, {}), (200, b"no json"), (0, None), (0, choice([1], "length"))]
    count, told = {"n": 0}, []

    def reply(body):
        count["n"] += 1
        return trouble[count["n"] - 1] if count["n"] <= len(trouble) else count_up(body)

    with serving(reply) as (url, _):
        got = ask(url, [of(1), of(2)], parallel=1, report=told.append)
        assert [c.ids[0] for c in got] == [2, 3] and count["n"] == 7 and len(told) == 5
        assert "503" in told[0] and all("/completions" in t for t in told)
        count["n"] = 0
        with pytest.raises(OSError, match="2 attempts failed"):
            ask(url, [of(1)], parallel=1, retries=1)
    with pytest.raises(OSError, match="attempts failed"):
        ask(url, [of(1)], retries=1)  # nobody is there


def test_trouble_that_stays():
    def reply(body):
        return {1: (400, {"error": "too long"}), 2: (200, choice([1], "length", "text", logprobs=None)),
                3: (200, choice([1], "abort")), 4: (200, {"choices": []}), 5: (200, choice([], "length")),
                }[body["prompt"][0]]

    with serving(reply) as (url, _):
        for first, error, says in ((1, ValueError, "prompt 0 of 1 tokens: the server refuses it: 400.*too long"),
                                   (2, ValueError, "without token ids"), (3, OSError, "broke off"),
                                   (4, ValueError, "not a completion"), (5, OSError, "wrote nothing")):
            with pytest.raises(error, match=says):
                ask(url, [of(first)])
    with pytest.raises(ValueError, match="3 token ids and 1 log-probs"):
        parse(choice([1, 2, 3], "stop", logprobs={"tokens": [], "token_logprobs": [0.0]}))


def test_traces_of_sampled_ids(tmp_path):
    """The same call as with a model at hand; the ids are the server's, not the text's encoded again."""
    tok = load_tokenizer(build_tokenizer(tmp_path / "tok"))
    asked = [prompt_only(t) for t in traces(WorldSpec(k=2), 3)]
    with serving(lambda body: (200, choice([9, 10, tok.eos_ids[0]], "stop"))) as (url, seen):
        got = sample_traces(Completions(engine=Engine(url=url, model="m")), tok, asked, Sampling(temperature=1.0), n=2)
    assert len(got) == 6 and len({b["seed"] for b in seen}) == 6
    for t in got:
        e = t.encoded
        assert e is not None and e.ids[e.prompt_length:].tolist() == [9, 10, tok.eos_ids[0]] and e.injected is None
        assert e.ids[:e.prompt_length].tolist() in [b["prompt"] for b in seen] and not t.flags.count("truncated")
