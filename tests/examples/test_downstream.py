"""examples/downstream.py: a run of ours, restored and run elsewhere without us."""

import ast
import importlib.util
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest

from distill_jax.models.config import AttentionConfig
from distill_jax.models.families import to_hf
from distill_jax.models.rope import Linear, Rope
from tests.models.common import PLAIN, make, tokens
from tests.test_loading import write_run

FILE = Path(__file__).resolve().parents[2] / "examples" / "downstream.py"


@pytest.fixture(scope="module")
def downstream():
    spec = importlib.util.spec_from_file_location("downstream", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_it_imports_only_jax_orbax_and_flax():
    found = set()
    for node in ast.walk(ast.parse(FILE.read_text())):
        if isinstance(node, ast.Import):
            found |= {a.name.split(".")[0] for a in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module.split(".")[0])
    assert found - set(sys.stdlib_module_names) == {"jax", "orbax", "flax"}


QWEN3 = replace(PLAIN, model_type="qwen3", tied=False, attention=AttentionConfig(qk_norm=True, rope=Rope(theta=1e5)))


@pytest.mark.parametrize("config", [PLAIN, QWEN3], ids=["qwen2", "qwen3"])
def test_other_mesh_same_logits(downstream, tmp_path, config):
    model, params = make(config)
    run = write_run(tmp_path / "run", params, steps=(1,))
    (run / "model" / "config.json").write_text(json.dumps(to_hf(config)))
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    found, there = downstream.restore(run, mesh)
    assert there["layers"]["mlp"]["up"]["kernel"].sharding.spec == jax.sharding.PartitionSpec(None, "data", "model")
    t = tokens(2, 9)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        got = jax.jit(lambda p, t: downstream.forward(found, p, t))(there, t)
    np.testing.assert_allclose(got, model.apply({"params": params}, t), atol=3e-5)


def test_as_a_program(tmp_path):
    run = write_run(tmp_path / "run", make(PLAIN)[1], steps=(1,))
    done = subprocess.run([sys.executable, str(FILE), str(run), "--mesh", "4x2", "--steps", "3"],
                          capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()
    assert first == "qwen2, 17,600 parameters over 8 devices" and second.startswith("[1, 2, 3, ")


def test_what_it_does_not_do_is_refused(downstream):
    scaled = replace(PLAIN, attention=replace(PLAIN.attention, rope=Rope(scaling=Linear(factor=2.0))))
    with pytest.raises(ValueError, match="plain rotary"):
        downstream.forward(to_hf(scaled), {}, tokens(1, 2))
