"""The gradient of one global batch at initialisation, cut up in every way; prints relative differences as JSON.

`python -m tests.train.invariance` computes in float64; `test_invariance.py` runs that, and float32 in its own process.
Compared is the norm over the tree: single elements may differ by more.
"""

import dataclasses
import json
import os
import sys

if __name__ == "__main__":
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"

import jax
import numpy as np

from distill_jax.losses.rows.cross_entropy import cross_entropy
from distill_jax.losses.rows.divergences import generalized_jsd
from distill_jax.models.transformer import Transformer
from distill_jax.objective.term import Term, build_objective
from distill_jax.sharding import make_mesh, param_shardings
from distill_jax.train.feed import place_global
from distill_jax.train.step import StepConfig, make_gradient
from tests.train.tiny import CONFIG, OPTIM, Synthetic, pack

OBJECTIVE = build_objective({
    "ce": Term(cross_entropy, weight=0.3), "sequences": Term(cross_entropy, per="sequence", weight=0.2),
    "kd": Term(generalized_jsd, target="signals/topk", kwargs={"beta": 0.5})})
MODEL = dataclasses.replace(CONFIG, hidden_size=32, num_heads=8, num_kv_heads=2, head_dim=8, mlp_size=64)
CUTS = {
    "2 data": {"mesh": {"data": 2}},
    "4 fsdp": {"mesh": {"fsdp": 4}},
    "4 tensor": {"mesh": {"tensor": 4}},
    "8 fsdp": {"mesh": {"fsdp": 8}},
    "8 tensor": {"mesh": {"tensor": 8}},
    "4 context": {"mesh": {"context": 4}},
    "3 context x 2 tensor": {"mesh": {"context": 3, "tensor": 2}},
    "2 fsdp x 2 context x 2 tensor, 2 micro-batches": {
        "mesh": {"fsdp": 2, "context": 2, "tensor": 2}, "parts": 2},
    "2 data x 2 fsdp x 2 tensor, 2 micro-batches": {"mesh": {"data": 2, "fsdp": 2, "tensor": 2}, "parts": 2},
    "2 micro-batches": {"parts": 2},
    "4 micro-batches": {"parts": 4},
    "unpacked": {"packed": False},
}


class Case:
    """One model, one set of parameters, one set of documents."""

    def __init__(self, dtype):
        self.model = Transformer(MODEL, dtype=np.dtype(dtype))
        params = jax.jit(lambda key: self.model.init(key, np.zeros((1, 1), np.int32))["params"])(jax.random.key(0))
        self.params = jax.tree.map(np.asarray, params)

    def gradient(self, mesh=None, parts=1, packed=True):
        """Gradient tree (NumPy, float64) under one way of cutting up the batch."""
        source, sizes = Synthetic(), mesh or {}
        mesh = make_mesh(devices=jax.devices()[:int(np.prod([*sizes.values()]))], **sizes)
        rows, length = source.documents(0), source.seq_len
        if not packed:  # one document a row, in shorter rows
            rows, length = [[d] for row in rows for d in row], 12
        params = {"student": jax.device_put(self.params, param_shardings(mesh, self.params))}
        config = StepConfig(objective=OBJECTIVE, models={"student": self.model}, mesh=mesh, micro_batches=parts,
                            optimizers={"student": OPTIM.build(10)})
        gradient = jax.jit(make_gradient(config, jax.tree.map(lambda x: x.sharding, params)))
        with jax.set_mesh(mesh):
            grads, _ = gradient(params, {}, place_global(pack(rows, length), mesh), np.int32(0), {})
        return jax.tree.map(lambda x: np.asarray(x, np.float64), grads)


def norm(grads):
    return float(np.sqrt(sum((x**2).sum() for x in jax.tree.leaves(grads))))


def differences(dtype, cuts=tuple(CUTS)):
    """{how it was cut: |g - g_whole| / |g_whole|} over the whole tree."""
    case = Case(dtype)
    whole = case.gradient()
    assert norm(whole) > 0.1
    relative = lambda other: norm(jax.tree.map(np.subtract, other, whole)) / norm(whole)
    return {name: relative(case.gradient(**CUTS[name])) for name in cuts}


if __name__ == "__main__":
    jax.config.update("jax_enable_x64", True)
    jax.config.update("jax_numpy_dtype_promotion", "strict")
    json.dump(differences("float64"), sys.stdout)
