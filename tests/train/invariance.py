"""The gradient of one global batch at initialisation, cut up in every way; prints relative differences as JSON.

`python -m tests.train.invariance` runs it in float64 (tests/train/test_invariance.py reads the output); the test runs
`differences("float32")` in its own process. Compared is the norm over the tree: single elements may differ more.
"""

import dataclasses
import json
import os

if __name__ == "__main__":
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"

import jax
import numpy as np

from distill_jax.losses.rows.cross_entropy import cross_entropy
from distill_jax.losses.rows.divergences import generalized_jsd
from distill_jax.objective.term import Term
from distill_jax.sharding import make_mesh
from distill_jax.train.feed import place
from distill_jax.train.step import make_gradient
from tests.train.tiny import CONFIG, Synthetic, pack, setup

TERMS = {"ce": Term(cross_entropy, weight=0.3), "sequences": Term(cross_entropy, per="sequence", weight=0.2),
         "kd": Term(generalized_jsd, target="signals/topk", kwargs={"beta": 0.5})}
MODEL = dataclasses.replace(CONFIG, hidden_size=32, num_heads=4, num_kv_heads=4, head_dim=8, mlp_size=64)
MESHES = {"1 device": (1, 1, 1), "2 data": (2, 1, 1), "4 fsdp": (1, 4, 1), "8 fsdp": (1, 8, 1), "4 tensor": (1, 1, 4),
          "data x fsdp x tensor": (2, 2, 2)}


def gradient(dtype, mesh=(1, 1, 1), parts=1, packed=True):
    """Gradient tree (NumPy) of the same documents under one way of cutting them up."""
    mesh = make_mesh(*mesh, devices=jax.devices()[:int(np.prod(mesh))])
    config, state = setup(TERMS, mesh, micro_batches=parts, config=MODEL, dtype=dtype)
    source = Synthetic()
    rows = source.documents(0)
    if not packed:
        rows = [[d] for row in rows for d in row]
        rows += [[]] * (-len(rows) % 8)
    batch = place(pack(rows, source.seq_len if packed else 12), jax.sharding.NamedSharding(
        mesh, jax.sharding.PartitionSpec(("data", "fsdp"))))
    call = jax.jit(make_gradient(config))
    if mesh.size > 1:
        with jax.set_mesh(mesh):
            grads, metrics = call(state.params, {}, batch, state.step, state.controllers)
    else:
        grads, metrics = call(state.params, {}, batch, state.step, state.controllers)
    return jax.tree.map(lambda x: np.asarray(x, np.float64), grads), float(metrics["loss"])


def differences(dtype):
    """{how it was cut: |g - g_whole| / |g_whole|} over the whole tree."""
    whole, loss = gradient(dtype)
    norm = lambda t: np.sqrt(sum((x**2).sum() for x in jax.tree.leaves(t)))
    out = {"norm": float(norm(whole)), "loss": loss}
    cuts = {name: {"mesh": m} for name, m in MESHES.items() if name != "1 device"}
    cuts |= {"micro-batches 2": {"parts": 2}, "micro-batches 4": {"parts": 4}, "unpacked": {"packed": False},
             "micro-batches 2, fsdp 2 x tensor 2": {"parts": 2, "mesh": (1, 2, 2)}}
    for name, how in cuts.items():
        other, _ = gradient(dtype, **how)
        out[name] = float(norm(jax.tree.map(np.subtract, other, whole)) / norm(whole))
    return out


if __name__ == "__main__":
    jax.config.update("jax_enable_x64", True)
    jax.config.update("jax_numpy_dtype_promotion", "strict")
    print(json.dumps(differences("float64")))
