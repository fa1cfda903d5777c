import math

import numpy as np
import pytest

from distill_jax.core import spec
from distill_jax.rewards import algebra
from distill_jax.rewards.algebra import Clip, Product, Reward, Sum, Where
from distill_jax.rewards.sample import Sample, groups_of
from distill_jax.traces.trace import Encoded, simple_trace
from tests.rewards.samples import row, sample


def length(s):
    return s.tokens


def right(s):
    return s.correct


def constant(s, value=1.0):
    return value


def brittle(s):
    if s.tokens == 2:
        raise RuntimeError("no")
    return math.nan if s.tokens == 3 else math.inf if s.tokens == 4 else float(s.tokens)


@algebra.group
def below_mean(samples):
    if any(s.tokens > 100 for s in samples):
        raise KeyError("too long")
    mean = np.mean([s.tokens for s in samples])
    return [mean - s.tokens for s in samples]


@algebra.batch
def rank(samples):
    return np.argsort(np.argsort([s.tokens for s in samples]))


@algebra.batch
def too_few(samples):
    return [1.0]


class Running:
    """Length above what was seen so far."""

    def init(self):
        return {"longest": np.zeros(())}

    def value(self, samples, state):
        return [s.tokens - state["longest"] for s in samples]

    def update(self, samples, state):
        return {"longest": np.maximum(state["longest"], max(s.tokens for s in samples))}


def test_scopes():
    samples = [sample(tokens=n, group=g) for n, g in ((1, "a"), (9, "b"), (3, "a"), (5, "b"))]
    assert groups_of(samples) == [[0, 2], [1, 3]]
    assert Reward(fn=length).score(samples, None).values.tolist() == [1, 9, 3, 5]
    assert Reward(fn=below_mean).score(samples, None).values.tolist() == [1, -2, -1, 2]
    assert Reward(fn=rank).score(samples, None).values.tolist() == [0, 3, 1, 2]


def test_combinations_and_their_parts():
    samples = row([1, 0, 1], [1, 2, 3])
    node = Sum(parts={"right": Reward(fn=right),
                      "short": Where(reward=Clip(reward=Reward(fn=length), low=2), on=right, otherwise=-1.0),
                      "gate": Product(parts={"a": Reward(fn=right), "b": Reward(fn=constant, kwargs={"value": 3.0})})},
               weights={"short": 0.5})
    scores = node.score(samples, node.init())
    assert scores.parts["short"].tolist() == [2, -1, 3] and scores.parts["gate"].tolist() == [3, 0, 3]
    assert scores.parts["gate/b"].tolist() == [3, 3, 3]
    assert scores.values.tolist() == [5.0, -0.5, 5.5]
    assert scores.means()["reward/right"] == pytest.approx(2 / 3)
    assert spec.from_plain(spec.to_plain(node)) == node  # a recipe can hold it


def test_failures_score_zero_and_are_counted():
    samples = [sample(tokens=n, group=str(n % 2)) for n in (1, 2, 3, 4, 101)]
    node = Sum(parts={"x": Reward(fn=brittle), "g": Reward(fn=below_mean), "n": Reward(fn=too_few),
                      "w": Where(reward=Reward(fn=length), on=brittle, otherwise=-7.0)})
    scores = node.score(samples, {})
    assert scores.parts["x"].tolist() == [1, 0, 0, 0, 101]
    assert scores.parts["g"].tolist() == [0, 1, 0, -1, 0]  # the other prompt's rewards stand
    assert scores.parts["w"].tolist() == [1, 0, 0, 0, 101]
    assert scores.failures == {"x": 3, "g": 3, "n": 5, "w/on": 3}
    assert np.isfinite(scores.values).all()


def test_state_is_found_wherever_it_is():
    node = Sum(parts={"a": Reward(fn=length), "b": Where(reward=Reward(fn=Running()), on=right)})
    state = node.init()
    samples = row([1, 1], [4, 6])
    assert node.score(samples, state).parts["b"].tolist() == [4, 6]
    later = node.update(samples, state)
    assert node.score(samples, later).parts["b"].tolist() == [-2, 0]
    assert state["b"][""]["longest"] == 0  # pure


def test_an_empty_batch():
    node = Sum(parts={"a": Reward(fn=length), "g": Reward(fn=below_mean), "b": Reward(fn=rank)})
    assert node.score([], {}).values.shape == (0,) and node.score([], {}).means() == {}


@pytest.mark.parametrize("build", [
    lambda: Reward(fn=3), lambda: Sum(parts={}), lambda: Sum(parts={"a/b": Reward(fn=length)}),
    lambda: Sum(parts={"a": Reward(fn=length)}, weights={"b": 1.0}), lambda: Product(parts={"a": length}),
    lambda: Clip(reward=Reward(fn=length), low=2, high=1), lambda: Reward(fn=Running(), kwargs={"a": 1})])
def test_what_cannot_be_is_refused(build):
    with pytest.raises(ValueError):
        build()


def test_a_sample_of_a_trace():
    encoded = Encoded(tokenizer="t", ids=np.arange(9), prompt_length=4)
    trace = simple_trace("q", "think", "18", gold="18", verdict=True, encoded=encoded, scores={"h": 2.0})
    s = Sample.of(trace, think_tokens=3)
    assert (s.thinking, s.answer, s.tokens, s.think_tokens, s.correct) == ("think", "18", 5, 3, True)
    assert s.signals["h"] == 2.0 and s.group == trace.group and s.gold == "18" and s.answered
    cut = Sample.of(trace.replace(flags=("unterminated_think", "truncated")))
    assert not cut.correct and not cut.answered and cut.truncated
    assert not Sample.of(trace.replace(verdict=None)).correct
