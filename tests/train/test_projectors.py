"""Coupled terms and projectors in the training step: what gets a gradient, how a batch may be cut, resume."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distill_jax.data.views import without_thinking
from distill_jax.losses.groups.hidden import cosine_distance, mean_squared_error
from distill_jax.losses.groups.sinkhorn import sinkhorn_kd
from distill_jax.losses.groups.transport import sequence_transport
from distill_jax.losses.rows.cross_entropy import cross_entropy
from distill_jax.losses.rows.divergences import forward_kl
from distill_jax.losses.rows.dual_space import jsd_where_right
from distill_jax.losses.targets import Full, Labels
from distill_jax.models.projectors import CrossAttention, LinearProjector
from distill_jax.models.transformer import Transformer
from distill_jax.objective.coupled import CoupledTerm
from distill_jax.objective.term import Term, build_objective
from distill_jax.sharding import make_mesh, param_shardings
from distill_jax.train.feed import place_global
from distill_jax.train.loop import Run, fit
from distill_jax.train.optim import AdamW
from distill_jax.train.state import create_state
from distill_jax.train.step import StepConfig, make_gradient
from tests.train.tiny import CONFIG, OPTIM, Synthetic

STUDENT = dataclasses.replace(CONFIG, tied=False)
TEACHER = dataclasses.replace(CONFIG, hidden_size=24, num_layers=3, tied=False)
MODELS = {"student": Transformer(STUDENT), "teacher": Transformer(TEACHER)}
PROJECTORS = {
    "t2s": LinearProjector(source="teacher/main", like="student", width_in=24, width_out=16),
    "s2t": LinearProjector(source="student/main", like="teacher", width_in=16, width_out=24),
    "up": LinearProjector(source="student/main", like="teacher", width_in=16, width_out=24, layers=(0, 1, "embedding")),
    "cma": CrossAttention(student="student/main", teacher="teacher/main", student_width=16, teacher_width=24),
}
DSKD = {"t2s_ce": Term(cross_entropy, student="t2s/main"), "t2s_kl": Term(forward_kl, target="t2s/main"),
        "s2t_kl": Term(forward_kl, student="s2t/main", target="teacher/main")}
CMA = {"t2s_ce": Term(cross_entropy, student="cma.t2s/main"), "t2s_kl": Term(jsd_where_right, target="cma.t2s/main"),
       "s2t_kl": Term(forward_kl, student="cma.s2t/main", target="teacher/main")}
MAPPED = {"up": CoupledTerm(cosine_distance, student="up/main", layers=((0, 0), (1, -1), ("embedding", "embedding"))),
          "crc": CoupledTerm(sequence_transport, student="up/main", target="teacher/plain", layers=((1, "final"),),
                             per="sequence", kwargs={"iterations": 5})}


def init(seed=0):
    """Parameters (NumPy) of every provider."""
    make = lambda m, key: jax.jit(lambda key: m.init(key, np.zeros((1, 1), np.int32))["params"])(key)
    keys = iter(jax.random.split(jax.random.key(seed), 8))
    params = {n: make(m, next(keys)) for n, m in MODELS.items()}
    return jax.tree.map(np.asarray, params | {n: p.init(next(keys)) for n, p in PROJECTORS.items()})


PARAMS = init()


def config_of(terms, mesh=None, **kwargs):
    objective = build_objective(terms)
    used = {s.split("/")[0].split(".")[0] for s in objective.sources} & set(PROJECTORS)
    return StepConfig(objective=objective, models=MODELS, projectors=PROJECTORS, mesh=mesh or make_mesh(
        devices=jax.devices()[:1]), optimizers={n: OPTIM.build(10) for n in ("student", *sorted(used))},
        views={"plain": without_thinking}, **kwargs)


def gradient(terms, shape=(1, 1, 1), parts=1, params=PARAMS):
    """(gradients as NumPy, metrics) of the synthetic batch under one way of cutting it up."""
    mesh = make_mesh(*shape, devices=jax.devices()[:int(np.prod(shape))])
    config = config_of(terms, mesh, micro_batches=parts)
    put = lambda tree: jax.device_put(tree, param_shardings(mesh, tree))
    trained = {n: put(params[n]) for n in config.optimizers}
    fn = jax.jit(make_gradient(config, jax.tree.map(lambda x: x.sharding, trained)))
    with jax.set_mesh(mesh):
        grads, metrics = fn(trained, {"teacher": put(params["teacher"])},
                            place_global(Synthetic().batch(0), mesh), np.int32(0), config.objective.init())
    return jax.tree.map(lambda x: np.asarray(x, np.float64), grads), jax.device_get(metrics)


def norm(tree):
    return float(np.sqrt(sum((x**2).sum() for x in jax.tree.leaves(tree))))


def difference(a, b):
    return norm(jax.tree.map(np.subtract, a, b)) / norm(b)


def test_projectors_do_not_depend_on_how_a_batch_is_cut():
    """DSKD, CMA, mapped layers and a made view: micro-batches and devices leave every provider's gradient alone."""
    terms = DSKD | MAPPED | {f"cma_{n}": t for n, t in CMA.items()}
    whole, metrics = gradient(terms)
    assert set(whole) == {"student", "t2s", "s2t", "up", "cma"} and all(norm(g) > 1e-3 for g in whole.values())
    assert all(metrics["terms"][n].mean > 0 for n in terms if n != "cma_t2s_kl"), "the gold filter starts empty"
    other, measured = gradient(terms, shape=(2, 1, 2), parts=2)
    for name in whole:
        assert difference(other[name], whole[name]) < 2e-5, name
    for name, sums in metrics["terms"].items():
        np.testing.assert_allclose(measured["terms"][name].sum, sums.sum, rtol=1e-4, atol=1e-5)


def identical():
    """A teacher that is the student, and projectors that change nothing."""
    linear = lambda n: {"kernel": np.eye(n, dtype=np.float32), "bias": np.zeros(n, np.float32)}
    return {"student": PARAMS["student"], "teacher": PARAMS["student"], "t2s": {"final": linear(16)},
            "s2t": {"final": linear(16)}}


def test_dskd_of_a_teacher_that_is_the_student(monkeypatch):
    """Identity projectors: both divergences and the student's gradient are zero; CE(t2s) moves t2s alone."""
    monkeypatch.setitem(MODELS, "teacher", MODELS["student"])
    for name in ("t2s", "s2t"):
        monkeypatch.setitem(PROJECTORS, name, dataclasses.replace(PROJECTORS[name], width_in=16, width_out=16))
    grads, metrics = gradient(DSKD, params=identical())
    for name in ("t2s_kl", "s2t_kl"):
        assert abs(metrics["terms"][name].mean) < 1e-6
    assert norm(grads["student"]) < 1e-6 * norm(grads["t2s"]) + 1e-6 and norm(grads["s2t"]) < 1e-5
    assert norm(grads["t2s"]) > 1e-2


def test_the_students_head_gets_nothing_from_the_teacher_in_its_space():
    """L_a: CE of t2s reaches P_t2s only; the divergence reaches the student and not P_t2s."""
    ce, _ = gradient({"t2s_ce": DSKD["t2s_ce"]})
    assert not norm(ce["student"]) and norm(ce["t2s"]) > 1e-3
    kl, _ = gradient({"t2s_kl": DSKD["t2s_kl"]})
    assert norm(kl["student"]) > 1e-3 and not norm(kl["t2s"])


def attention(scale=1.0, on=(4, 5)):
    """(t2s, s2t, params) of `CrossAttention` on random states, straight from its `write`."""
    rng = np.random.default_rng(0)
    batch = Synthetic(batch_size=2).batch(0)
    made = {(p, x): jnp.asarray(scale * rng.normal(size=(2, 24, d)), jnp.float32)
            for p, d in (("student/main", 16), ("teacher/main", 24)) for x in ("final", "embedding")}
    model = dataclasses.replace(PROJECTORS["cma"], on=on)
    found = type("Found", (), {"state": lambda self, s, x: made[s, x], "head": lambda self, n: n, "views": batch.views})
    out = model.write(PARAMS["cma"], found())
    return batch, made, out[".t2s/main"].layers["final"], out[".s2t/main"].layers["final"]


def test_cross_attention_against_numpy():
    """Row by row and document by document; positions are those that predict a supervised token."""
    batch, made, t2s, s2t = attention()
    lin = lambda name, x: x @ PARAMS["cma"][name]["kernel"] + PARAMS["cma"][name]["bias"]
    rms = lambda x: x / np.sqrt(np.mean(x**2, -1, keepdims=True))
    after = lambda x: np.concatenate([x[:, 1:], 0 * x[:, :1]], 1)
    s = batch.main
    on = after(np.isin(s.roles, (4, 5)) & (s.weights > 0)).astype(bool)
    ids = after(s.segment_ids)
    h_s, h_t, e_s, e_t = (np.asarray(made[k], np.float64) for k in (
        ("student/main", "final"), ("teacher/main", "final"), ("student/main", "embedding"),
        ("teacher/main", "embedding")))
    query, key = lin("query", np.concatenate([e_s, after(e_s)], -1)), rms(np.concatenate([e_t, after(e_t)], -1))
    last = np.where(np.any(after(e_t), -1, keepdims=True), rms(after(e_t) + 1e-30), 0)
    of_t, of_s = lin("t2s", rms(h_t) + last), lin("s2t", h_s)
    want_t2s, want_s2t = np.zeros((2, 24, 16)), np.zeros((2, 24, 24))
    for b in range(2):
        for d in set(ids[b][on[b]]):
            at = np.nonzero(on[b] & (ids[b] == d))[0]
            a = np.exp(query[b, at] @ key[b, at].T / np.sqrt(48))
            want_t2s[b, at] = a / a.sum(1, keepdims=True) @ of_t[b, at]
            want_s2t[b, at] = (a / a.sum(0, keepdims=True)).T @ of_s[b, at]
    np.testing.assert_allclose(t2s, want_t2s, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(s2t, want_s2t, rtol=1e-3, atol=1e-4)


def test_gold_filter_keeps_the_tokens_the_teacher_has_right():
    teacher = jnp.asarray([[3.0, 1.0, 0.0], [0.0, 1.0, 2.0]])
    student = jnp.asarray([[0.5, 0.2, 0.0], [0.0, 1.0, 0.0]])
    got = jsd_where_right(student, Full(teacher, jnp.asarray([0, 1])), temperature=2.0)
    np.testing.assert_allclose(got, [float(forward_kl(student, Full(teacher), temperature=2.0)[0]), 0.0], rtol=1e-6)
    with pytest.raises(ValueError, match="give a provider as the term's target, not a Labels"):
        jsd_where_right(student, Labels(jnp.asarray([0, 1])))


def test_layers_that_do_not_exist_and_other_mistakes():
    with pytest.raises(ValueError, match=r"layer 3 of 'teacher/main': 'teacher' has layers 0 to 2 \(or -3 to -1\)"):
        config_of({"a": CoupledTerm(mean_squared_error, layers=((0, 3),))})
    with pytest.raises(ValueError, match="scope='global' has no meaning for cosine_distance"):
        CoupledTerm(cosine_distance, scope="global")
    with pytest.raises(ValueError, match="the tokens of two views differ"):
        build_objective({"a": CoupledTerm(cosine_distance, target="teacher/plain")})
    with pytest.raises(ValueError, match=r"name providers \['nobody'\]"):
        config_of({"a": CoupledTerm(cosine_distance, student="nobody/main")})
    with pytest.raises(ValueError, match="a layer map needs a teacher with layers"):
        CoupledTerm(sinkhorn_kd, target="signals/topk", layers=((0, "final"), (1, "final")))


def test_training_resumes_to_the_bit_with_a_projector(tmp_path):
    """The projector is in the train state with its own learning rate; two updates and two more equal four."""
    config = config_of(DSKD | {"up": MAPPED["up"]})
    lr = {"student": 3e-3, "t2s": 1e-2, "s2t": 1e-2, "up": 0.0}
    optim = {n: AdamW(peak_lr=lr[n], warmup=1, decay="constant") for n in config.optimizers}
    config = dataclasses.replace(config, optimizers={n: o.build(4) for n, o in optim.items()},
                                 schedules={n: o.schedule(4) for n, o in optim.items()})

    def train(folder, steps):
        params = {n: PARAMS[n] for n in config.optimizers}
        params = jax.device_put(params, param_shardings(config.mesh, params))
        state = create_state(params, config.optimizers, mesh=config.mesh)
        run = Run(folder=folder, steps=steps, log_every=1, save_every=2)
        return fit(config, state, Synthetic(), run, frozen={"teacher": PARAMS["teacher"]}).state

    whole = jax.device_get(train(tmp_path / "whole", 4))
    train(tmp_path / "cut", 2)
    cut = jax.device_get(train(tmp_path / "cut", 4))
    jax.tree.map(np.testing.assert_array_equal, (cut.params, cut.opt_state), (whole.params, whole.opt_state))
    moved = {n: difference(whole.params[n], PARAMS[n]) for n in optim}
    assert moved["up"] == 0 and all(moved[n] > 1e-4 for n in ("student", "t2s", "s2t"))
    assert sorted(p.name for p in (tmp_path / "cut/checkpoints/4/params").iterdir()) == ["s2t", "student", "t2s", "up"]
