"""`plan` of what makes a model fit a small card: adapters and small optimiser states."""

import json

import pytest

from distill_jax.jobs.hardware import DEVICES
from distill_jax.jobs.plan import fits, plan_recipe
from distill_jax.models.families import to_hf
from distill_jax.recipe_file import load_recipe
from tests.jobs.test_plan import CONFIG, PARAMS

QWEN = {"model_type": "qwen2", "vocab_size": 151936, "hidden_size": 1536, "intermediate_size": 8960,
        "num_hidden_layers": 28, "num_attention_heads": 12, "num_key_value_heads": 2, "max_position_embeddings": 32768,
        "rope_theta": 1e6, "rms_norm_eps": 1e-6, "tie_word_embeddings": True, "hidden_act": "silu"}
WHOLE = ("student.lora=null", "micro_batches=16", "student.remat=full")


def planned(tmp_path, config, *sets):
    (tmp_path / "config.json").write_text(json.dumps(config))
    recipe = load_recipe("configs/recipes/kd_24gb.py", [f"student={tmp_path}", *sets])
    return plan_recipe(recipe, DEVICES["rtx4090"], 1)[0]


@pytest.mark.parametrize(("sets", "fit"), [
    ((), True), ((*WHOLE, "optim.state=int8", "source.rows=1", "micro_batches=1"), True),
    ((*WHOLE, "optim={type: 'distill_jax.train.optim:Adafactor'}"), True), (WHOLE, False)])
def test_a_student_of_1_5b_in_24_gb(tmp_path, sets, fit):
    p = planned(tmp_path, QWEN, *sets)
    assert 1.5e9 < p.params["student"] < 1.6e9 and fits(p, DEVICES["rtx4090"]) == fit, p.memory


def test_adapters_by_hand(tmp_path):
    """Rank 2 on q and down: (8 + 8) + (16 + 8) times 2 and two layers; the base is frozen in bf16, two passes."""
    p = planned(tmp_path, to_hf(CONFIG), "student.lora={rank: 2, targets: [q, down]}", "source.seq_len=64")
    adapters = 2 * 2 * (16 + 24)
    assert p.memory["parameters"] == 2 * PARAMS + 4 * adapters
    assert p.memory["optimiser"] == 8 * adapters
    assert p.memory["gradients"] == 8 * adapters  # of a micro-batch, and their sum
    assert p.flops == 2 * 16 * 64 * CONFIG.flops_per_token(64)
