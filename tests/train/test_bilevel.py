"""The meta-gradient of TGeo-KD against differentiation through the unrolled update, and what it learns."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distill_jax.core.batch import Batch, TopK
from distill_jax.core.roles import ANSWER, THINK
from distill_jax.losses.rows.cross_entropy import cross_entropy
from distill_jax.losses.rows.divergences import forward_kl
from distill_jax.losses.rows.trilateral import Fused, fusion_ratio, ratio, triangle
from distill_jax.losses.targets import Labels, TopKTarget
from distill_jax.objective.controllers import FusionNet
from distill_jax.objective.term import Term, build_objective
from distill_jax.sharding import make_mesh
from distill_jax.train.bilevel import fused_term, make_outer
from distill_jax.train.optim import AdamW
from distill_jax.train.step import make_step
from tests.train.tiny import VOCAB, Synthetic, setup

NET = FusionNet(width=5, every=1, inner_lr=0.05, lr=0.03, decay=0.0)


def fused(net=NET):
    at = {"target": "signals/topk", "kwargs": {"fusion": net}}
    return {"fused": Term(loss=Fused(), **at), "ratio": Term(loss=fusion_ratio, weight=0.0, **at)}


def flawed(batch, seed=0):
    """The teacher is wrong on thinking: it never names the token that stands there. On answers it knows better than
    the labels, half of which are noise."""
    m, signal, rng = batch.main, batch.signals["topk"], np.random.default_rng(seed)
    wrong = np.where((m.roles == int(THINK))[..., None], (signal.ids + 11) % VOCAB, signal.ids)
    sure = np.broadcast_to(np.log(np.array([0.9, 0.04, 0.03, 0.02], np.float32)), wrong.shape)
    noise = (m.roles == int(ANSWER)) & (rng.random(m.tokens.shape) < 0.5)
    tokens = np.where(noise, rng.integers(0, VOCAB, m.tokens.shape), m.tokens)
    return Batch(views={"main": replace(m, tokens=tokens.astype(np.int32))},
                 signals={"topk": TopK(ids=wrong.astype(np.int32), logprobs=sure.copy(), mask=signal.mask)})


def random_network(state):
    """A network whose second layer is not zero, so that every parameter has a gradient."""
    w = jnp.asarray(np.random.default_rng(3).normal(size=state.controllers["fused.fusion"]["w"].shape), jnp.float32)
    return {k: {**s, "w": w} for k, s in state.controllers.items()}


def unrolled(config, state, inner, heldout, controllers):
    """d CE_heldout(theta - eta grad L(theta, w)) / dw by automatic differentiation, with logits [B,T,V]."""
    model = config.models["student"]
    weights = lambda b: config.objective.weights(b, jnp.int32(0), controllers).weights["fused"][:, 1:].reshape(-1)

    def rows(params, batch):
        m = batch.main
        logits = model.apply({"params": params}, m.tokens, m.positions, m.segment_ids)[:, :-1]
        flat = lambda x: jnp.asarray(x)[:, 1:].reshape(-1, *x.shape[2:])
        signal = batch.signals["topk"]
        token = flat(m.tokens)
        return logits.reshape(-1, VOCAB), TopKTarget(flat(signal.ids), flat(signal.logprobs), None, token), token

    def loss(params, w):
        logits, target, token = rows(params, inner)
        alpha = ratio(w, triangle(logits, target))
        return jnp.sum(weights(inner) * (alpha * forward_kl(logits, target)
                                         + (1 - alpha) * cross_entropy(logits, Labels(token))))

    def outer(w):
        grads = jax.grad(loss)(state.params["student"], w)
        ahead = jax.tree.map(lambda p, g: p - NET.inner_lr * g, state.params["student"], grads)
        logits, _, token = rows(ahead, heldout)
        return jnp.sum(weights(heldout) * cross_entropy(logits, Labels(token)))

    return jax.jit(jax.grad(outer))(controllers["fused.fusion"]["w"])


@pytest.mark.parametrize("micro_batches, devices", [(1, 1), (2, 1), (1, 4)])
def test_gradient_is_that_of_the_unrolled_update(micro_batches, devices):
    mesh = make_mesh(data=devices, devices=jax.devices()[:devices])
    config, state = setup(fused(), mesh, micro_batches=micro_batches)
    inner, heldout = flawed(Synthetic(seed=0).batch(0)), flawed(Synthetic(seed=5).batch(0))
    controllers = random_network(state)
    moved = make_outer(config)(state.params, {}, inner, heldout, state.step, controllers)
    got = moved["fused.fusion"]["m"] / 0.1  # the first moment of the first update
    want = unrolled(config, state, inner, heldout, controllers)
    np.testing.assert_allclose(got, want, rtol=0, atol=2e-3 * float(jnp.max(jnp.abs(want))))
    for a, b in zip(*(jax.tree.leaves(moved[k]) for k in ("fused.fusion", "ratio.fusion")), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_wrong_teacher_is_trusted_less():
    """2312.15112: alpha falls where the teacher is wrong."""
    net = FusionNet(width=64, every=1, inner_lr=0.05, lr=0.003, decay=0.0)
    config, state = setup(fused(net), optim=AdamW(peak_lr=5e-3, warmup=2))
    step, outer, alpha = make_step(config, state), make_outer(config), []
    for i in range(400):
        batch = flawed(Synthetic(seed=0).batch(i), seed=i)
        moved = outer(state.params, {}, batch, Synthetic(seed=5).batch(i), state.step, state.controllers)
        state, metrics = step(replace(state, controllers=moved), {}, batch)
        sums = metrics["terms"]["ratio"]
        alpha.append([sums.sum[int(r)] / sums.count[int(r)] for r in (THINK, ANSWER)])
    wrong, right = np.mean(np.array(jax.device_get(alpha[-60:])), axis=0)
    assert wrong < 0.05 and right > 3 * wrong and right > 0.1, (wrong, right)


def test_terms_that_cannot_be_learned_are_named():
    assert fused_term(build_objective({"ce": Term(cross_entropy)})) is None
    alone = {"ratio": fused()["ratio"]}
    with pytest.raises(ValueError, match=r"exactly one term of loss Fused"):
        fused_term(build_objective(alone))
    other = {**fused(), "ratio": fused(FusionNet(width=6))["ratio"]}
    with pytest.raises(ValueError, match="the same wherever it is used"):
        fused_term(build_objective(other))
    with pytest.raises(ValueError, match="width and every of at least 1"):
        FusionNet(width=0)
