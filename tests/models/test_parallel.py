"""`models.parallel`: the order of a cut row, what a mesh refuses, and memory of long rows."""

import subprocess
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec

from distill_jax.models.config import AttentionConfig, ModelConfig
from distill_jax.models.parallel import check_mesh, lookup, straightened, zigzag
from distill_jax.models.transformer import Transformer, init_params
from distill_jax.sharding import batch_spec, make_mesh, param_shardings

CONFIG = ModelConfig(vocab_size=64, hidden_size=32, mlp_size=64, num_layers=2, num_heads=8, num_kv_heads=2, head_dim=8,
                     context_length=1 << 20, attention=AttentionConfig(qkv_bias=True, window=24, sliding=(True, False)))


@given(parts=st.integers(1, 9), piece=st.integers(1, 5))
def test_zigzag_balances_causal_work(parts, piece):
    order = zigzag(2 * parts * piece, parts)
    assert sorted(order) == list(range(2 * parts * piece))
    work = (order + 1).reshape(parts, -1).sum(1)  # keys that the queries of a device see
    assert len(set(work)) == 1


@pytest.mark.parametrize("parts", [2, 3, 4, 5, 8])
def test_straightened_undoes_zigzag(parts):
    mesh = make_mesh(context=parts, devices=jax.devices()[:parts])
    x = np.arange(2 * 4 * parts * 3, dtype=np.float32).reshape(2, 4 * parts, 3)
    with jax.set_mesh(mesh):
        got = jax.jit(lambda x: straightened(x[:, zigzag(x.shape[1], parts)], parts))(x)
    np.testing.assert_array_equal(got, x)
    assert got.sharding.spec == PartitionSpec(None, "context")


@pytest.mark.parametrize("sizes", [{"fsdp": 8}, {"tensor": 8}, {"fsdp": 2, "tensor": 2, "context": 2}, {"data": 8}])
def test_lookup(sizes):
    mesh, rng = make_mesh(devices=None, **sizes), np.random.default_rng(0)
    table, tokens = rng.standard_normal((48, 16)).astype(np.float32), rng.integers(0, 48, (8, 6))
    weight = rng.standard_normal((8, 6, 16)).astype(np.float32)

    def total(table, tokens):
        return jnp.sum(lookup(table, tokens, jnp.float32) * weight)

    want = jax.value_and_grad(total)(jnp.asarray(table), tokens)
    placed = jax.device_put({"embed": {"embedding": table}}, param_shardings(mesh, {"embed": {"embedding": table}}))
    with jax.set_mesh(mesh):
        got = jax.jit(jax.value_and_grad(total))(placed["embed"]["embedding"],
                                                 jax.device_put(tokens, NamedSharding(mesh, batch_spec())))
    for a, b in zip(got, want):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("sizes", [{"context": 8}, {"context": 3, "tensor": 2}, {"context": 2, "tensor": 4}])
def test_sliding_windows_and_few_heads_on_a_cut_row(sizes):
    devices = int(np.prod([*sizes.values()]))
    mesh, model = make_mesh(devices=jax.devices()[:devices], **sizes), Transformer(CONFIG)
    params, rng = init_params(model, jax.random.key(0)), np.random.default_rng(0)
    tokens = rng.integers(0, 64, (2, 96)).astype(np.int32)
    segments = np.sort(rng.integers(1, 4, (2, 96)), axis=1).astype(np.int32)
    run = jax.jit(partial(model.apply, method="hidden", taps=(0,)))
    want = run({"params": params}, tokens, None, segments)
    with jax.set_mesh(mesh):
        got = jax.jit(partial(model.apply, method="hidden", taps=(0,)))({"params": params}, tokens, None, segments)
    np.testing.assert_allclose(got.hidden, want.hidden, atol=2e-5)
    np.testing.assert_allclose(got.taps[0], want.taps[0], atol=2e-5)


@pytest.mark.parametrize("sizes, tokens, words", [
    ({"tensor": 3}, 96, ["tensor=3", "8 heads", "1, 2, 4, 8"]),
    ({"context": 8}, 100, ["context=8", "100 tokens", "multiple of 16"]),
])
def test_a_mesh_that_does_not_divide_the_model(sizes, tokens, words):
    mesh = make_mesh(devices=jax.devices()[:int(np.prod([*sizes.values()]))], **sizes)
    with pytest.raises(ValueError) as e:
        check_mesh(CONFIG, mesh, tokens, "student")
    assert all(w in str(e.value) for w in [*words, "student"][:3]), e.value


@pytest.mark.slow
def test_128k_tokens_on_eight_devices():
    """Loss and gradient of a row of 128k tokens; memory grows with tokens / devices. In a process of its own."""
    done = subprocess.run([sys.executable, "-m", "tests.models.long_context"], capture_output=True, text=True,
                          cwd=Path(__file__).resolve().parents[2])
    assert done.returncode == 0, done.stderr[-3000:]
    print(done.stdout)
