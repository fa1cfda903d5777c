"""A run belongs to its recipe from the moment it has made something."""

import pytest
import yaml

from distill_jax.recipe import Call, Recipe, write_or_compare


def nothing(context):
    return None


def recipe(root, seed=0) -> Recipe:
    return Recipe(name="r", runs=str(root), seed=seed, stages=(Call(name="a", fn=nothing),))


def test_another_recipe_is_refused_once_something_was_made(tmp_path):
    path = tmp_path / "r" / "recipe.yaml"
    write_or_compare(recipe(tmp_path))
    (tmp_path / "r" / "time.json").write_text("{}")
    write_or_compare(recipe(tmp_path, seed=1))
    assert yaml.safe_load(path.read_text())["seed"] == 1, "a start that failed at once leaves nothing to protect"
    (tmp_path / "r" / "checkpoints" / "3").mkdir(parents=True)
    (tmp_path / "r" / "checkpoints" / "3" / "x").write_text("")
    with pytest.raises(ValueError, match=r"another recipe:\n.*seed.*\nresume"):
        write_or_compare(recipe(tmp_path, seed=2))
    assert yaml.safe_load(path.read_text())["seed"] == 1
    write_or_compare(recipe(tmp_path, seed=1))
