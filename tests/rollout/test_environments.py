"""Environments: what they ask of an engine, and what becomes of its answers. The engine is a script, not a model."""

import itertools
import math
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from distill_jax.core import spec
from distill_jax.core.roles import INJECTED, SUPERVISED
from distill_jax.data.render import prefilled, prompt_ids, render
from distill_jax.data.tokenizer import load_tokenizer
from distill_jax.decode import Completion, Sampling
from distill_jax.rewards.check import Verdict
from distill_jax.rewards.sample import Sample
from distill_jax.rewards.shaping_modes import adapt_think, early_exit, thinks, within_budget
from distill_jax.rollout.advantages import group_mean, raw
from distill_jax.rollout.completions import Completions
from distill_jax.rollout.engine import Engine
from distill_jax.rollout.environments import (
    CLOSED,
    ELLIPSIS,
    TIME_IS_LIMITED,
    Budgeted,
    Chunked,
    EarlyExits,
    Mode,
    Modes,
    Plain,
    thinking_span,
)
from distill_jax.rollout.generation import sample_traces, seed_of
from distill_jax.traces.formats.questions import prompt_only
from tests.data.conftest import CHATML, tiny_folder
from tests.data.storing import some_traces
from tests.jobs.stub_server import serving

GENERATION = "assistant\\n' }}"
TEMPLATES = {
    "plain": CHATML,
    "opens": CHATML.replace(GENERATION, "assistant\\n<think>\\n' }}"),  # R1
    "switch": CHATML.replace(GENERATION, "assistant\\n' + ('<think>\\n\\n</think>\\n\\n' if enable_thinking is defined "
                                         "and enable_thinking is false else '') }}"),  # Qwen3
}
RULES = Sampling(temperature=1.0, max_new_tokens=60)
WRITTEN = [int(r) for r in SUPERVISED]


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tok")
    return {name: load_tokenizer(tiny_folder(folder / name, template=t)) for name, t in TEMPLATES.items()}


@pytest.fixture(scope="module")
def tok(tokenizers):
    return tokenizers["opens"]


@dataclass
class Script:
    """An engine that writes `text(prompt text, seed)` behind every prompt; the k-th token of an answer has log-prob
    -(k + 1) / 100 under the model and half of it as it was drawn."""

    tok: object
    text: object
    asked: list = field(default_factory=list)

    def complete(self, requests, sampling, *, progress=None):
        self.asked += requests
        return [self._one(r, r.limit(sampling)) for r in requests]

    def _one(self, r, limit):
        body = self.text(self.tok.decode(r.prompt), r.seed)
        ids = [*r.forced, *self.tok.encode(body, continues=True)[0].tolist(), self.tok.eos_ids[0]]
        stop, ids = len(ids) <= limit, np.array(ids[:limit], np.int32)
        logprobs = -np.arange(1, len(ids) + 1, dtype=np.float32) / 100
        behaviour = logprobs / 2
        n = len(r.forced)
        behaviour[:n] = r.forced_logprobs or 0.0
        return Completion(ids=ids, logprobs=logprobs, behaviour=behaviour, finish="stop" if stop else "length")


def questions(n=2):
    return [prompt_only(t) for t in some_traces(n)]


def answered(trace):
    """(ids, log-probs, injected) of what stands behind the prompt."""
    e = trace.encoded
    injected = np.zeros(len(e.ids), bool) if e.injected is None else e.injected
    return e.ids[e.prompt_length:], e.logprobs[e.prompt_length:], injected[e.prompt_length:]


def trained(trace, tok):
    """bool over the tokens of an answer: which of them a term is taken on; none of the prompt is."""
    roles = render(trace, tok).roles
    assert len(roles) == len(trace.encoded.ids)
    assert not np.isin(roles[:trace.encoded.prompt_length], WRITTEN).any()
    return np.isin(roles[trace.encoded.prompt_length:], WRITTEN)


def judged(trace, right):
    return Sample.of(trace, verdict=Verdict(correct=right, extracted=None, method="number"))


@given(st.text("<>/think\n."), st.text("<>/think\n."))
def test_a_prefill_is_put_once(prompt, text):
    once = prefilled(prompt, text)
    assert once.startswith(prompt) and once.endswith(text) and prefilled(once, text) == once


@pytest.mark.parametrize("name", TEMPLATES)
def test_thinking_closed_in_the_prompt(tokenizers, name):
    """TFPI's check: x' ends in `</think>` in every template, and is prompt; nothing is repeated."""
    tok = tokenizers[name]
    engine = Script(tok, lambda prompt, seed: "The answer is 1.")
    (q,) = questions(1)
    (trace,) = Plain(prefill=CLOSED).sample(engine, tok, [q], RULES, n=1)
    prompt = tok.decode(trace.encoded.ids[:trace.encoded.prompt_length])
    assert prompt.endswith("assistant\n<think>\n\n</think>\n\n") and prompt.count("<think>") == 1
    close = tok.encode(CLOSED)[0].tolist()
    assert trace.encoded.ids[:trace.encoded.prompt_length].tolist()[-len(close):] == close
    assert (trace.thinking, trace.answer, trace.flags) == ("", "The answer is 1.", ())
    assert trained(trace, tok).all() and (render(trace, tok).tokens == trace.encoded.ids).all()
    assert not thinks(judged(trace, True)) and trace.group == q.group
    assert Plain(prefill=CLOSED).longest_prompt(q, tok) == trace.encoded.prompt_length
    if name == "switch":  # what the template itself writes without thinking
        assert trace.encoded.ids.tolist()[:trace.encoded.prompt_length] == prompt_ids(
            q, tok, enable_thinking=False).tolist()


@pytest.mark.parametrize("name", TEMPLATES)
def test_an_ellipsis_leaves_the_choice(tokenizers, name):
    tok = tokenizers[name]
    say = {0: "I add.\n</think>\n\nThe answer is 1.", 1: "</think>\n\nThe answer is 1.", 2: "I add and"}
    (q,) = questions(1)
    seeds = {seed_of(0, q.group, s): say[s] for s in say}
    got = Plain(prefill=ELLIPSIS).sample(Script(tok, lambda p, seed: seeds[seed]), tok, [q], RULES, n=3)
    assert tok.decode(got[0].encoded.ids[:got[0].encoded.prompt_length]).endswith("assistant\n<think>\n...\n")
    assert [(t.thinking, t.answer) for t in got[:2]] == [("I add.", "The answer is 1."), ("", "The answer is 1.")]
    assert "unterminated_think" in got[2].flags and got[2].answer == ""
    assert [thinks(judged(t, True)) for t in got] == [True, False, True]
    assert all(trained(t, tok).all() for t in got)


def test_plain_asks_what_was_always_asked(tok):
    asked = questions(3)
    say = lambda prompt, seed: f"{seed % 7}\n</think>\n\n{seed % 5}"
    want = sample_traces(Script(tok, say), tok, asked, RULES, n=2, seed=3, teacher="t")
    got = Plain().sample(Script(tok, say), tok, asked, RULES, n=2, seed=3, teacher="t")
    assert [t.to_json() for t in got] == [t.to_json() for t in want]


def test_a_budget_in_the_question(tok):
    env = Budgeted(budgets=(5, 9, 14), text=" Think for {budget} tokens.", answer_tokens=4)
    engine = Script(tok, lambda prompt, seed: "word " * 40)
    asked = questions(12)
    got = env.sample(engine, tok, asked, RULES, n=2, seed=1)
    budgets = [t.scores["budget"] for t in got]
    assert set(budgets) == {5.0, 9.0, 14.0} and budgets[::2] == budgets[1::2], "one a group, drawn for each"
    for i, (t, r) in enumerate(zip(got, engine.asked)):
        assert t.question == f"{asked[i // 2].question} Think for {int(budgets[i])} tokens."
        assert t.group == asked[i // 2].group and len(answered(t)[0]) == r.max_new_tokens == budgets[i] + 4
        assert t.provenance.sampling["max_new_tokens"] == budgets[i] + 4
        assert env.longest_prompt(asked[i // 2], tok) >= t.encoded.prompt_length
    free = Script(tok, lambda prompt, seed: "word " * 40)
    Budgeted(budgets=(5,)).sample(free, tok, asked, RULES, n=1)
    Budgeted(budgets=(59,), answer_tokens=9).sample(free, tok, asked[:1], RULES, n=1)
    assert [r.max_new_tokens for r in free.asked] == [None] * 12 + [60], "never more than the rules allow"


def test_right_answers_within_the_budget():
    """BARD's check: multiplicative, so a wrong answer is worth nothing however short it is."""
    allowed = some_traces(1)[0].replace(scores={"budget": 1000.0})
    at = lambda right, tokens: within_budget(judged(allowed, right).replace(think_tokens=tokens))
    assert [at(True, n) for n in (900, 1000, 1125, 1250, 2000)] == [1.0, 1.0, 0.5, 0.0, 0.0]
    assert at(False, 10) == 0.0
    with pytest.raises(KeyError, match="budget"):
        within_budget(judged(some_traces(1)[0], True))


MODES = Modes(modes=(Mode(name="no_think", first="</think>", limit=20), Mode(name="think", first="A", limit=40)))


def test_modes_are_forced_in_equal_parts(tok):
    """The first token of each half is given; its behaviour log-prob is log(1/2), and it is trained on."""
    asked = questions(3)
    engine = Script(tok, lambda prompt, seed: " word" * (seed % 3) + "\n</think>\n\nThe answer is 1.")
    got = MODES.sample(engine, tok, asked, RULES, n=4, seed=2)
    assert [t.group for t in got] == [q.group for q in asked for _ in range(4)]
    close, a = (tok.encode(x)[0].tolist() for x in ("</think>", "A"))
    for i, (t, r) in enumerate(zip(got, engine.asked)):
        skips = i % 4 < 2
        ids, logprobs, injected = answered(t)
        assert ids[0] == (close if skips else a)[0] and r.max_new_tokens == (20 if skips else 40)
        assert logprobs[0] == np.float32(math.log(0.5)) and (logprobs[1:] > -0.5).all() and not injected.any()
        assert trained(t, tok).all()
        assert (t.scores["mode/no_think"], t.scores["mode/think"]) == ((1.0, 0.0) if skips else (0.0, 1.0))
        assert t.thinking.startswith("A") != skips
    three = Modes(modes=(*MODES.modes, Mode(name="long", first="So the")))  # several tokens: one was drawn
    got = three.sample(engine, tok, asked[:1], RULES, n=3)
    first = len(tok.encode("So the", continues=True)[0])
    logprobs = [answered(t)[1] for t in got]
    assert first > 1 and [x[0] for x in logprobs] == [np.float32(-math.log(3))] * 3
    assert (logprobs[2][1:first] == 0).all() and logprobs[2][first] < 0


def test_what_skipping_is_worth(tok):
    """AdaptThink's check: R_ref 0.75 and delta 0.05; nothing is taken off, the sum need not be zero."""
    engine = Script(tok, lambda prompt, seed: "I add.\n</think>\n\n1" if prompt.endswith("<think>\n") else "1")
    (q,) = questions(1)
    known = q.replace(meta={**q.meta, "reference_pass_rate": 0.75})
    skip = replace(MODES, modes=(MODES.modes[0], Mode(name="think", first="A")))
    plain = Script(tok, lambda prompt, seed: "\n\n1")
    no_think = skip.sample(plain, tok, [known], RULES, n=2)[0]
    think = skip.sample(engine, tok, [known], RULES, n=2)[1]
    assert (no_think.thinking, no_think.answer, think.thinking, think.answer) == ("", "1", "AI add.", "1")
    rewards = [adapt_think(judged(t, right)) for t in (no_think, think) for right in (True, False)]
    assert raw(rewards, [0, 0, 0, 0]).tolist() == pytest.approx([0.30, -0.70, 0.25, -0.75])
    with pytest.raises(KeyError, match="reference_pass_rate"):
        adapt_think(judged(skip.sample(plain, tok, [q], RULES, n=2)[0], True))


EXITS = EarlyExits(exits=4, text="Stop.\n</think>\n\n", answer_tokens=10)
LONG = "one two three four five six\n</think>\n\nThe answer is 1."


def full_or_exit(prompt, seed):
    return "3." if prompt.endswith("Stop.\n</think>\n\n") else LONG


@pytest.mark.parametrize("name", ["opens", "plain"])
@pytest.mark.parametrize("prefix", [False, True])
def test_exits_of_one_thinking(tokenizers, name, prefix):
    tok = tokenizers[name]
    begin = "" if name == "opens" else "<think>\n"
    say = lambda prompt, seed: ("" if "<think>" in prompt else begin) + full_or_exit(prompt, seed)
    env, asked = replace(EXITS, train_prefix=prefix), questions(2)
    engine = Script(tok, say)
    got = env.sample(engine, tok, asked, RULES, n=5, seed=4)
    assert len(got) == 10 and [t.group for t in got] == [q.group for q in asked for _ in range(5)]
    assert [len(r.prompt) for r in engine.asked[:2]] == [len(prompt_ids(q, tok)) for q in asked], "full answers first"
    end = tok.encode(EXITS.text)[0].tolist()
    for q, group in zip(asked, (got[:5], got[5:])):
        full, positions = group[-1], [t.scores["exit_position"] for t in group]
        ids, logprobs, injected = answered(full)
        first, last = thinking_span(ids, tok, opened=name == "opens")
        assert tok.decode(ids[first:last]).strip() == "one two three four five six"
        assert positions == sorted(set(positions)) and positions[0] >= 1 and positions[-1] == last - first + 1
        assert full.answer == "The answer is 1." and not injected.any() and trained(full, tok).all()
        for t in group[:-1]:
            shared = first + int(t.scores["exit_position"])
            mine, mine_logprobs, mine_injected = answered(t)
            assert mine[:shared].tolist() == ids[:shared].tolist()
            assert mine[shared:shared + len(end)].tolist() == end and t.answer == "3."
            np.testing.assert_array_equal(mine_logprobs[:shared], logprobs[:shared])
            assert t.encoded.prompt_length == len(prompt_ids(q, tok)) == full.encoded.prompt_length
            want = np.arange(len(mine)) >= shared + len(end)
            want[:shared] |= prefix
            assert trained(t, tok).tolist() == want.tolist() and (mine_injected == ~want).all()
            row = render(t, tok)
            assert (row.roles[t.encoded.prompt_length:][~want] == int(INJECTED)).all()
            assert (row.tokens == t.encoded.ids).all() and math.isfinite(t.scores["mean_logprob"])


def test_the_walk_over_the_exits(tok):
    """S-GRPO's check: right by position [0, 1, 1, 0, 1], in whatever order the samples come."""
    got = EXITS.sample(Script(tok, full_or_exit), tok, questions(1), RULES, n=5)
    samples = [judged(t, right) for t, right in zip(got, (False, True, True, False, True))]
    want = {s.exit: a for s, a in zip(samples, (-0.35, 0.65, 0.15, -0.35, -0.10))}
    for order in (range(5), (4, 2, 0, 3, 1)):
        mixed = [samples[i] for i in order]
        rewards = early_exit(mixed)
        assert sorted(rewards) == [0, 0, 0.25, 0.5, 1]
        assert group_mean(rewards, np.zeros(5)).tolist() == pytest.approx([want[s.exit] for s in mixed])


@dataclass
class Counter:
    """An engine that begins with token 100 behind a prompt of `begin` tokens, and counts on from the end of others."""

    begin: int
    asked: list = field(default_factory=list)

    def complete(self, requests, sampling, *, progress=None):
        self.asked += requests
        starts = [100 if len(r.prompt) == self.begin else int(r.prompt[-1]) + 1 for r in requests]
        ids = [np.arange(s, s + r.limit(sampling), dtype=np.int32) for s, r in zip(starts, requests)]
        return [Completion(ids=i, logprobs=-i.astype(np.float32) / 1000, behaviour=-i.astype(np.float32) / 2000,
                           finish="length") for i in ids]


DELETHINK = Chunked(chunks=3, carry=4, head=1)
EIGHT = replace(RULES, max_new_tokens=8)


def test_chunks_carry_little_over(tok):
    """Delethink's check: C 8, m 4, head 1: 0 to 7, then behind 0, 5, 6, 7 the tokens 8 to 11, then behind 0, 9 to 11.
    """
    (q,) = questions(1)
    start = len(prompt_ids(q, tok))
    engine = Counter(start)
    trace = DELETHINK.sample(engine, tok, [q], EIGHT, n=1)[0]
    assert [r.prompt[start:].tolist() for r in engine.asked] == [[], [100, 105, 106, 107], [100, 109, 110, 111]]
    assert [r.limit(EIGHT) for r in engine.asked] == [8, 4, 4] and len({r.seed for r in engine.asked}) == 3
    assert answered(trace)[0].tolist() == list(range(100, 116)) and "truncated" in trace.flags
    judged_trace = trace.replace(verdict=True, scores={**trace.scores, "advantage": 0.5})
    rows = DELETHINK.rows(judged_trace, tok, EIGHT)
    assert [r.scores["chunk"] for r in rows] == [0, 1, 2] and {r.scores["advantage"] for r in rows} == {0.5}
    spans = ((100, 108), (108, 112), (112, 116))
    assert [answered(r)[0].tolist() for r in rows] == [list(range(*s)) for s in spans]
    for row, request in zip(rows, engine.asked):
        assert row.group == q.group and row.verdict is True and "truncated" in row.flags
        assert row.encoded.ids[:row.encoded.prompt_length].tolist() == request.prompt.tolist()
        assert trained(row, tok).all()  # each token once, what was carried never
        assert (answered(row)[1] == -answered(row)[0].astype(np.float32) / 2000).all()


def finished(ids, tok):
    zeros = np.zeros(len(ids), np.float32)
    return Completion(ids=np.array(ids, np.int32), logprobs=zeros, behaviour=zeros,
                      finish="stop" if ids[-1] == tok.eos_ids[0] else "length")


def test_an_answer_in_chunks_is_judged_as_one(tok):
    """The answer stands behind the thinking even where the tag was written chunks ago."""
    text = "I add one and two and get three.\n</think>\n\nThe answer is 3."
    whole = [*tok.encode(text)[0].tolist(), tok.eos_ids[0]]
    env, (q,) = Chunked(chunks=9, carry=2, head=1), questions(1)
    engine = Script(tok, None)
    left = iter(whole)
    engine._one = lambda r, limit: finished(list(itertools.islice(left, limit)), tok)
    (trace,) = env.sample(engine, tok, [q], EIGHT, n=1)
    assert (trace.thinking, trace.answer, trace.flags) == ("I add one and two and get three.", "The answer is 3.", ())
    assert judged(trace, True).correct
    rows = env.rows(trace, tok, EIGHT)
    assert len(rows) == len(engine.asked) >= 4 and whole == [i for r in rows for i in answered(r)[0]]
    assert rows[0].answer == "" and "unterminated_think" in rows[0].flags and rows[-1].thinking == ""
    assert "truncated" not in rows[-1].flags and all(trained(r, tok).all() for r in rows)


def test_one_chunk_is_plain(tok):
    say = lambda prompt, seed: f"{seed % 7}\n</think>\n\n{seed % 5}"
    asked = questions(3)
    want = Plain().sample(Script(tok, say), tok, asked, RULES, n=2, seed=3)
    got = replace(DELETHINK, chunks=1).sample(Script(tok, say), tok, asked, RULES, n=2, seed=3)
    assert [t.to_json() for t in got] == [t.to_json() for t in want]
    assert DELETHINK.rows(got[0], tok, RULES) == [got[0]]


def test_short_and_endless_thinking(tok):
    """Fewer tokens have fewer exits; a thinking that was cut is left early enough for an answer."""
    (q,) = questions(1)
    short = EXITS.sample(Script(tok, lambda p, s: "3." if p.endswith("Stop.\n</think>\n\n") else "a\n</think>\n\n1"),
                         tok, [q], RULES, n=5)
    assert [t.scores["exit_position"] for t in short] == [1, 2, 3][-len(short):] and len(short) in (2, 3)
    none = EXITS.sample(Script(tok, lambda p, s: "</think>\n\n1"), tok, [q], RULES, n=5)
    assert [t.scores["exit_position"] for t in none] == [1]
    endless = replace(EXITS, exits=60)  # more than there are places
    engine = Script(tok, lambda p, s: "3." * 20 if p.endswith("Stop.\n</think>\n\n") else "word " * 100)
    cut = endless.sample(engine, tok, [q], RULES, n=61)
    end = len(tok.encode(EXITS.text)[0])
    assert [t.scores["exit_position"] for t in cut] == [*range(1, 51 - end), 61]
    assert "truncated" in cut[-1].flags and {len(answered(t)[0]) for t in cut} <= set(range(1, 61))
    assert max(len(answered(t)[0]) for t in cut[:-1]) == 60, "the last exit leaves just the room"
    ended = EXITS.sample(Script(tok, lambda p, s: "3." if p.endswith("Stop.\n</think>\n\n") else "a b c d e f"),
                         tok, [q], RULES, n=5)
    assert all(tok.eos_ids[0] not in answered(t)[0][:-1] for t in ended), "no exit behind the end of a turn"


@pytest.mark.parametrize("env,n", [(Plain(prefill=CLOSED), 4), (Budgeted(budgets=(5, 6, 7, 8)), 4), (MODES, 4),
                                   (EXITS, 5), (Chunked(chunks=3, carry=4, head=2), 4)])
def test_an_answer_depends_on_seed_question_and_number_alone(tok, env, n):
    say = lambda prompt, seed: "3." if prompt.endswith("Stop.\n</think>\n\n") else (
        "word " * (5 + seed % 11) + f"\n</think>\n\n{seed}")
    ask = lambda asked, seed: {t.id: t.to_json() | {"provenance": 0} for t in env.sample(
        Script(tok, say), tok, asked, RULES, n=n, seed=seed)}
    asked = questions(4)
    whole = ask(asked, 7)
    assert whole == ask(asked[::-1], 7) and ask(asked[1:3], 7).items() <= whole.items()
    assert set(whole) != set(ask(asked, 8))
    assert spec.from_plain(spec.to_plain(env)) == env


def test_behind_a_server(tok):
    """Ids go out and come back; what the server does not say of forced and shared tokens is in no mean."""
    body, stop = tok.encode("one two\n</think>\n\n1")[0].tolist(), tok.eos_ids[0]
    end, (q,) = tok.encode(EXITS.text)[0].tolist(), questions(1)

    def reply(asked):
        ids = [*([40] if asked["prompt"][-len(end):] == end else body), stop]
        said = {"tokens": [""] * len(ids), "token_logprobs": [-0.25] * len(ids)}
        return 200, {"choices": [{"text": "", "finish_reason": "stop", "token_ids": ids, "logprobs": said}]}

    with serving(reply) as (url, seen):
        server = Completions(engine=Engine(url=url, model="m"))
        exits = EXITS.sample(server, tok, [q], RULES, n=5)
        modes = MODES.sample(server, tok, [q], RULES, n=2)
    assert len(exits) == 1 + min(4, int(exits[-1].scores["exit_position"]) - 1) > 2
    for t in exits[:-1]:
        ids, logprobs, injected = answered(t)
        assert ids.tolist()[-2:] == [40, stop] and injected[:-2].all() and t.scores["mean_logprob"] == -0.25
        assert logprobs[:int(t.scores["exit_position"])].tolist() == [-0.25] * int(t.scores["exit_position"])
    assert [answered(t)[1][0] for t in modes] == [np.float32(math.log(0.5))] * 2
    prompts = [b["prompt"][len(prompt_ids(q, tok)):] for b in seen[-2:]]
    assert sorted(prompts) == sorted([tok.encode(m.first)[0].tolist() for m in MODES.modes]), "the server goes on there"


def test_an_answer_cut_inside_a_character_is_trained_on(tokenizers):
    """Its text is not that of its bytes, so it is not found again in them; it is an answer nevertheless."""
    tok = tokenizers["switch"]
    (trace,) = Plain(prefill=CLOSED).sample(Script(tok, lambda p, s: "\U0001f999" * 40), tok, questions(1), replace(
        RULES, max_new_tokens=6), n=1)
    assert trace.answer.endswith("\ufffd") and trained(trace, tok).all()


def test_what_cannot_be_is_said(tok, tokenizers):
    for env, n, says in (
            (MODES, 3, r"a multiple of their number; got \['no_think', 'think'\] and n=3"),
            (Modes(modes=(MODES.modes[0], MODES.modes[0])), 4, "distinct names"),
            (Modes(modes=(Mode(name="a", first="A", limit=61),)), 2, r"max_new_tokens=60, got \['a 61'\]"),
            (EXITS, 4, "gives a question exits . 1 answers, got n=4: set n=5, or exits=3"),
            (replace(EXITS, answer_tokens=60), 5, "less than max_new_tokens=60, got 60"),
            (Budgeted(budgets=()), 2, "numbers of tokens, at least 1"),
            (Budgeted(text="short"), 2, r"must have the place \{budget\}"),
            (Budgeted(answer_tokens=0), 2, "at least 1 or None, got 0"),
            (replace(DELETHINK, carry=60), 2, "head=1, carry=60 and max_new_tokens=60"),
            (replace(DELETHINK, chunks=0), 2, "chunks >= 1")):
        with pytest.raises(ValueError, match=says):
            env.check(n, RULES)
    same = Modes(modes=(Mode(name="a", first="A"), Mode(name="b", first="A.")))
    with pytest.raises(ValueError, match="must begin with different tokens"):
        same.sample(Script(tok, lambda p, s: ""), tok, questions(1), RULES, n=2)
    closed = tokenizers["plain"]
    with pytest.raises(ValueError, match=r"\['no_think'\] close a thinking that the prompt does not open"):
        MODES.sample(Script(closed, lambda p, s: ""), closed, questions(1), RULES, n=2)
    opens = replace(MODES, prefill="<think>\n")
    opened = opens.sample(Script(closed, lambda p, s: "1"), closed, questions(1), RULES, n=2)
    assert opened[0].thinking == "" and "unterminated_think" in opened[1].flags
    assert TIME_IS_LIMITED.endswith("</think>\n\n")
