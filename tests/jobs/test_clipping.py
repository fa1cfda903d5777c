"""Which tokens count as clipped, for any loss that clips, and how they are shown."""

import dataclasses

import numpy as np
import pytest

from distill_jax.cli.main import main
from distill_jax.core.roles import ANSWER, QUESTION, THINK
from distill_jax.core.schedules import Linear
from distill_jax.data.source_specs import Store
from distill_jax.jobs.clipping import _dropped, clipped, policy_term
from distill_jax.jobs.show_rollouts import _marked
from distill_jax.losses.rows.cross_entropy import cross_entropy
from distill_jax.losses.tokens.policy import cispo, gspo, ppo_clip
from distill_jax.models.config import ModelConfig
from distill_jax.objective.term import Term
from distill_jax.objective.tokens import TokenTerm, policy_metrics
from distill_jax.recipe import Call, Recipe, Stage, Student
from distill_jax.rollout.reinforce import Reinforce
from distill_jax.traces.store import Row
from distill_jax.traces.trace import simple_trace
from distill_jax.train.checkpoint import COMMITTED

RATIOS, ADVANTAGES = [1.0, 1.3, 1.3, 0.7, 0.7, 1.3, 4.0], [1.0, 1.0, -1.0, 1.0, -1.0, 0.0, -1.0]


@pytest.mark.parametrize("loss,kwargs,want", [
    (ppo_clip, {}, [0, 1, 0, 0, 1, 0, 0]),  # DAPO's card: above with A > 0, below with A < 0
    (ppo_clip, {"high": 0.4}, [0, 0, 0, 0, 1, 0, 0]), (ppo_clip, {"dual": 3.0}, [0, 1, 0, 0, 1, 0, 1]),
    (cispo, {}, [0] * 7)])
def test_a_token_is_clipped_where_its_gradient_is_gone(loss, kwargs, want):
    old = np.full(7, -2.0, np.float32)
    fields = {"advantages": [np.array(ADVANTAGES)], "behaviour_logprobs": [old]}
    now = [old + np.log(np.array(RATIOS, np.float32))]
    (got,) = _dropped(TokenTerm(loss), kwargs, now, [np.ones(7, bool)], fields)
    np.testing.assert_array_equal(got, np.array(want, bool))
    (fewer,) = _dropped(TokenTerm(loss), kwargs, now, [np.arange(7) < 3], fields)
    np.testing.assert_array_equal(fewer, np.array(want, bool) & (np.arange(7) < 3))


def test_a_sequence_ratio_clips_whole_answers_each_alone():
    """Log ratios [.3, .3] and [.3, -.3]: geometric means e^.3 and 1."""
    old = [np.zeros(2, np.float32), np.zeros(3, np.float32)]
    now = [np.float32([0.3, 0.3]), np.float32([0.0, 0.3, -0.3])]
    mask = [np.ones(2, bool), np.array([False, True, True])]
    got = _dropped(TokenTerm(gspo), {}, now, mask, {"advantages": [np.ones(2), np.ones(3)], "behaviour_logprobs": old})
    assert [g.tolist() for g in got] == [[True, True], [False, False, False]]


def test_marks_stand_around_the_tokens_of_their_segment():
    """Bytes: "né" is a token of three, and one token runs over the end of the text."""
    text = "a né end"
    row = Row(trace=simple_trace("q", "t", "a"), text="", tokens=np.arange(5, dtype=np.int32),
              roles=np.array([QUESTION, THINK, THINK, THINK, ANSWER], np.uint8), steps=np.zeros(5, np.int32),
              parts=np.array([0, 1, 1, 1, 2], np.int16),
              spans=np.array([[0, 9], [0, 2], [2, 5], [5, 12], [0, 4]], np.int32))
    mark = lambda *at: _marked(text, "", 1, row, np.isin(np.arange(5), at)).plain
    assert mark() == text and mark(0, 4) == text
    assert mark(2) == "a \u27e6né\u27e7 end" and mark(1, 2) == "\u27e6a né\u27e7 end"
    assert mark(3) == "a né\u27e6 end\u27e7"


def test_the_rule_is_the_recipes(tmp_path):
    clip = TokenTerm(ppo_clip, kwargs={"low": 0.1, "high": 0.3})
    config = ModelConfig(vocab_size=8, hidden_size=8, mlp_size=8, num_layers=1, num_heads=1, num_kv_heads=1, head_dim=8)
    provider = {"student": Student(config=config, tokenizer="t")}
    stage = lambda name, terms, **kw: Stage(name=name, source=Store(path="s"), providers=provider, terms=terms, **kw)
    both = Recipe(name="r", stages=(
        Call(name="data", fn=simple_trace), stage("sft", {"ce": Term(cross_entropy)}),
        stage("rl", {**policy_metrics(), "policy": clip}, on_policy=Reinforce())))
    (tmp_path / "recipe.yaml").write_text(both.to_yaml())
    assert policy_term(tmp_path / "rl") == clip and policy_term(tmp_path / "sft") is None
    assert policy_term(tmp_path / "a" / "b") is None
    with pytest.raises(ValueError, match="has no complete checkpoint yet"):
        clipped(tmp_path / "rl", 0, None, [])
    moving = TokenTerm(ppo_clip, kwargs={"high": Linear(start=0.2, stop=0.3)})
    (tmp_path / "recipe.yaml").write_text(dataclasses.replace(both, stages=(
        stage("rl", {"policy": moving}, on_policy=Reinforce()),)).to_yaml())
    (tmp_path / "checkpoints" / "5").mkdir(parents=True)
    (tmp_path / "checkpoints" / "5" / COMMITTED).touch()
    with pytest.raises(ValueError, match=r"\['high'\] of the policy term .* change from update to update"):
        clipped(tmp_path, 0, None, [])


def test_bounds_are_for_clip_alone(capsys):
    with pytest.raises(SystemExit):
        main(["rollouts", "inspect", "nowhere", "--low", "0.1"])
    assert "--low and --high are bounds for --clip" in capsys.readouterr().err
