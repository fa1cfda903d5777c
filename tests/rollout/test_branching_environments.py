"""Early exits and chunks: what they ask of an engine, and what becomes of its answers."""

import itertools
import math
from dataclasses import dataclass, field, replace

import numpy as np
import pytest

from distill_jax.core import spec
from distill_jax.core.roles import INJECTED
from distill_jax.data.render import prompt_ids, render
from distill_jax.decode import Completion
from distill_jax.rewards.shaping_modes import early_exit
from distill_jax.rollout.advantages import group_mean
from distill_jax.rollout.completions import Completions
from distill_jax.rollout.engine import Engine
from distill_jax.rollout.environments import (
    CLOSED,
    TIME_IS_LIMITED,
    Budgeted,
    Chunked,
    Mode,
    Modes,
    Plain,
    thinking_span,
)
from tests.jobs.stub_server import serving
from tests.rollout.scripted import (
    EXITS,
    MODES,
    RULES,
    Script,
    answered,
    judged,
    questions,
    trained,
)

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
