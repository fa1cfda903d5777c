"""Every recipe of `configs/recipes` loads, survives its YAML, and asks only for what its stages have."""

from pathlib import Path

import pytest

from distill_jax.core import spec
from distill_jax.objective.term import build_objective
from distill_jax.recipe import Recipe, Stage, resolve
from distill_jax.recipe_file import load_recipe
from distill_jax.train.sources import provider_of

RECIPES = sorted(p for p in (Path(__file__).parents[1] / "configs/recipes").glob("*.py") if p.stem != "__init__")


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_recipe_is_whole(path):
    recipe = load_recipe(path)
    assert recipe.name == path.stem
    assert spec.load(recipe.to_yaml()) == recipe, "launched again from its recipe.yaml it is the same"
    for stage in recipe.stages:
        if isinstance(stage, Stage):
            check_stage(recipe, stage)


def check_stage(recipe: Recipe, stage: Stage) -> None:
    objective = build_objective(stage.terms)
    objective.init()
    assert set(objective.signals) <= set(stage.source.signals)
    assert {provider_of(s) for s in objective.sources} <= set(stage.providers)
    for provider in stage.models.values():
        resolve(recipe, provider.model or "")


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_header_says_where_it_comes_from(path):
    text = path.read_text()
    for heading in ("Paper:", "Constants:", "Expected:", "Hardware, time:"):
        assert heading in text.split('"""')[1], f"{path.name}: no {heading!r} in its header"
