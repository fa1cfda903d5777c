"""Recipes that are only row losses: their terms trace on the signals they name, so none meets a signal it refuses."""

from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from distill_jax.core.batch import Batch, Sampled, Stream, TopK
from distill_jax.core.head import Head
from distill_jax.objective.term import build_objective
from distill_jax.recipe import Stage
from distill_jax.recipe_file import load_recipe

B, T, D, V = 2, 8, 4, 600
FOLDER = Path(__file__).parents[2] / "configs/recipes"
ROW_RECIPES = ("sft", "kd", "taid", "pld", "rs_kd", "minillm_reverse_kl", "skew_kl", "abkd", "akl",
               "truncated_topk", "distillm2")


def batch(signals):
    ints = jnp.ones((B, T), jnp.int32)
    stream = Stream(tokens=ints, positions=ints, segment_ids=ints, roles=ints * 4, step_ids=ints,
                    weights=jnp.ones((B, T)), row_ids=ints)
    make = {}
    for name in signals:
        k = int("".join(c for c in name if c.isdigit()))
        ids, numbers, mask = jnp.ones((B, T, k), jnp.int32), jnp.ones((B, T, k)), jnp.ones((B, T), bool)
        make[name] = (Sampled(ids=ids, weights=numbers, mask=mask) if name.startswith("sampled")
                      else TopK(ids=ids, logprobs=numbers, mask=mask))
    return Batch(views={"main": stream}, signals=make)


@pytest.mark.parametrize("name", ROW_RECIPES)
def test_terms_trace_on_their_signals(name):
    [stage] = load_recipe(FOLDER / f"{name}.py").stages
    assert isinstance(stage, Stage)
    objective = build_objective(stage.terms, stage.steps)
    assert objective.sources == ("student/main",) and set(objective.signals) == set(stage.source.signals)

    def loss(hidden, kernel, rows):
        state, step = objective.init(), jnp.int32(0)
        weights = objective.weights(rows, step, state)
        total, metrics = objective.loss({"student/main": (hidden, Head(kernel=kernel))}, rows, weights,
                                        objective.dynamic(step, state))
        objective.update(state, metrics, step)
        return total

    grads = jax.eval_shape(jax.grad(loss, argnums=(0, 1)), jnp.zeros((B, T, D)), jnp.zeros((V, D)),
                           batch(objective.signals))
    assert [g.shape for g in grads] == [(B, T, D), (V, D)]


def test_contrastive_terms_are_taken_on_their_own_rows():
    """DistiLLM-2: a row carries the signal of its store alone, and that decides which term sees it."""
    [stage] = load_recipe(FOLDER / "distillm2.py").stages
    assert isinstance(stage, Stage)
    objective = build_objective(stage.terms, stage.steps)
    rows = batch(objective.signals)
    first = jnp.arange(B)[:, None] == jnp.zeros((1, T), jnp.int32)
    rows.signals["teacher64"] = replace(rows.signals["teacher64"], mask=first)
    rows.signals["student64"] = replace(rows.signals["student64"], mask=~first)
    weights = objective.weights(rows, jnp.int32(0)).weights
    assert weights["skl"].sum(1).tolist() == [0.5, 0.0] and weights["srkl"].sum(1).tolist() == [0.0, 0.5]
