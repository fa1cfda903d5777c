"""Starts of a recipe that fail."""

import pytest

from distill_jax.jobs.context import RunContext
from distill_jax.jobs.run_recipe import run_recipe
from distill_jax.recipe import Call, Recipe


def writes(context: RunContext) -> None:
    (context.folder / "data.txt").write_text("made")


def fails(context: RunContext, ok: str = "") -> None:
    (context.folder / "model").mkdir(exist_ok=True)
    (context.folder / "model" / "config.json").write_text("{}")
    (context.folder / "checkpoints").mkdir(exist_ok=True)
    (context.folder / "metrics").mkdir(exist_ok=True)
    (context.folder / "metrics" / "train.jsonl").touch()
    if not ok:
        raise ValueError("no trace store")


def test_a_run_that_made_nothing_does_not_keep_its_name(tmp_path):
    """A wrong path, then the right one under the same name: the second is not another recipe's run."""
    recipe = lambda **kwargs: Recipe(name="r", runs=str(tmp_path), stages=(Call(name="a", fn=fails, kwargs=kwargs),))
    with pytest.raises(ValueError, match="no trace store"):
        run_recipe(recipe())
    assert run_recipe(recipe(ok="yes"))
    with pytest.raises(ValueError, match="made by another recipe"):
        run_recipe(recipe())
    assert (tmp_path / "r" / "done.json").exists()


def test_what_an_earlier_stage_made_stays(tmp_path):
    recipe = Recipe(name="r", runs=str(tmp_path), stages=(Call(name="a", fn=writes), Call(name="b", fn=fails)))
    for _ in range(2):
        with pytest.raises(ValueError, match="no trace store"):
            run_recipe(recipe)
        assert (tmp_path / "r" / "a" / "data.txt").exists() and (tmp_path / "r" / "recipe.yaml").exists()
