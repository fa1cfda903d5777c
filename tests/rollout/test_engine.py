"""Traces from a (stub) server: splitting, log-probs, retries, refusals."""

import pytest

from distill_jax.decode import Sampling
from distill_jax.rollout.engine import Engine, engine_traces
from distill_jax.rollout.generation import seed_of
from distill_jax.traces.formats import Reject
from distill_jax.traces.formats.questions import prompt_only
from distill_jax.traces.trace import simple_trace
from tests.jobs.stub_server import said, serving

SAMPLING = Sampling(temperature=0.7, top_p=0.9, max_new_tokens=50)


def questions(*texts):
    return [prompt_only(simple_trace(t, "x", "y", gold="4", system="Be brief.")) for t in texts]


def test_replies_become_traces():
    def reply(body):
        text = body["messages"][-1]["content"]
        return {"tags": said("<think>2 and 2</think>\n\n4", logprobs=[-1.0, -2.0]),
                "apart": said("4", reasoning_content="2 and 2"),
                "new": said("4", reasoning="2 and 2"),
                "plain": said("4"),
                "close": said("2 and 2</think>\n\n4"),
                "cut": said("<think>2 and", finish="length")}[text]

    names = ("tags", "apart", "new", "plain", "close", "cut")
    with serving(reply) as (url, seen):
        engine = Engine.connect(url, parallel=4, api_key="secret")
        got = engine_traces(engine, questions(*names), SAMPLING, n=2, seed=5)
    assert engine.model == "stub" and len(got) == 12
    assert [t.question for t in got] == [q for q in names for _ in range(2)]
    tags, apart, new, plain, close, cut = got[::2]
    for t in (tags, apart, new, close):
        assert (t.thinking, t.answer, t.gold, t.system) == ("2 and 2", "4", "4", "Be brief.")
    assert tags.scores == {"mean_logprob": -1.5} and apart.scores == {} and tags.encoded is None
    assert (plain.thinking, plain.answer) == ("", "4")
    assert close.flags == ("missing_open_think",)
    assert set(cut.flags) == {"unterminated_think", "empty_answer", "truncated"}
    assert tags.provenance.teacher == "stub" and tags.provenance.sampling["temperature"] == 0.7
    assert {b["seed"] for b in seen if b["messages"][-1]["content"] == "tags"} == {
        seed_of(5, tags.group, s) % 2**31 for s in (0, 1)}
    first = seen[0]
    assert first["messages"][0] == {"role": "system", "content": "Be brief."}
    assert (first["max_tokens"], first["top_p"], first["logprobs"]) == (50, 0.9, True)
    assert first["key"] == "Bearer secret" and "top_k" not in first


def test_trouble_that_passes_is_tried_again():
    count = {"n": 0}

    def reply(body):
        count["n"] += 1
        return (503, {"error": "busy"}) if count["n"] % 4 == 1 else (
            (429, {}) if count["n"] % 4 == 2 else ((200, b"no json") if count["n"] % 4 == 3 else said("4")))

    with serving(reply) as (url, _):
        engine = Engine(url=url, model="m", parallel=1, pause=0.001)
        assert [t.answer for t in engine_traces(engine, questions("a", "b"), SAMPLING)] == ["4", "4"]
        assert count["n"] == 8
        with pytest.raises(OSError, match="3 attempts failed"):
            engine_traces(Engine(url=url, model="m", parallel=1, pause=0.001, retries=2), questions("c"), SAMPLING)


def test_refusals():
    def reply(body):
        if "logprobs" in body:
            return 400, {"error": "logprobs are not available"}
        text = body["messages"][-1]["content"]
        return (400, {"error": "too long"}) if text == "long" else said("" if text == "mute" else "4")

    with serving(reply) as (url, _):
        got = engine_traces(Engine(url=url, model="m"), questions("a", "long", "mute"), SAMPLING)
    assert got[0].answer == "4"
    assert isinstance(got[1], Reject) and got[1].reason == "refused_by_server" and "too long" in got[1].detail
    assert isinstance(got[2], Reject) and got[2].reason == "empty_response"


def test_no_server():
    with pytest.raises(ValueError, match="does not list its models"):
        Engine.connect("http://127.0.0.1:9/v1", retries=0)
    with serving(lambda b: said("x"), model="") as (url, _):
        with pytest.raises(ValueError, match="serves no model"):
            Engine.connect(url)
        with pytest.raises(ValueError, match="as far as /v1"):
            Engine.connect(url.removesuffix("/v1"), retries=0)
