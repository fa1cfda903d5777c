"""A run whose student multiplies in 8 bits: a kill, what is on disk, loading, exporting; adapters on such a student."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distill_jax.core import tree
from distill_jax.data.source_specs import Store
from distill_jax.data.tokenizer import load_tokenizer
from distill_jax.jobs.export import export
from distill_jax.jobs.run_recipe import run_recipe
from distill_jax.loading import load
from distill_jax.losses.rows.cross_entropy import cross_entropy
from distill_jax.models import hf
from distill_jax.models.lora import Lora
from distill_jax.objective.term import Term
from distill_jax.recipe import MeshShape, Recipe, Saving, Stage, Student
from distill_jax.recipe_file import load_recipe
from distill_jax.train.checkpoint import latest_params
from distill_jax.train.optim import AdamW
from tests.data.conftest import tiny_folder
from tests.data.storing import make_store, some_traces
from tests.jobs.teachers import teacher_folder
from tests.models.common import SPARSE


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = tmp_path_factory.mktemp("world")
    tok = load_tokenizer(tiny_folder(root / "tokenizer"))
    make_store(root / "store", some_traces(24), tok)
    teacher_folder(root / "student", tok)
    return root


def recipe(world, runs, **student) -> Recipe:
    where = student if "config" in student else {"model": str(world / "student"), **student}
    return Recipe(name="r", runs=str(runs), mesh=MeshShape(data=1, fsdp=8), stages=(Stage(
        source=Store(path=str(world / "store"), rows=8, seq_len=96), terms={"ce": Term(cross_entropy)}, steps=4,
        providers={"student": Student(**where)}, optim=AdamW(peak_lr=0.02, warmup=1.0), log_every=1,
        saving=Saving(steps=2, keep=4)),))


@pytest.fixture(scope="module")
def ran(world, tmp_path_factory):
    made = recipe(world, tmp_path_factory.mktemp("runs"), precision="bfloat16", matmul="int8_dx")
    assert run_recipe(made, lambda line: None)
    return made


def losses(folder):
    return [json.loads(line)["loss"] for line in (folder / "metrics/train.jsonl").read_text().splitlines()]


def test_killed_after_two_updates_ends_with_the_same_bits(ran):
    """The recipe on disk says how it multiplied: started again from there alone."""
    folder = ran.folder
    want, said = latest_params(folder / "checkpoints", "student"), losses(folder)
    shutil.rmtree(folder / "checkpoints" / "4")
    (folder / "done.json").unlink()
    again = load_recipe(str(folder / "recipe.yaml"))
    assert next(iter(again.stages[0].providers.values())).matmul == "int8_dx"
    assert run_recipe(again, lambda line: None)
    jax.tree.map(np.testing.assert_array_equal, latest_params(folder / "checkpoints", "student"), want)
    assert losses(folder) == said and len(said) == 4


def test_it_is_another_run_than_in_bfloat16(world, ran, tmp_path):
    full = recipe(world, tmp_path, precision="bfloat16")
    assert run_recipe(full, lambda line: None)
    gaps = np.abs(np.array(losses(full.folder)) - losses(ran.folder)) / losses(full.folder)
    assert 0 < gaps[0] < 0.05 and gaps.max() < 0.1, gaps


def test_loads_and_exports_like_any_other(ran, tmp_path):
    """Parameters are the float32 masters; `load` computes in full unless asked otherwise."""
    model, params = load(ran.folder)
    assert model.matmul == "full" and load(ran.folder, matmul="int8")[0].matmul == "int8"
    assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    export(str(ran.folder), tmp_path / "out", echo=lambda line: None)
    _, back = hf.load(tmp_path / "out", param_dtype=jnp.float32)
    jax.tree.map(np.testing.assert_array_equal, back, params)


def test_adapters(world, tmp_path):
    """The frozen matrices are multiplied in 8 bits, and only the adapters move."""
    made = recipe(world, tmp_path, precision="bfloat16", matmul="int8", lora=Lora(rank=4, alpha=8.0))
    assert run_recipe(made, lambda line: None)
    adapters = latest_params(made.folder / "checkpoints")
    assert {path.split("/")[-1] for path, _ in tree.paths(adapters)} == {"lora_a", "lora_b"}
    assert np.abs(adapters["layers"]["mlp"]["down"]["lora_b"]).max() > 1e-3
    said = losses(made.folder)
    assert np.isfinite(said).all() and said[-1] < said[0]


def test_a_mixture_is_refused_before_anything_is_written(world, tmp_path):
    tokenizer = str(world / "tokenizer")
    made = recipe(world, tmp_path, config=SPARSE.__class__(**{**SPARSE.__dict__, "vocab_size": 448}),
                  tokenizer=tokenizer, matmul="fp8")
    with pytest.raises(ValueError, match="matmul='fp8' is for dense models, this one has 8 experts a layer"):
        run_recipe(made, lambda line: None)
    assert not (made.folder / "checkpoints").exists() and not (made.folder / "model").exists()
