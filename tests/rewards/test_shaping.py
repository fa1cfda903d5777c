"""Hand values of the papers, one test a method."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from distill_jax.core import spec
from distill_jax.rewards.algebra import Reward
from distill_jax.rewards.outcome import boxed_letter, outcome, right
from distill_jax.rewards.repetition import dense_penalty, ngram_penalty
from distill_jax.rewards.shaping import (
    concise,
    cosine,
    efficiency,
    length,
    min_max_length,
    soft_overlong,
    top_groups,
)
from distill_jax.rewards.shaping_laser import EASY, HARD, MEDIUM, LaserD, band, laser, wanted
from distill_jax.rewards.shaping_modes import adapt_think, early_exit, entropies, phase_entropy
from distill_jax.traces.trace import Encoded, simple_trace
from tests.rewards.samples import row, sample

near = lambda x: pytest.approx(x, abs=1e-4)


def test_length():
    s = sample(tokens=9, think_tokens=5, answer_tokens=3)
    assert [length(s, of) for of in ("all", "thinking", "answer")] == [9, 5, 3] and length(s, per=3) == 3


@pytest.mark.parametrize("tokens,value", [(0, 0), (80, 0), (90, -0.5), (100, -1), (101, -1), (10**6, -1)])
def test_dapo_soft_overlong(tokens, value):
    assert soft_overlong(sample(tokens=tokens), limit=100, cache=20) == near(value)


@pytest.mark.parametrize("correct,values", [(True, [2, 1.8536, 1.5, 1.1464]), (False, [-10, -8.5355, -5, -1.4645])])
def test_cosine(correct, values):
    said = [cosine(s, limit=100, margin=0) for s in row([correct] * 4, [0, 25, 50, 75])]
    assert said == near(values)
    assert cosine(sample(correct=True, tokens=100), limit=100, margin=0) == -10
    assert cosine(sample(correct=True, tokens=84), limit=100) == -10  # the default margin of 16


def test_kimi_min_max():
    assert min_max_length(row([1, 1, 0, 0], [10, 30, 10, 20])) == near([0.5, -0.5, 0.0, 0.0])
    assert min_max_length(row([0, 1], [30, 10])) == near([-0.5, 0.5])
    assert min_max_length(row([1, 0], [7, 7])) == [0, 0]


def test_conciser():
    lengths = [100, 200, 300]
    assert concise(row([1, 1, 1], lengths), limit=1000) == near([1.9, 1.8, 1.7])
    assert concise(row([1, 0, 1], lengths), limit=1000) == [1, 0, 1]


def test_grpo_lambda():
    samples = row([1, 1, 1], [200, 400, 600])
    assert efficiency(samples) == near([0.9546, 0.9, 0.8454])
    assert efficiency(samples, ddof=1) == near([0.9462, 0.9, 0.8538])
    assert efficiency(row([1, 0], [5, 1])) == near([0.9, 0]) and efficiency(row([1], [5]), ddof=1) == near([0.9])
    assert efficiency(row([0, 0], [5, 1])) == [0, 0] and efficiency(row([1, 1], [5, 5])) == near([0.9, 0.9])


def test_grpo_lambda_takes_the_best_groups():
    verdicts = [[1, 1, 1, 1], [1, 1, 1, 0], [1, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0]]
    samples = [s for i, v in enumerate(verdicts) for s in row(v, [1, 2, 3, 4], group=f"g{i}")]
    plain = [float(s.correct) for s in samples]
    out = top_groups(samples, share=0.2)
    assert out[:4] == near(efficiency(samples[:4])) and out[4:] == plain[4:]
    assert top_groups(samples, share=0.4)[4:8] == near(efficiency(samples[4:8]))
    tied = [s for g in ("b", "a") for s in row([1, 1], [1, 3], group=g)]  # by name, not by order
    assert top_groups(tied, share=0.5)[:2] == [1, 1] and top_groups(tied[::-1], share=0.5)[2:] == [1, 1]


def test_s_grpo():
    verdicts = [0, 1, 1, 0, 1]
    samples = [sample(correct=bool(c), exit=i) for i, c in enumerate(verdicts)]
    assert early_exit(samples) == [0, 1, 0.5, 0, 0.25]
    assert np.subtract(early_exit(samples), np.mean(early_exit(samples))) == near([-0.35, 0.65, 0.15, -0.35, -0.10])
    assert early_exit(samples[::-1]) == [0.25, 0, 0.5, 1, 0]  # exits decide, not the order in which they came
    swapped = [s.replace(exit={1: 2, 2: 1}.get(s.exit, s.exit)) for s in samples]
    assert early_exit(swapped) == [0, 0.5, 1, 0, 0.25]
    assert sum(early_exit([sample(correct=True, exit=i) for i in range(60)])) < 2 + 1e-12
    with pytest.raises(ValueError, match="distinct exits"):
        early_exit(row([1, 1], [1, 2]))


@pytest.mark.parametrize("think,answer,alpha,value", [(0.6, 0.2, 1, 0.6), (0.6, 0.2, 0, 0.4), (0.1, 0.2, 1, 1.0)])
def test_pear(think, answer, alpha, value):
    signals = {"think_entropy": think, "answer_entropy": answer}
    assert phase_entropy(sample(correct=True, signals=signals), alpha=alpha) == near(value)
    assert phase_entropy(sample(correct=False, signals=signals), alpha=alpha) == 0
    assert phase_entropy(sample(correct=True, terminated=False, signals=signals), alpha=alpha) == 0
    missing = Reward(fn=phase_entropy).score([sample(correct=True)], None)
    assert missing.values.tolist() == [0] and missing.failures == {"": 1}


def test_pear_signals():
    assert entropies([1.0, 3.0, 9.0, 0.5], 2) == {"think_entropy": 2.0, "answer_entropy": 0.5}
    assert entropies([1.0, 3.0], None) == {"think_entropy": 2.0, "answer_entropy": 0.0}
    assert entropies([1.0], 0) == {"think_entropy": 0.0, "answer_entropy": 0.0}


@pytest.mark.parametrize("correct,thinking,value", [
    (True, "", 0.30), (False, "", -0.70), (True, "so", 0.25), (False, "so", -0.75)])
def test_adapt_think(correct, thinking, value):
    s = sample(correct=correct, thinking=thinking, signals={"reference_pass_rate": 0.75})
    assert adapt_think(s) == near(value)


@pytest.mark.parametrize("answer,value", [
    ("\\boxed{B}", 1), ("\\boxed{(b)}", 1), ("so \\boxed{\\text{B}. aspirin}", 1), ("B", 0), ("The answer is B", 0),
    ("\\boxed{A} no, \\boxed{B}", 1), ("\\boxed{B} no, \\boxed{A}", 0), ("\\boxed{aspirin}", 0), ("", 0)])
def test_alphamed(answer, value):
    assert boxed_letter(sample(gold="B", answer=answer)) == value
    assert boxed_letter(sample(gold="B", answer=answer, text=f"<think>{answer}")) == value  # format changes nothing
    assert boxed_letter(sample(gold="B", answer=answer, terminated=False)) == 0


def test_outcome():
    assert [outcome(s) for s in row([1, 0], [1, 1])] == [1, 0]
    assert outcome(sample(correct=False), wrong=-1) == -1
    none = sample(correct=False, method="no_answer")
    assert outcome(none, wrong=-0.5, unanswered=-1) == -1 and outcome(none, wrong=-0.5) == -0.5
    assert outcome(sample(correct=True, terminated=False), unanswered=-1) == -1  # unterminated thinking is wrong
    assert not right(sample(correct=True, terminated=False)) and not right(sample())


def test_laser():
    assert laser(sample(correct=True, tokens=3000), 4096) == 1.5 and laser(sample(correct=True, tokens=5000), 4096) == 1
    assert laser(sample(correct=True, tokens=4096), 4096) == 1.5
    assert laser(sample(correct=False, tokens=3000), 4096) == -0.5
    assert laser(sample(correct=False, tokens=9, method="no_answer"), 4096) == -1


@given(st.booleans(), st.integers(0, 9000), st.floats(0, 9000), st.floats(0, 9000))
def test_raising_the_target_never_lowers_a_laser_reward(correct, length, a, b):
    s = sample(correct=correct, tokens=length)
    assert laser(s, max(a, b)) >= laser(s, min(a, b))


def test_laser_bands():
    assert [band(n / 6) for n in range(7)] == [HARD, HARD, MEDIUM, MEDIUM, EASY, EASY, EASY]
    assert [band(n / 3) for n in range(4)] == [HARD, MEDIUM, EASY, EASY]
    assert wanted(8) == (5, 2, 1) and wanted(1) == (1, 1, 1)


def test_laser_targets_follow_the_monitoring_set():
    d = LaserD(lower=10, upper=80, step=10)
    lengths = [5, 12, 35, 45, 55, 65, 75, 85]
    monitor = [s for g, n in (("easy", 8), ("medium", 4), ("hard", 1))
               for s in row([1] * n + [0] * (8 - n), lengths, group=g)]
    state = d.update(monitor, d.init())
    # coverage .2 from two of eight, .5 from four; all of the hard ones are covered by nothing in the grid
    assert state["targets"].tolist() == [20, 50, np.inf]
    samples = row([1] * 8, [19, 21] * 4, group="x")
    assert d.value(samples, state) == [1.5, 1.0] * 4
    hard = row([1] + [0] * 7, [10**6] * 8, group="y")
    assert d.value(hard, state) == [1.5] + [-0.5] * 7  # no limit for that band
    assert LaserD(start=20).value(samples, LaserD(start=20).init()) == [1.5, 1.0] * 4
    assert d.value(samples, d.init()) == [1.5] * 8 and d.update([], state) is state
    assert spec.from_plain(spec.to_plain(Reward(fn=d))) == Reward(fn=d)


def test_laser_de_pays_wrong_answers_that_explore():
    d = LaserD(explore=0.5)
    state = {"targets": np.full(3, 4096.0)}
    long = {"tokens": 5000, "correct": False}
    assert d.value([sample(**long, thinking=" ".join(map(str, range(500))))], state) == [0.0]
    assert d.value([sample(**long, thinking="wait, no. " * 500)], state) == [-0.5]
    assert d.value([sample(**long, method="no_answer")], state) == [-1.0]
    assert d.value([sample(tokens=4096, correct=False)], state) == [-0.5]


def test_repetition():
    ids = lambda x: sample().replace(trace=simple_trace("q", "", "a", encoded=Encoded(
        tokenizer="t", ids=np.array([7, 7, *x]), prompt_length=2)))
    assert ngram_penalty(ids([5] * 5), n=2) == -0.75
    assert ngram_penalty(ids([1, 2, 3, 4]), n=2) == 0 and ngram_penalty(ids([1]), n=2) == 0
    assert ngram_penalty(sample(thinking="So so SO so", answer="so"), n=2) == -0.75  # words, where there are no ids
    assert dense_penalty([1, 2, 1, 2], n=2).tolist() == [0, 0, -0.05, -0.05]
    assert dense_penalty([1, 2, 3], n=2).tolist() == [0, 0, 0] and dense_penalty([], n=2).shape == (0,)


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 10**9), st.sampled_from("abc")), max_size=12))
def test_nothing_is_ever_not_finite(rows):
    samples = [sample(correct=c, tokens=n, group=g) for c, n, g in rows]
    for reward in (Reward(fn=min_max_length), Reward(fn=efficiency), Reward(fn=top_groups),
                   Reward(fn=concise, kwargs={"limit": 100}), Reward(fn=cosine, kwargs={"limit": 100}),
                   Reward(fn=soft_overlong, kwargs={"limit": 100, "cache": 20}), Reward(fn=LaserD())):
        scores = reward.score(samples, reward.init())
        assert not scores.failures and all(map(math.isfinite, scores.values))
