"""The reward of each method as a recipe writes it: a value that YAML can hold, and what it says of one group."""

import pytest

from distill_jax.core import spec
from distill_jax.rewards.algebra import Product, Reward, Sum, Where
from distill_jax.rewards.outcome import boxed_letter, outcome, right, well_formed, wrong
from distill_jax.rewards.repetition import ngram_penalty
from distill_jax.rewards.shaping import concise, cosine, min_max_length, soft_overlong, top_groups
from distill_jax.rewards.shaping_laser import LaserD, laser
from distill_jax.rewards.shaping_modes import adapt_think, early_exit, phase_entropy
from tests.rewards.samples import sample

METHODS = {
    "grpo": Reward(fn=outcome),
    "tfpi": Reward(fn=right),
    "dapo": Sum(parts={"right": Reward(fn=outcome, kwargs={"wrong": -1.0}),
                       "overlong": Reward(fn=soft_overlong, kwargs={"limit": 1000, "cache": 200})}),
    "laser": Reward(fn=laser, kwargs={"target": 500}),
    "laser_d": Reward(fn=LaserD(start=500.0)),
    "laser_de": Reward(fn=LaserD(start=500.0, explore=0.5)),
    "conciser": Reward(fn=concise, kwargs={"limit": 1000}),
    "grpo_lambda": Reward(fn=top_groups),
    "s_grpo": Reward(fn=early_exit),
    "pear": Reward(fn=phase_entropy),
    "adapt_think": Reward(fn=adapt_think),
    "alphamed": Reward(fn=boxed_letter),
    "demystify": Sum(parts={"cosine": Reward(fn=cosine, kwargs={"limit": 1000}),
                            "repetition": Where(reward=Reward(fn=ngram_penalty, kwargs={"n": 2}), on=wrong)}),
    "kimi": Sum(parts={"right": Reward(fn=outcome), "length": Reward(fn=min_max_length)}, weights={"length": 0.4}),
    "format_gate": Product(parts={"form": Reward(fn=well_formed), "right": Reward(fn=outcome)}),
}
# A right answer of 400 tokens that did not think, a wrong one of 900 that did.
EXPECTED = {
    "grpo": [1, 0], "tfpi": [1, 0], "dapo": [1, -1.5], "laser": [1.5, -0.5], "laser_d": [1.5, -0.5],
    "laser_de": [1.5, 0.0], "conciser": [1, 0], "grpo_lambda": [0.9, 0], "s_grpo": [1, 0], "pear": [0.7, 0],
    "adapt_think": [0.55, -0.5], "alphamed": [1, 0], "demystify": [1.6545, -0.2447], "kimi": [1.2, -0.2],
    "format_gate": [0, 0],
}


@pytest.mark.parametrize("name", METHODS)
def test_method(name):
    reward = METHODS[name]
    assert spec.from_plain(spec.to_plain(reward)) == reward
    signals = {"think_entropy": 0.5, "answer_entropy": 0.2, "reference_pass_rate": 0.5}
    group = [sample(correct=True, tokens=400, answer="\\boxed{A}", gold="A", text="\\boxed{A}", exit=0,
                    signals=signals),
             sample(correct=False, tokens=900, answer="\\boxed{B}", gold="A", thinking="one two three four five",
                    text="<think>one two three four five</think>\\boxed{B}", exit=1, signals=signals)]
    scores = reward.score(group, reward.init())
    assert not scores.failures
    assert scores.values.tolist() == pytest.approx(EXPECTED[name], abs=1e-4)
