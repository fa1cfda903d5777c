"""The recipes of coupled methods and of the bilevel one: they build, survive YAML, and train two updates."""

import json

import numpy as np
import pytest

from distill_jax.core import spec
from distill_jax.data.tokenizer import load_tokenizer
from distill_jax.jobs.hardware import DEVICES
from distill_jax.jobs.plan import plan_stage
from distill_jax.jobs.run_recipe import run_recipe
from distill_jax.recipe import Projector, Stage
from distill_jax.recipe_file import load_recipe
from distill_jax.train.checkpoint import latest_params
from tests.data.conftest import tiny_folder
from tests.data.storing import make_store, some_traces
from tests.jobs.teachers import teacher_folder

NAMES = ("dskd", "dskd_cma", "sinkd", "cot2align", "tgeo_kd")
CROSS = ("dskd_cma", "cot2align")
"""Recipes whose teacher reads other tokens than the student."""


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """(student folder, teacher folder, the same teacher with another tokenizer, store with a top-k signal)."""
    root = tmp_path_factory.mktemp("world")
    tok, other = (load_tokenizer(tiny_folder(root / f"tokenizer{n}", vocabulary=n)) for n in (400, 300))
    make_store(root / "store", some_traces(24), tok, signal="topk")
    return (teacher_folder(root / "student", tok), teacher_folder(root / "teacher", tok, seed=1),
            teacher_folder(root / "foreign", other, seed=1, context=256), root / "store")


def tiny(name, world, runs, *extra):
    student, teacher, foreign, store = world
    sets = [f"student={student}", f"source.path={store}", f"runs={runs}", "source.rows=8", "source.seq_len=96",
            "source.holdout=0.25", "steps=2", "micro_batches=1", "heldout=8", "log_every=1", *extra]
    if name == "tgeo_kd":
        sets += ["source.signals=[topk]", *(f"terms.{t}.{field}" for t in ("fused", "ratio") for field in (
            "target=signals/topk", "kwargs.fusion.every=1", "kwargs.fusion.width=4"))]
    elif name == "sinkd":
        sets += ["source.signals=[topk]", "terms.kl.target=signals/topk", "terms.sinkhorn.target=signals/topk"]
    else:
        sets.append(f"teacher={foreign if name in CROSS else teacher}")
    return load_recipe(f"configs/recipes/{name}.py", sets)


@pytest.mark.parametrize("name", NAMES)
def test_recipe_builds_and_survives_yaml(name):
    recipe = load_recipe(f"configs/recipes/{name}.py")
    assert spec.load(recipe.to_yaml()) == recipe


@pytest.mark.parametrize("name", NAMES)
def test_two_updates_through_the_recipe(name, world, tmp_path):
    recipe = tiny(name, world, tmp_path)
    stage = recipe.stages[0]
    assert isinstance(stage, Stage) and run_recipe(recipe, lambda line: None)
    lines = [json.loads(x) for x in (recipe.folder / "metrics" / "train.jsonl").read_text().splitlines()]
    for term in stage.terms:
        values = [line[term] for line in lines if term in line]
        assert values and np.all(np.isfinite(values)), term
    done = json.loads((recipe.folder / "done.json").read_text())["result"]
    assert set(stage.terms) | {"cross_entropy"} <= set(done["heldout"]) | {"t2s_kl"}  # the gold filter may be empty
    for provider in stage.projectors:
        params = latest_params(recipe.folder / "checkpoints", provider)
        assert all(np.isfinite(x).all() for x in map(np.asarray, _leaves(params)))
    (plan,) = [plan_stage(recipe, stage, DEVICES["h200"], 1)]
    assert set(stage.projectors) <= set(plan.params)


def test_three_stages_of_mentor_kd(world, tmp_path):
    """Mentor, its rationales, student: with everything kept, for a mentor of two updates is never right."""
    student, _, _, store = world
    every = [f"{source}.{field}" for source in ("source", "source.sources.*")
             for field in ("verdict=any", "seq_len=96")]
    recipe = load_recipe("configs/recipes/mentor_kd.py", [
        f"student={student}", f"runs={tmp_path}", f"source.path={store}", f"source.sources.0.path={store}",
        f"questions={store}", "keep=all", "n=2", "sampling.max_new_tokens=8", "steps=2", "log_every=1", *every,
        "source.sources.*.over_long=cut"])
    assert run_recipe(recipe, lambda line: None)
    lines = (recipe.folder / "student" / "metrics" / "student.jsonl").read_text().splitlines()
    losses = [json.loads(x) for x in lines]
    assert len(losses) == 2 and all(np.isfinite(x["kl"]) and x["kl"] >= 0 for x in losses)
    made = json.loads((recipe.folder / "rationales" / "done.json").read_text())["result"]
    assert made["kept"] > 0


def _leaves(tree):
    return [x for v in tree.values() for x in _leaves(v)] if isinstance(tree, dict) else [tree]


def test_projector_between_models_that_are_not_there():
    with pytest.raises(ValueError, match=r"provider 't2s' of stage 'train' stands on .*no model \['nobody'\]"):
        stage = load_recipe("configs/recipes/dskd.py").stages[0]
        assert isinstance(stage, Stage)
        Stage(source=stage.source, terms=stage.terms,
              providers={**stage.models, "t2s": Projector(reads="nobody", like="student")})
