"""Where `plan` finds the shape of a model."""

import json

import pytest

from distill_jax.jobs import plan
from distill_jax.models import families
from distill_jax.recipe import Recipe, Stage, Student
from distill_jax.recipe_file import load_recipe
from tests.jobs.teachers import tiny_model


def student(model: str) -> tuple[Recipe, Student]:
    recipe = load_recipe("configs/recipes/sft.py", [f"student={model}"])
    stage = recipe.stages[0]
    assert isinstance(stage, Stage)
    return recipe, stage.providers["student"]


def test_a_hub_id_needs_its_configuration_only(tmp_path, monkeypatch):
    config = tiny_model(real=400)[0].config
    (tmp_path / "config.json").write_text(json.dumps(families.to_hf(config)))
    asked = []

    def download(name, allow_patterns):
        asked.append((name, allow_patterns))
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    found = plan.model_config(*student("Qwen/Qwen2.5-0.5B"))
    assert found.hidden_size == config.hidden_size and asked == [("Qwen/Qwen2.5-0.5B", ["config.json"])]


@pytest.mark.parametrize("model", ["runs/a/b", "/nowhere/x", "./x"])
def test_a_folder_that_is_not_there_is_not_asked_for(model):
    with pytest.raises(ValueError, match=r"cannot plan with model .* no config.json in"):
        plan.model_config(*student(model))
