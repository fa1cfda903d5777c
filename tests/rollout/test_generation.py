"""Completions as traces: what a model writes in any template comes back as thinking, answer, flags and sampled ids."""

import dataclasses

import numpy as np
import pytest

from distill_jax.core.roles import ANSWER, THINK
from distill_jax.data.render import prompt_ids, render
from distill_jax.data.tokenizer import load_tokenizer
from distill_jax.decode import Completion, Sampling
from distill_jax.rollout.generation import completed, generate_traces, seed_of, with_stops
from distill_jax.traces.formats.questions import prompt_only
from distill_jax.traces.trace import Provenance, simple_trace
from distill_jax.traces.world.generate import WorldSpec, traces
from distill_jax.traces.world.tokenizer import build_tokenizer
from tests.data.conftest import CHATML, tiny_folder
from tests.jobs.teachers import tiny_model

OPENS = CHATML.replace("assistant\\n' }}", "assistant\\n<think>\\n' }}")


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tok")
    out = {name: load_tokenizer(build_tokenizer(folder / name, name)) for name in ("compact", "rich")}
    return out | {"chatml": load_tokenizer(tiny_folder(folder / "chatml")),
                  "opens": load_tokenizer(tiny_folder(folder / "opens", template=OPENS))}


def written(trace, tok, cut: int = 0, finish: str = "stop"):
    """The trace as if a model had sampled exactly what `render` writes (without its last `cut` ids)."""
    row, prompt = render(trace, tok), prompt_ids(trace, tok)
    ids = row.tokens[len(prompt):len(row.tokens) - cut]
    logprobs = -np.arange(1, len(ids) + 1, dtype=np.float32)
    completion = Completion(ids=ids, logprobs=logprobs, behaviour=logprobs / 2, finish=finish)
    return row, completed(prompt_only(trace), prompt, completion, tok, Provenance(teacher="t"))


@pytest.mark.parametrize("name", ["compact", "rich", "chatml", "opens"])
def test_round_trip(tokenizers, name):
    tok = tokenizers[name]
    if name in ("compact", "rich"):
        want = next(iter(traces(WorldSpec(k=3, rendering=name, style="extended"), 1)))
    else:
        want = simple_trace("What is 12 + 30?", "12 plus 30 is 42.\n\nI check the result.", "The answer is 42.\n 42",
                            gold="42", system="Think.")
    row, got = written(want, tok)
    assert (got.thinking, got.answer, got.gold, got.flags) == (want.thinking, want.answer, want.gold, ())
    assert got.group == want.group and got.provenance.teacher == "t"
    again = render(got, tok)  # from the sampled ids
    assert (again.tokens == row.tokens).all()
    assert (again.roles == row.roles).all()
    assert got.encoded.prompt_length == len(prompt_ids(want, tok))
    n = got.encoded.prompt_length
    assert (got.encoded.logprobs[:n] == 0).all() and got.encoded.logprobs[n] == -0.5
    assert got.scores["mean_logprob"] == pytest.approx(-(len(row.tokens) - n + 1) / 2)


def test_ids_that_the_text_would_not_be_encoded_to(tokenizers):
    """A model may spell a word in other pieces; roles still begin with the segments."""
    tok = tokenizers["rich"]
    want = next(iter(traces(WorldSpec(k=3, rendering="rich"), 1)))
    row, prompt = render(want, tok), prompt_ids(want, tok)
    n = len(prompt)
    at = int(np.flatnonzero(row.roles == int(ANSWER))[0])
    pieces = [tok.id_of(f"<0x{byte:02X}>") for byte in tok.token_bytes(row.tokens[at])]
    ids = np.array([*row.tokens[n:at], *pieces, *row.tokens[at + 1:]], np.int32)
    zeros = np.zeros(len(ids), np.float32)
    got = completed(prompt_only(want), prompt, Completion(ids=ids, logprobs=zeros, behaviour=zeros, finish="stop"),
                    tok, Provenance())
    assert (got.thinking, got.answer) == (want.thinking, want.answer)
    again = render(got, tok)
    assert (again.tokens[n:] == ids).all() and not np.array_equal(ids, row.tokens[n:])
    assert (again.roles[:at] == row.roles[:at]).all()
    assert (again.roles[at:] == ANSWER).all()


@pytest.mark.parametrize("name", ["compact", "chatml", "opens"])
def test_flags(tokenizers, name):
    tok = tokenizers[name]
    words = ("jack lives paris", "seek jack lives jack lives paris", "paris")
    trace = simple_trace(*words)
    row = render(trace, tok)
    supervised = lambda role: int((row.roles == int(role)).sum())
    _, cut = written(trace, tok, cut=supervised(ANSWER) + 3, finish="length")
    assert set(cut.flags) == {"unterminated_think", "empty_answer", "truncated"} and cut.answer == ""
    assert [s.role for s in cut.segments][1:] == [THINK]
    _, empty = written(trace, tok, cut=supervised(ANSWER))
    assert empty.flags == ("empty_answer",)
    _, nothing = written(trace, tok, cut=supervised(ANSWER) + supervised(THINK))
    assert nothing.answer == nothing.thinking == ""
    assert nothing.flags == (("unterminated_think",) if name == "opens" else ()) + ("empty_answer",)
    _, short = written(trace, tok, cut=1, finish="length")
    assert short.flags == ("truncated",) and short.answer in words[2]


def test_generate_traces(tokenizers):
    tok = tokenizers["compact"]
    model, params = tiny_model(tok.real)
    asked = [prompt_only(t) for t in traces(WorldSpec(k=2), 4)]
    sampling = Sampling(temperature=1.0, max_new_tokens=8)
    got = generate_traces(model, params, tok, asked, sampling, n=2, seed=3, teacher="me", batch_size=8)
    assert [t.group for t in got] == [q.group for q in asked for _ in range(2)]
    for t in got:
        new = t.encoded.ids[t.encoded.prompt_length:]
        assert t.encoded.tokenizer == tok.hash and 1 <= len(new) <= 8
        assert ("truncated" in t.flags) == (new[-1] not in tok.eos_ids)
        assert (render(t, tok).tokens == t.encoded.ids).all()
    assert got[0].provenance.sampling["sample"] == 0 and got[1].provenance.sampling["sample"] == 1
    assert got[0].encoded.ids.tolist() != got[1].encoded.ids.tolist()
    fewer = generate_traces(model, params, tok, asked[::-1][:2], sampling, n=1, seed=3, batch_size=8)
    assert [t.encoded.ids.tolist() for t in fewer] == [got[6].encoded.ids.tolist(), got[4].encoded.ids.tolist()]
    other = generate_traces(model, params, tok, asked, sampling, n=2, seed=4, batch_size=8)
    assert [t.id for t in other] != [t.id for t in got]


def test_ids_beyond_the_tokenizer_are_never_sampled(tokenizers):
    """A head padded to a round size, and a model that does not know the number of real ids."""
    tok = tokenizers["compact"]
    model, params = tiny_model(tok.real)
    model = model.clone(config=dataclasses.replace(model.config, real_vocab=None))
    asked = [prompt_only(t) for t in traces(WorldSpec(k=2), 16)]
    hot = Sampling(temperature=50.0, max_new_tokens=8)
    got = generate_traces(model, params, tok, asked, hot, batch_size=16)
    assert max(t.encoded.ids.max() for t in got) < tok.real < model.config.vocab_size
    other = tokenizers["rich"]
    with pytest.raises(ValueError, match="head only 448"):
        generate_traces(model, params, other, asked, hot)


def test_seeds_and_stops(tokenizers):
    assert seed_of(0, "g", 1) == seed_of(0, "g", 1) != seed_of(0, "g", 2) != seed_of(1, "g", 1)
    tok = tokenizers["compact"]
    assert with_stops(Sampling(), tok).stop_ids == tok.eos_ids
    assert with_stops(Sampling(stop_ids=(5,)), tok).stop_ids == (5,)
