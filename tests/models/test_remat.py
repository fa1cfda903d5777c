"""Remat policies: what they keep, and that they change no gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distill_jax.models.config import ModelConfig
from distill_jax.models.remat import REMAT
from distill_jax.models.transformer import Transformer, init_params

CONFIG = ModelConfig(vocab_size=32, hidden_size=32, mlp_size=96, num_layers=6, num_heads=4, num_kv_heads=2, head_dim=8)
TOKENS = 256


def compiled(remat, attention):
    """The compiled gradient of a loss on hidden states, and its arguments."""
    model = Transformer(CONFIG, remat=remat, attention=attention)
    params = init_params(Transformer(CONFIG), jax.random.key(0))
    tokens = jnp.asarray(np.random.default_rng(0).integers(32, size=(2, TOKENS)))
    loss = lambda p: jnp.mean(jnp.square(model.apply({"params": p}, tokens, method="hidden").hidden))
    return jax.jit(jax.value_and_grad(loss)).lower(params).compile(), params


@pytest.fixture(scope="module", params=["reference", "chunked"])
def steps(request):
    return {name: compiled(name, request.param) for name in REMAT}


def test_gradients_are_equal(steps):
    loss, grads = (lambda c, p: c(p))(*steps["none"])
    for name, (step, params) in steps.items():
        other, found = step(params)
        np.testing.assert_allclose(other, loss, rtol=1e-6, err_msg=name)
        for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(found)):
            np.testing.assert_allclose(a, b, atol=2e-5 * float(jnp.max(jnp.abs(a))), err_msg=name)


def test_memory_falls_from_policy_to_policy(steps):
    """Temporaries of the compiled gradient: in the order of the table, and the ends differ by what `bytes` says."""
    temp = {name: step.memory_analysis().temp_size_in_bytes for name, (step, _) in steps.items()}
    kept = {name: 2 * TOKENS * policy.bytes(CONFIG, 4) for name, policy in REMAT.items()}
    assert sorted(temp, key=temp.__getitem__, reverse=True) == list(REMAT), temp
    assert sorted(kept, key=kept.__getitem__, reverse=True) == list(REMAT), kept
    assert temp["dots"] - temp["full"] == pytest.approx(kept["dots"] - kept["full"], rel=0.25), (temp, kept)


def test_bytes_by_hand():
    """D 32, q 32, kv 16, F 96, six layers, bf16."""
    assert REMAT["full"].bytes(CONFIG, 2) == 2 * 6 * 32
    assert REMAT["qkv_attention"].bytes(CONFIG, 2) == 2 * 6 * (32 + 64 + 32)
    assert REMAT["dots"].bytes(CONFIG, 2) == 2 * 6 * (64 + 32 + 32 + 192)


def test_unknown_name():
    with pytest.raises(ValueError, match="remat 'some' is unknown; known: none, dots, qkv_attention, full"):
        init_params(Transformer(CONFIG, remat="some"), jax.random.key(0))
