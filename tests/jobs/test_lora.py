"""A run that trains adapters: what is on disk, resuming, loading, exporting; with a frozen teacher and rollouts."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distill_jax.core import tree
from distill_jax.data.tokenizer import load_tokenizer
from distill_jax.jobs.export import export
from distill_jax.jobs.run_recipe import run_recipe
from distill_jax.loading import load
from distill_jax.models import hf
from distill_jax.models.lora import Lora
from distill_jax.recipe import Student
from distill_jax.recipe_file import load_recipe
from distill_jax.train.checkpoint import latest_params
from tests.data.conftest import tiny_folder
from tests.data.storing import make_store, some_traces
from tests.jobs.teachers import teacher_folder


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """(run folder, student folder) of three updates on the student's own answers, against a frozen teacher."""
    root = tmp_path_factory.mktemp("world")
    tok = load_tokenizer(tiny_folder(root / "tokenizer"))
    make_store(root / "store", some_traces(24), tok)
    student, teacher = teacher_folder(root / "student", tok), teacher_folder(root / "teacher", tok, seed=1)
    recipe = load_recipe("configs/recipes/on_policy_rkl.py", [
        f"student={student}", f"teacher={teacher}", "teacher.precision=float32", f"source.path={root / 'store'}",
        f"runs={root / 'runs'}", "source.rows=8", "source.seq_len=96", "source.holdout=0.25", "micro_batches=1",
        "heldout=8", "log_every=1", "steps=3", "on_policy.every=2", "on_policy.prompts=8",
        "on_policy.sampling.max_new_tokens=16", "optim.peak_lr=0.02", "optim.warmup=1",
        "student.lora={rank: 4, alpha: 8}"])
    assert run_recipe(recipe, lambda line: None)
    return recipe.folder, student


def test_the_checkpoint_is_the_adapters(ran):
    folder, student = ran
    adapters = latest_params(folder / "checkpoints")
    assert {path.split("/")[-1] for path, _ in tree.paths(adapters)} == {"lora_a", "lora_b"}
    about = json.loads((folder / "model" / "adapter.json").read_text())
    assert (about["base"], about["rank"], about["step"]) == (str(student), 4, None)


def test_loads_merged_and_exports(ran, tmp_path):
    """`load` gives W + (alpha / r) A B, here by NumPy; `export` writes the same; the dtype stays the base's."""
    folder, student = ran
    _, base = load(student)
    model, params = load(folder)
    a, b = (np.asarray(latest_params(folder / "checkpoints")["layers"]["attention"]["q"][n]) for n in ("lora_a",
                                                                                                     "lora_b"))
    want = np.asarray(base["layers"]["attention"]["q"]["kernel"]) + 2.0 * np.einsum("lir,lro->lio", a, b)
    np.testing.assert_allclose(params["layers"]["attention"]["q"]["kernel"], want, atol=1e-6)
    assert np.abs(b).max() > 1e-3, "three updates moved them"
    np.testing.assert_array_equal(params["embed"]["embedding"], base["embed"]["embedding"])
    export(str(folder), tmp_path / "out", echo=lambda line: None)
    _, back = hf.load(tmp_path / "out", param_dtype=jnp.float32)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), back, params)
    assert model.config.num_layers == len(a)


def test_a_lost_base_is_named(ran):
    folder, _ = ran
    about = folder / "model" / "adapter.json"
    kept = about.read_text()
    try:
        about.write_text(json.dumps({**json.loads(kept), "base": "/nowhere/model"}))
        with pytest.raises(ValueError, match=r"holds adapters of '/nowhere/model', which cannot be read"):
            load(folder)
    finally:
        about.write_text(kept)


def test_refused():
    with pytest.raises(ValueError, match="give model=, and no trainable=False"):
        Student(model="x", trainable=False, lora=Lora())
