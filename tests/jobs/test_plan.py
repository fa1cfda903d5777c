"""`plan`: hand numbers for what is exact, and one line where something does not fit."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from configs.models.qwen3_30b_a3b import CONFIG as CONFIG_30B
from distill_jax.cli.main import build_app
from distill_jax.core.roles import ANSWER
from distill_jax.data.source_specs import Store
from distill_jax.jobs.hardware import DEVICES, parse
from distill_jax.jobs.plan import fits, plan_recipe
from distill_jax.losses.rows.divergences import forward_kl
from distill_jax.models.config import AttentionConfig, ModelConfig
from distill_jax.objective.term import Term
from distill_jax.recipe import MeshShape, Recipe, Stage, Student
from distill_jax.recipe_file import load_recipe
from distill_jax.train.optim import AdamW

RECIPES = Path(__file__).parents[2] / "configs/recipes"

CONFIG = ModelConfig(vocab_size=100, hidden_size=8, mlp_size=16, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=4,
                     context_length=64, model_type="qwen2", tied=True, attention=AttentionConfig(qkv_bias=True))
LAYER = 8 * (8 + 4 + 4 + 8) + 3 * 8 * 16 + 2 * 8 + (8 + 4 + 4)
PARAMS = 2 * LAYER + 8 + 100 * 8


def recipe(path="nowhere", mesh=None, precision="float32", seq_len=32, micro_batches=1) -> Recipe:
    return Recipe(name="r", mesh=mesh or MeshShape(), stages=(Stage(
        name="kd", source=Store(path=str(path), signals=("topk8",), rows=4, seq_len=seq_len),
        providers={"student": Student(config=CONFIG, precision=precision)},
        terms={"kl": Term(loss=forward_kl, target="signals/topk8", on=(ANSWER,))}, optim=AdamW(peak_lr=1e-3), steps=10,
        micro_batches=micro_batches),))


def test_exact_numbers(tmp_path):
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "x").write_bytes(b"0" * 123)
    (p,) = plan_recipe(recipe(tmp_path / "store"), DEVICES["h200"], 1)
    assert p.params == {"student": PARAMS} and p.store_bytes == 123 and p.context == (32, 64)
    assert (p.memory["parameters"], p.memory["optimiser"], p.memory["gradients"]) == (
        4 * PARAMS, 8 * PARAMS, 4 * PARAMS)
    assert p.tokens_per_step == 128 and p.flops == 3 * 128 * CONFIG.flops_per_token(32)
    assert p.seconds == pytest.approx(10 * p.flops / (989e12 * 0.45)) and fits(p, DEVICES["h200"])
    (halved,) = plan_recipe(recipe(mesh=MeshShape(data=1, fsdp=2), micro_batches=2), DEVICES["h200"], 2)
    assert halved.memory["optimiser"] == 4 * PARAMS and halved.store_bytes is None
    assert halved.memory["activations"] == p.memory["activations"] / 4


@pytest.mark.parametrize("kwargs,devices,says", [
    ({"mesh": MeshShape(data=1, fsdp=3)}, 2, "has 3 devices, --on has 2"),
    ({"seq_len": 65}, 1, "rows of 65 tokens exceed the model's context of 64"),
])
def test_what_does_not_fit(kwargs, devices, says):
    with pytest.raises(ValueError, match=says):
        plan_recipe(recipe(**kwargs), DEVICES["h200"], devices)


def test_devices():
    assert parse("h200:8")[2] == 8 and parse("cpu")[2] == 1
    for wrong in ("h999", "h200:x", "h200:0"):
        with pytest.raises(ValueError, match="--on"):
            parse(wrong)


def test_command(tmp_path, monkeypatch):
    (tmp_path / "r.yaml").write_text(recipe().to_yaml())
    run = lambda *args: CliRunner().invoke(build_app(), ["plan", str(tmp_path / "r.yaml"), *args])
    done = run("--on", "rtx4090", "--json")
    assert done.exit_code == 0 and json.loads(done.output)[0]["params"] == {"student": PARAMS}
    assert "fits" in run("--on", "h200:1").output
    monkeypatch.setitem(DEVICES, "cpu", DEVICES["cpu"].__class__(flops=1e9, memory=1e3))
    failed = run()
    assert failed.exit_code != 0 and "does not fit cpu" in str(failed.exception)


def test_a_mixture_on_the_expert_axis():
    """Qwen3-30B-A3B: FLOPs of the active parameters, experts divided by the axis, the rest by fsdp alone."""
    stage = load_recipe(RECIPES / "kd_moe.py").stages[0]
    sparse = replace(stage, providers={"student": replace(stage.providers["student"], model=None, config=CONFIG_30B)})
    plans = [plan_recipe(Recipe(name="r", mesh=m, stages=(sparse,)), DEVICES["h200"], 64)[0]
             for m in (MeshShape(fsdp=8, expert=8), MeshShape(fsdp=64))]
    both, flat = (p.memory["parameters"] / 4 for p in plans)
    experts = 48 * 128 * 3 * 2048 * 768
    assert both == pytest.approx(experts / 64 + (30_532_122_624 - experts) / 8)
    assert flat == pytest.approx(30_532_122_624 / 64)
    tokens = sparse.source.rows * sparse.source.seq_len
    assert plans[0].flops == 3 * tokens * CONFIG_30B.flops_per_token(4096)
    assert 6 * 3.0e9 * tokens < plans[0].flops < 6 * 4.2e9 * tokens  # 3.35B active, and attention to 4,096 tokens
    assert fits(plans[0], DEVICES["h200"])
