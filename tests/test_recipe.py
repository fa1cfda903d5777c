"""Recipes and `--set` values that cannot be read; a run belongs to its recipe once it has made something."""

from pathlib import Path

import pytest
import yaml

from distill_jax.jobs.run_recipe import write_or_compare
from distill_jax.recipe import Call, Recipe
from distill_jax.recipe_file import load_recipe

SFT = str(Path(__file__).parents[1] / "configs/recipes/sft.py")


@pytest.mark.parametrize("name,text,says", [
    ("a.py", "def recipe(: pass", r"a\.py: SyntaxError: invalid syntax \(a\.py, line 1\)"),
    ("a.py", "x = 1\n\n\ndef recipe():\n    return y", r"a\.py, line 5: NameError: name 'y' is not defined"),
    ("a.py", "import nosuchmodule", r"a\.py, line 1: ModuleNotFoundError"),
    ("a.py", "x = 1", r"a\.py: there is no function recipe\(\)"),
    ("a.py", "def recipe():\n    return 3", "expected a Recipe, got int"),
    ("a.yaml", "a: [", r"a\.yaml: not YAML: .*line 1"),
    ("a.yaml", "a: 3", "expected a Recipe, got dict"),
    ("a.jsonl", "{}", r"a\.jsonl is no recipe: expected a \.py file"),
])
def test_files_that_are_no_recipe(tmp_path, name, text, says):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=says) as e:
        load_recipe(tmp_path / name)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("item,says", [
    ("steps=[", r"--set steps=\[: not YAML"), ("steps", "expected path=value"), ("steps=many", "expected int"),
    ("name=", "name '': expected the name of a folder"), ("name=../x", r"name '\.\./x': expected"),
    ("source.signals=topk8", r"got 'topk8' \(str\), expected a list, e\.g\. \[topk8\]"),
    ("optim.peak_lrr=1", r"no such field; did you mean optim\.peak_lr"),
])
def test_overrides_that_do_not_fit(item, says):
    with pytest.raises(ValueError, match=says) as e:
        load_recipe(SFT, [item])
    assert "\n" not in str(e.value)


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
    (tmp_path / "r" / "checkpoints" / "3" / "x").write_text("x")
    with pytest.raises(ValueError, match=r"another recipe:\n.*seed.*\nresume"):
        write_or_compare(recipe(tmp_path, seed=2))
    assert yaml.safe_load(path.read_text())["seed"] == 1
    write_or_compare(recipe(tmp_path, seed=1))
