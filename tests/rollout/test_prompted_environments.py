"""Environments that change the prompt: what they ask of an engine, and what becomes of its answers."""

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from distill_jax.data.render import prefilled, prompt_ids, render
from distill_jax.rewards.shaping_modes import adapt_think, thinks, within_budget
from distill_jax.rollout.advantages import raw
from distill_jax.rollout.environments import (
    CLOSED,
    ELLIPSIS,
    Budgeted,
    Mode,
    Modes,
    Plain,
)
from distill_jax.rollout.generation import sample_traces, seed_of
from tests.data.storing import some_traces
from tests.rollout.scripted import (
    MODES,
    RULES,
    TEMPLATES,
    Script,
    answered,
    judged,
    questions,
    trained,
)


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
