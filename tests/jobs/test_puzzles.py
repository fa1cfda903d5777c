"""Stages of the recipes on Knights and Knaves."""

from collections import Counter

import jax
import pytest

from distill_jax.eval.tasks.puzzles import Puzzles
from distill_jax.jobs.puzzles import make_puzzles, sampled
from distill_jax.jobs.run_recipe import run_recipe
from distill_jax.models import hf
from distill_jax.models.config import AttentionConfig, ModelConfig
from distill_jax.models.transformer import Transformer, init_params
from distill_jax.recipe import Call, Recipe
from distill_jax.traces.store import TraceStore
from distill_jax.traces.world.tokenizer import build_tokenizer

TASK = Puzzles(k=(2,), questions=6, names=8)


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    folder = tmp_path_factory.mktemp("student")
    tokenizer = build_tokenizer(folder / "tokenizer", "compact")
    model = Transformer(ModelConfig(vocab_size=176, hidden_size=16, mlp_size=16, num_layers=1, num_heads=1,
                                    num_kv_heads=1, head_dim=16, context_length=64,
                                    attention=AttentionConfig(qkv_bias=True)))
    hf.save(folder / "model", model, init_params(model, jax.random.key(0)), tuple(tokenizer.glob("tokenizer*")))
    return str(folder / "model")


def test_sampled_asks_every_question_as_often_as_said(student):
    records = sampled(student, TASK, draws=3, max_new_tokens=8)
    assert Counter(r.id for r in records.rows) == {i.id: 3 for i in TASK.items()}
    answers = [r.answer for r in records.rows]
    assert answers[:6] != answers[6:12] != answers[12:]
    assert answers == [r.answer for r in sampled(student, TASK, draws=3, max_new_tokens=8).rows]


def test_stores_have_the_people_and_the_style_they_were_asked_for(tmp_path):
    stores = {"questions": (3, "varied", 5), "lesson": (2, "careful", 7), "old": (2, "extended", 6)}
    stage = Call(name="puzzles", fn=make_puzzles, kwargs={"stores": stores})
    assert run_recipe(Recipe(name="r", runs=str(tmp_path), stages=(stage,)), lambda line: None)
    for name, (people, style, n) in stores.items():
        made = list(TraceStore.open(str(tmp_path / "r" / name)).traces())
        assert len(made) == n
        assert all(t.question.count(" says ") == people and t.meta["style"] == style and t.verdict for t in made)
