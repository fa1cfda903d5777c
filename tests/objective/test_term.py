"""Terms: roles, global counts, sequences, schedules, controllers; and that a weight's effect is in the gradient."""

import dataclasses
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distill_jax.core.batch import Batch, Stream
from distill_jax.core.roles import ANSWER, PAD, QUESTION, SUPERVISED, THINK
from distill_jax.core.schedules import Linear
from distill_jax.losses.rows.cross_entropy import cross_entropy
from distill_jax.losses.rows.divergences import forward_kl, reverse_kl
from distill_jax.losses.rows.taid import taid
from distill_jax.objective.controllers import TAIDSchedule
from distill_jax.objective.reduce import means
from distill_jax.objective.term import Term, Weights, build_objective
from tests.objective.dense import random_head, random_topk, rel

V, D = 23, 6


def make_batch(rows=4, length=12, seed=0):
    """Two packed segments a row of different length, then padding; question, thinking, answer."""
    rng = np.random.default_rng(seed)
    segment_ids, roles, weights = (np.zeros((rows, length), t) for t in (np.int32, np.int32, np.float32))
    for r in range(rows):
        cuts = [0, int(rng.integers(4, 6)), int(rng.integers(8, length + 1))]
        for s, (a, b) in enumerate(itertools.pairwise(cuts)):
            segment_ids[r, a:b] = s + 1
            roles[r, a:b] = [QUESTION] * 2 + [THINK] * (b - a - 3) + [ANSWER]
            weights[r, a + 1:b] = 1
    tokens = np.where(segment_ids > 0, rng.integers(0, V, (rows, length)), 0).astype(np.int32)
    stream = Stream(tokens=tokens, positions=tokens * 0, segment_ids=segment_ids, roles=roles, step_ids=tokens * 0,
                    weights=weights, row_ids=tokens * 0)
    topk = random_topk(rng, (rows, length), V, 4)
    return Batch(views={"main": stream}, signals={"topk": topk})


@pytest.fixture(scope="module")
def source():
    rng = np.random.default_rng(1)
    return jnp.asarray(rng.normal(size=(4, 12, D)), jnp.float32), random_head(rng, V, D)


def run(objective, source, batch, step=0, state=None, rows=None):
    """Total, metrics and gradients over micro-batches of `rows` rows."""
    weights = objective.weights(batch, step, state)
    dynamic = objective.dynamic(step, state)
    rows = rows or batch.main.tokens.shape[0]

    @jax.jit
    def micro(head, hidden, part, w):
        fn = lambda x: objective.loss({"student/main": x}, part, w, dynamic)
        return jax.value_and_grad(fn, has_aux=True)((hidden, head))

    total, metrics, hidden_grads, head_grad = 0.0, None, [], 0.0
    for a in range(0, batch.main.tokens.shape[0], rows):
        cut = lambda x, a=a: x[a:a + rows]
        (t, m), (gh, gk) = micro(source[1], cut(source[0]), jax.tree.map(cut, batch), jax.tree.map(cut, weights))
        total, metrics = total + t, m if metrics is None else jax.tree.map(jnp.add, metrics, m)
        hidden_grads.append(gh)
        head_grad = head_grad + gk.kernel
    return total, metrics, jnp.concatenate(hidden_grads), head_grad


def test_mean_is_over_the_supervised_tokens_of_the_global_batch(source):
    batch = make_batch()
    objective = build_objective({"ce": Term(cross_entropy)})
    total, metrics, _, _ = run(objective, source, batch)
    logits = np.asarray(source[1].logits(source[0]), np.float64)
    logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    ce = -np.take_along_axis(logp[:, :-1], batch.main.tokens[:, 1:, None], -1)[..., 0]
    on = np.isin(batch.main.roles, [int(r) for r in SUPERVISED])[:, 1:]
    assert np.isclose(total, ce[on].mean(), rtol=1e-5)
    measured = means(metrics)
    assert np.isclose(measured["ce"], total, rtol=1e-5)
    assert np.isclose(measured["ce/answer"], ce[batch.main.roles[:, 1:] == ANSWER].mean(), rtol=1e-5)
    counts = np.asarray(metrics["ce"].count)
    assert counts[THINK] == (batch.main.roles == THINK).sum() and counts[PAD] == 0
    assert measured["ce/question"] == 0


def test_the_loop_is_the_objectives(source):
    """What a recipe's `loss_loop` says reaches the lift, and changes no number."""
    batch, terms = make_batch(), {"kd": Term(forward_kl, target="signals/topk"), "ce": Term(cross_entropy)}
    for a, b in zip(jax.tree.leaves(run(build_objective(terms, loop="vocabulary"), source, batch)),
                    jax.tree.leaves(run(build_objective(terms), source, batch)), strict=True):
        assert rel(a, b) < 1e-6
    tempered = {"kd": Term(forward_kl, target="signals/topk", kwargs={"temperature": 2.0, "temper": "even"})}
    with pytest.raises(ValueError, match="loop over the vocabulary"):
        run(build_objective(tempered, loop="vocabulary"), source, batch)


@pytest.mark.parametrize("per", ["token", "sequence"])
def test_micro_batches_change_nothing(source, per):
    batch = make_batch()
    objective = build_objective({"ce": Term(cross_entropy, per=per),
                                 "kd": Term(forward_kl, target="signals/topk", weight=0.5, per=per)})
    whole = run(objective, source, batch)
    for rows in (1, 2):
        part = run(objective, source, batch, rows=rows)
        for a, b in zip(jax.tree.leaves(part), jax.tree.leaves(whole)):
            assert rel(a, b) < 1e-6


def test_per_sequence_is_the_mean_of_segment_means(source):
    batch = make_batch()
    objective = build_objective({"ce": Term(cross_entropy, per="sequence", on=(THINK,))})
    weights = objective.weights(batch, 0).weights["ce"]
    segments = [(r, s) for r in range(4) for s in (1, 2)]
    for r, s in segments:
        here = (batch.main.segment_ids[r] == s)
        assert np.isclose(weights[r][here].sum(), 1 / len(segments), rtol=1e-6)
        assert len(set(np.asarray(weights[r][here & (batch.main.roles[r] == THINK)]).tolist())) == 1


def test_weights_honour_signal_mask_roles_and_schedule():
    batch = make_batch()
    objective = build_objective({"kd": Term(forward_kl, target="signals/topk", on=(ANSWER,),
                                            weight=Linear(start=0.0, stop=2.0, steps=4))})
    for step, factor in ((0, 0.0), (1, 0.5), (9, 2.0)):
        w = objective.weights(batch, step)
        assert np.isclose(w.weights["kd"].sum(), factor, rtol=1e-6)
        want = (batch.main.roles == ANSWER) & np.asarray(batch.signals["topk"].mask) & (batch.main.weights > 0)
        assert np.array_equal(np.asarray(w.masks["kd"]) > 0, want)


def test_nothing_supervised_is_zero_not_nan(source):
    batch = make_batch()
    stream = dataclasses.replace(batch.main, weights=batch.main.weights * 0)
    total, metrics, hidden, head = run(build_objective({"ce": Term(cross_entropy, per="sequence")}), source,
                                       dataclasses.replace(batch, views={"main": stream}))
    assert total == 0 and not np.any(hidden) and not np.any(head) and means(metrics)["ce"] == 0


def test_a_traced_weight_reaches_the_gradient(source):
    """The trap: coefficients applied to returned sums would scale the value and not the gradient."""
    batch = make_batch()
    term = lambda w: build_objective({"ce": Term(cross_entropy, weight=w)})
    one, half = run(term(1.0), source, batch), run(term(Linear(start=0.0, stop=1.0, steps=2)), source, batch, step=1)
    assert rel(half[0], 0.5 * one[0]) < 1e-6 and rel(half[3], 0.5 * one[3]) < 1e-6
    assert rel(half[1]["ce"].sum, one[1]["ce"].sum) < 1e-6, "metrics are free of the schedule"


def test_taid_schedule_hand_values():
    """From the method card: t=0.4, m=0, L 2 -> 1 gives d=0.5, m=0.005, dt=1.50375e-4."""
    c = TAIDSchedule(steps=10**9)
    state = c.update(c.init(), {"own": jnp.float32(2.0)}, 0)
    assert float(state["t"]) == np.float32(0.4) and float(state["previous"]) == 2.0 and float(state["momentum"]) == 0
    state = c.update(state, {"own": jnp.float32(1.0)}, 1)
    assert math.isclose(state["momentum"], 0.005, rel_tol=1e-5)
    assert math.isclose(float(state["t"]) - 0.4, 1.50375e-4, rel_tol=2e-3)
    bad = c.update(state, {"own": jnp.float32(np.nan)}, 2)
    assert jax.tree.map(float, bad) == jax.tree.map(float, state)


def test_taid_schedule_stays_between_ramp_and_stop():
    c = TAIDSchedule(steps=20, start=0.2, stop=0.9, alpha=0.3)
    state, seen, update = c.init(), [], jax.jit(c.update)
    for step in range(40):
        state = update(state, {"own": jnp.float32(3.0 * 0.9**step)}, step)
        ramp = 0.2 + 0.7 * step / 20
        assert min(0.9, ramp if step else 0.2) - 1e-6 <= float(state["t"]) <= 0.9 + 1e-6
        seen.append(float(state["t"]))
    assert seen == sorted(seen) and seen[5] > 0.2 + 0.7 * 5 / 20 + 0.05, "a falling loss runs ahead of the ramp"
    line = dataclasses.replace(c, adaptive=False)
    state = line.update(line.update(line.init(), {"own": jnp.float32(2.0)}, 0), {"own": jnp.float32(1.0)}, 4)
    assert np.isclose(state["t"], 0.2 + 0.7 * 4 / 20)


def test_controller_drives_the_loss(source):
    """t from the train state is what the loss sees, and its update what the metrics of the whole batch say."""
    batch = make_batch()
    c = TAIDSchedule(steps=100)
    objective = build_objective({"taid": Term(taid, target="signals/topk", kwargs={"t": c})})
    state = objective.init()
    assert set(state) == {"taid.t"}
    state = {"taid.t": state["taid.t"] | {"t": jnp.float32(0.7)}}
    got = run(objective, source, batch, state=state)
    want = run(build_objective({"taid": Term(taid, target="signals/topk", kwargs={"t": 0.7})}), source, batch)
    assert rel(got[3], want[3]) < 1e-6
    after = objective.update(state, got[1], 0)
    assert np.isclose(after["taid.t"]["previous"], got[0], rtol=1e-5)
    with pytest.raises(ValueError, match="no state for controller"):
        objective.dynamic(0, {})


def test_names_and_errors(source):
    objective = build_objective({"a": Term(reverse_kl, target="teacher/main"), "b": Term(forward_kl,
                                                                                         target="signals/topk")})
    assert objective.sources == ("student/main", "teacher/main") and objective.signals == ("topk",)
    batch = make_batch()
    with pytest.raises(ValueError, match="needs hidden states of \\['teacher/main'\\]"):
        objective.loss({"student/main": source}, batch, Weights({}, {}))
    with pytest.raises(ValueError, match="needs signal 'topk'"):
        objective.weights(dataclasses.replace(batch, signals={}), 0)
    for bad in (lambda: Term(cross_entropy, per="row"), lambda: Term(cross_entropy, on=()),
                lambda: Term(cross_entropy, student="student"), lambda: build_objective({}),
                lambda: build_objective({"own": Term(cross_entropy)}),
                lambda: build_objective({"x": Term(forward_kl, student="student/a", target="teacher/b")}),
                lambda: build_objective({"x": Term(forward_kl, student="student/a", target="signals/topk")})):
        with pytest.raises(ValueError, match=r"Term\.|term"):
            bad()
