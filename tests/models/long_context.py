"""`python -m tests.models.long_context`: rows of 4k to 128k tokens on eight virtual devices, context 8.

The training step's loss of 4k tokens equals that of one device; temporaries of a device against tokens and devices; one
step of 128k tokens is run.
"""

import os
import sys

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"

import jax
import numpy as np

from distill_jax.models.config import AttentionConfig, ModelConfig
from distill_jax.sharding import make_mesh
from distill_jax.train.feed import place_global
from distill_jax.train.step import make_step
from tests.train.tiny import pack, setup

CONFIG = ModelConfig(vocab_size=64, hidden_size=32, mlp_size=64, num_layers=2, num_heads=4, num_kv_heads=1, head_dim=8,
                     context_length=1 << 20, attention=AttentionConfig(qkv_bias=True))


def batch_of(tokens):
    """One row of documents of 1 to 8 thousand tokens."""
    rng, documents, left = np.random.default_rng(0), [], tokens
    while left:
        n = min(left, int(rng.integers(1000, 8000)))
        documents.append(rng.integers(1, 64, n).astype(np.int32))
        left -= n
    return pack([documents], tokens)


def program(tokens, context):
    mesh = make_mesh(context=context, devices=jax.devices()[:context])
    config, state = setup(mesh=mesh, config=CONFIG)
    step, batch = make_step(config, state), place_global(batch_of(tokens), mesh)
    jitted = step if hasattr(step, "lower") else step.__wrapped__
    with jax.set_mesh(mesh):
        return jitted.lower(state, {}, batch).compile(), state, batch


def main():
    losses = {}
    for context in (1, 8):
        run, state, batch = program(4096, context)
        losses[context] = float(run(state, {}, batch)[1]["loss"])
    print("loss of 4k tokens on 1 and 8 devices:", losses)
    assert abs(losses[1] - losses[8]) < 1e-6 * abs(losses[1]), losses
    temporaries = {}
    for tokens, context in ((32768, 4), (32768, 8), (65536, 8), (131072, 8)):
        run, state, batch = program(tokens, context)
        temporaries[tokens, context] = held = run.memory_analysis().temp_size_in_bytes
        print(f"{tokens} tokens on {context} devices: {held / 2**20:.1f} MiB of temporaries each", flush=True)
    assert temporaries[32768, 8] < 0.65 * temporaries[32768, 4], "memory goes with 1/devices"
    assert temporaries[131072, 8] < 2.2 * temporaries[65536, 8] < 2.2 * 2.2 * temporaries[32768, 8], "and with tokens"
    loss = float(run(state, {}, batch)[1]["loss"])
    print("loss of 128k tokens:", loss)
    assert np.isfinite(loss)


if __name__ == "__main__":
    sys.exit(main())
