import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from distill_jax.train.optim import AdamW, decay_mask


def rates(spec, total, steps):
    schedule = spec.schedule(total)
    return [float(schedule(s)) for s in steps]


def test_schedule_by_hand():
    cosine = AdamW(peak_lr=1.0, warmup=4, end_factor=0.2)
    np.testing.assert_allclose(rates(cosine, 12, [0, 1, 3, 4, 8, 12, 99]),
                               [0.25, 0.5, 1, 1, 0.6, 0.2, 0.2], atol=1e-6)
    linear = AdamW(peak_lr=1.0, warmup=0, decay="linear", end_factor=0.0)
    np.testing.assert_allclose(rates(linear, 10, [0, 5, 10]), [1, 0.5, 0], atol=1e-6)
    constant = AdamW(peak_lr=2.0, warmup=0.1, decay="constant")
    np.testing.assert_allclose(rates(constant, 20, [0, 1, 2, 20]), [1, 2, 2, 2], atol=1e-6)


def test_matches_adamw_by_hand():
    """Three updates against NumPy: clipping by global norm, bias correction, decoupled decay on matrices only."""
    spec = AdamW(peak_lr=0.1, warmup=0, decay="constant", b1=0.9, b2=0.99, eps=1e-6, weight_decay=0.5, grad_clip=1.0)
    rng = np.random.default_rng(0)
    params = {"kernel": rng.normal(size=(2, 3)), "bias": rng.normal(size=3)}
    ours = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), params)
    tx = spec.build(10)
    state = tx.init(ours)
    m = {k: np.zeros_like(v) for k, v in params.items()}
    v = {k: np.zeros_like(x) for k, x in params.items()}
    for t in range(1, 4):
        grads = {k: rng.normal(size=x.shape) for k, x in params.items()}
        updates, state = tx.update(jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), grads), state, ours)
        ours = optax.apply_updates(ours, updates)
        norm = np.sqrt(sum((g**2).sum() for g in grads.values()))
        for k, g in grads.items():
            g = g / max(1.0, norm)
            m[k], v[k] = 0.9 * m[k] + 0.1 * g, 0.99 * v[k] + 0.01 * g**2
            step = m[k] / (1 - 0.9**t) / (np.sqrt(v[k] / (1 - 0.99**t)) + 1e-6)
            params[k] = params[k] - 0.1 * (step + (0.5 * params[k] if k == "kernel" else 0.0))
    for k in params:
        np.testing.assert_allclose(ours[k], params[k], rtol=2e-5, err_msg=k)


def test_decay_spares_vectors_of_scanned_layers():
    layers = {"q": {"kernel": jnp.ones((2, 3, 3)), "bias": jnp.ones((2, 3))}, "norm": {"scale": jnp.ones((2, 3))}}
    params = {"layers": layers,
              "final_norm": {"scale": jnp.ones(3)}, "embed": {"embedding": jnp.ones((4, 3))}}
    mask = decay_mask(params)
    assert mask["layers"] == {"q": {"kernel": True, "bias": False}, "norm": {"scale": False}}
    assert mask["embed"]["embedding"] and not mask["final_norm"]["scale"]


@pytest.mark.parametrize("bad", [{"decay": "step"}, {"grad_clip": 0.0}, {"end_factor": 2.0}, {"warmup": -1}])
def test_bad_values_are_refused(bad):
    with pytest.raises(ValueError, match="AdamW"):
        AdamW(**bad)
