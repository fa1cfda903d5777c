"""Token terms: dense logits, how a batch may be cut, references, what is counted, what gets a gradient. No models."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from distill_jax.core import spec
from distill_jax.core.batch import TokenLogprob
from distill_jax.core.roles import ANSWER, THINK
from distill_jax.core.schedules import Linear
from distill_jax.losses.rows.cross_entropy import cross_entropy
from distill_jax.losses.tokens.aggregate import ConstantLength, MeanOver
from distill_jax.losses.tokens.inputs import Tokens
from distill_jax.losses.tokens.measures import mean_ratio
from distill_jax.losses.tokens.policy import cispo, gspo, ppo_clip, reinforce
from distill_jax.losses.tokens.preference import dpo, kto, odds_ratio
from distill_jax.losses.tokens.ratios import Corrected
from distill_jax.losses.tokens.regularizers import kl, negative_entropy, negative_log_likelihood
from distill_jax.objective.reduce import means
from distill_jax.objective.term import Term, build_objective
from distill_jax.objective.tokens import TokenTerm, policy_metrics
from tests.objective.dense import big_arrays, random_head, rel
from tests.train.tiny import VOCAB, Synthetic, pack

B, T, D = 8, 24, 6
GSPO = {"low": 0.2, "high": 0.2}
POLICY = {
    "ppo": TokenTerm(ppo_clip, kwargs={"high": 0.28}),
    "gspo": TokenTerm(gspo, per="sequence", weight=Linear(start=0.0, stop=2.0, steps=2), kwargs=GSPO),
    "dr": TokenTerm(Corrected(loss=ppo_clip, cap=1.5), per=ConstantLength(length=16), on=(THINK,)),
    "chunks": TokenTerm(cispo, per=MeanOver(field="trace_ids")),
    "kl": TokenTerm(kl, target="reference/main", weight=0.1),
    "entropy": TokenTerm(negative_entropy, weight=Linear(start=0.0, stop=0.4, steps=2)),
}
PREFERENCE = {
    "dpo": TokenTerm(dpo, target="reference/main", per="sequence", where="pair_ids", on=(THINK, ANSWER)),
    "or": TokenTerm(odds_ratio, per="sequence", where="pair_ids", weight=0.3),
    "nll": TokenTerm(negative_log_likelihood, where="chosen"),
    "kto": TokenTerm(kto, target="signals/token", per="sequence", kwargs={"z0": 0.1, "beta": 0.5}),
}
BOTH = POLICY | PREFERENCE


def documents():
    """Rows of documents; in each row, neighbours are pairs and an odd last one is alone."""
    return Synthetic().documents(0)


def with_fields(batch, rows):
    """Fields that are functions of the document and the place in it, so that they move with it."""
    base = {name: np.zeros(batch.main.tokens.shape, np.float32) for name in
            ("behaviour_logprobs", "old_logprobs", "advantages", "chosen", "reference")}
    ids = {name: np.zeros(batch.main.tokens.shape, np.int32) for name in ("pair_ids", "trace_ids")}
    number = {tuple(d): i for i, d in enumerate(d for row in documents() for d in row)}
    for b, row in enumerate(rows):
        at = 0
        for i, doc in enumerate(row):
            rng, span = np.random.default_rng(number[tuple(doc)]), slice(at, at + len(doc))
            for name in ("behaviour_logprobs", "old_logprobs", "reference"):
                base[name][b, span] = -3.5 + 0.6 * rng.normal(size=len(doc))
            base["advantages"][b, span] = rng.normal()
            base["chosen"][b, span] = 1 - i % 2
            ids["pair_ids"][b, span] = i // 2 + 1 if i // 2 * 2 + 1 < len(row) else 0
            ids["trace_ids"][b, span] = number[tuple(doc)] // 3 + 1  # three documents are chunks of a trace
            at += len(doc)
    reference = base.pop("reference")
    return dataclasses.replace(
        batch, views={"main": dataclasses.replace(batch.main, fields=base | ids)},
        signals=batch.signals | {"token": TokenLogprob(logprobs=reference, mask=batch.main.weights > 0)})


def batch_of(rows=None, width=T):
    rows = rows or documents()
    return with_fields(pack(rows, width), rows)


def states(batch):
    """-> (states of student and reference, which are functions of token and position; heads)."""
    rng = np.random.default_rng(0)
    table = rng.normal(size=(2, VOCAB, T, D)).astype(np.float32)
    tokens, positions = np.asarray(batch.main.tokens), np.asarray(batch.main.positions)
    return jnp.asarray(table[0][tokens, positions]), jnp.asarray(table[1][tokens, positions]), (
        random_head(rng, VOCAB, D), random_head(rng, VOCAB, D))


def evaluate(terms, batch=None, mesh=None, parts=1, jit=True, trainable=("student/main",)):
    """(total, metrics, gradients of the student's states, of its head, of the reference's states)."""
    objective, batch = build_objective(terms), batch or batch_of()
    student, reference, heads = states(batch)
    weights = objective.weights(batch, 1)

    def fn(student, head, reference, other, batch, weights):
        sources = {"student/main": (student, head), "reference/main": (reference, other)}
        return objective.loss(sources, batch, weights, objective.dynamic(1), trainable=trainable, mesh=mesh)

    step = jax.jit(jax.value_and_grad(fn, argnums=(0, 1, 2), has_aux=True))
    put = (lambda x: x) if mesh is None else lambda x: jax.device_put(x, NamedSharding(mesh, P(("data", "fsdp"))))
    out, rows = [], batch.main.tokens.shape[0] // parts
    for i in range(parts):
        cut = lambda tree, i=i: jax.tree.map(lambda x: put(x[i * rows:(i + 1) * rows]), tree)
        out.append(step(cut(student), heads[0], cut(reference), heads[1], cut(batch), cut(weights)))
    (value, metrics), (_, head, _) = jax.tree.map(lambda *x: sum(x), *out) if parts > 1 else out[0]
    return (float(value), metrics, jnp.concatenate([o[1][0] for o in out]), head.kernel,
            jnp.concatenate([o[1][2] for o in out]))


@pytest.fixture(scope="module")
def whole():
    return evaluate(BOTH)


def test_value_and_gradients_equal_dense_logits(whole):
    objective, batch = build_objective(BOTH), batch_of()
    student, reference, heads = states(batch)
    weights, stream = objective.weights(batch, 1), batch.main

    def logs(hidden, head):
        log = jax.nn.log_softmax(head.logits(hidden)[:, :-1])
        entropy = -jnp.sum(jnp.exp(log) * log, axis=-1)
        right = lambda x: jnp.concatenate([jnp.zeros_like(x[:, :1]), x], axis=1)
        return right(jnp.take_along_axis(log, jnp.asarray(stream.tokens)[:, 1:, None], -1)[..., 0]), right(entropy)

    def total(student, head):
        out = 0.0
        for name, term in BOTH.items():
            given = {"reference/main": lambda: logs(reference, heads[1])[0],
                     "signals/token": lambda: batch.signals["token"].logprobs, "tokens": lambda: None}[term.target]()
            lp, h = logs(student, head)
            tokens = Tokens(logprobs=lp, entropies=h, mask=weights.masks[name] != 0, fields=stream.fields,
                            segment_ids=stream.segment_ids, reference=given)
            out += jnp.sum(weights.weights[name] * term.loss(tokens, **term.kwargs))
        return out

    value, grads = jax.jit(jax.value_and_grad(total, argnums=(0, 1)))(student, heads[0])
    assert np.isclose(whole[0], value, rtol=1e-5)
    assert rel(whole[2], grads[0]) < 1e-5 and rel(whole[3], grads[1].kernel) < 1e-5
    assert np.linalg.norm(whole[2]) > 1e-2


@pytest.mark.parametrize("cut", [{"parts": 4}, {"mesh": (2, 1, 2)}])
def test_micro_batches_and_devices_change_nothing(whole, cut):
    if shape := cut.get("mesh"):
        cut = {"mesh": jax.make_mesh(shape, ("data", "fsdp", "tensor"), devices=jax.devices()[:int(np.prod(shape))],
                                     axis_types=(AxisType.Auto,) * 3)}
    value, metrics, hidden, head, _ = evaluate(BOTH, **cut)
    assert np.isclose(value, whole[0], rtol=1e-5) and rel(hidden, whole[2]) < 1e-5 and rel(head, whole[3]) < 1e-5
    for name in BOTH:
        np.testing.assert_allclose(metrics[name].sum, whole[1][name].sum, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(metrics[name].count, whole[1][name].count, rtol=1e-5)


def test_packing_changes_nothing(whole):
    """Every pair, and every document without one, in a row of its own."""
    rows = [row[i:i + 2] for row in documents() for i in range(0, len(row), 2)]
    value, metrics, hidden, head, _ = evaluate(BOTH, batch=batch_of(rows))
    assert np.isclose(value, whole[0], rtol=1e-5) and rel(head, whole[3]) < 1e-5
    assert np.isclose(np.linalg.norm(hidden), np.linalg.norm(whole[2]), rtol=1e-5)
    for name in BOTH:
        np.testing.assert_allclose(means(metrics)[name], means(whole[1])[name], rtol=1e-4)


LOCAL = {name: POLICY[name] for name in ("ppo", "dr", "chunks", "kl", "entropy")}


def head_products(fn, *args):
    """How many matrix products with a side of the vocabulary's size are in a program."""
    def count(jaxpr):
        n = 0
        for eqn in jaxpr.eqns:
            shapes = [getattr(v.aval, "shape", ()) for v in [*eqn.invars, *eqn.outvars]]
            n += eqn.primitive.name == "dot_general" and any(VOCAB in s for s in shapes)
            for param in eqn.params.values():
                for sub in jax.tree.leaves(param, is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")):
                    sub = getattr(sub, "jaxpr", sub)
                    n += count(sub) if hasattr(sub, "eqns") else 0
        return n

    return count(jax.make_jaxpr(fn)(*args).jaxpr)


def test_local_losses_have_their_gradient_made_in_the_forward():
    """Beside a loss of whole sequences (of weight 0) the same terms take the other way: same values and gradients, one
    product of the head's size more."""
    other = LOCAL | {"watch": TokenTerm(mean_ratio, weight=0.0, kwargs={"level": "sequence"})}
    fast, slow = evaluate(LOCAL), evaluate(other)
    assert np.isclose(fast[0], slow[0], rtol=1e-5) and np.linalg.norm(fast[2]) > 1e-2
    assert rel(fast[2], slow[2]) < 1e-5 and rel(fast[3], slow[3]) < 1e-5 and not np.any(fast[4])
    for name in LOCAL:
        np.testing.assert_allclose(fast[1][name].sum, slow[1][name].sum, rtol=1e-4, atol=1e-5)
    batch = batch_of()
    student, _, heads = states(batch)

    def products(terms):
        objective = build_objective(terms)
        weights = objective.weights(batch, 1)
        fn = lambda x, h: objective.loss({"student/main": (x, h)}, batch, weights, objective.dynamic(1))[0]
        return head_products(jax.grad(fn, argnums=(0, 1)), student, heads[0])

    assert products({"ppo": LOCAL["ppo"], "entropy": LOCAL["entropy"]}) == 3
    assert products({"ppo": LOCAL["ppo"], "sft": Term(cross_entropy, where="chosen")}) == 3, "they share the logits"
    assert products({"gspo": POLICY["gspo"], "entropy": LOCAL["entropy"]}) == 4


@pytest.mark.parametrize("cut", [{"parts": 4}, {"mesh": (2, 1, 2)}])
def test_local_losses_too_do_not_depend_on_micro_batches_and_devices(cut):
    whole = evaluate(LOCAL)
    if shape := cut.get("mesh"):
        cut = {"mesh": jax.make_mesh(shape, ("data", "fsdp", "tensor"), devices=jax.devices()[:int(np.prod(shape))],
                                     axis_types=(AxisType.Auto,) * 3)}
    value, _, hidden, head, _ = evaluate(LOCAL, **cut)
    assert np.isclose(value, whole[0], rtol=1e-5) and rel(hidden, whole[2]) < 1e-5 and rel(head, whole[3]) < 1e-5


def test_references_get_no_gradient_and_what_is_not_trained_gets_none(whole):
    assert not np.any(whole[4])
    value, _, hidden, head, _ = evaluate(BOTH, trainable=())
    assert np.isclose(value, whole[0], rtol=1e-5) and not np.any(hidden) and not np.any(head)


def test_first_on_policy_update_is_reinforce():
    """GRPO, CISPO and GSPO of one update a rollout: the gradient of -A log pi, the clip touches nothing."""
    batch = batch_of()
    settings = {"old": "current"}
    watch = policy_metrics(**settings)
    want = evaluate({"r": TokenTerm(reinforce, per="sequence")}, batch)
    got = evaluate({"p": TokenTerm(ppo_clip, per="sequence", kwargs=settings)} | watch, batch)
    assert rel(got[2], want[2]) < 1e-6 and rel(got[3], want[3]) < 1e-6 and np.linalg.norm(want[2]) > 1e-2
    seen = means(got[1])
    assert seen["clip_fraction"] == 0 and seen["mean_ratio"] == 1
    assert seen["mean_entropy/think"] > 0 and seen["logprob_gap"] > 0.1, "the gap is to the sampler, whatever `old` is"
    for loss in (cispo, gspo):
        other = evaluate({"p": TokenTerm(loss, per="sequence", kwargs=settings)}, batch)
        assert rel(other[2], want[2]) < 1e-5


def test_where_and_per_say_what_is_counted():
    batch = batch_of()
    objective = build_objective({
        "nll": TokenTerm(negative_log_likelihood, where="chosen"), "ce": Term(cross_entropy, where="chosen"),
        "chunks": TokenTerm(reinforce, per=MeanOver(field="trace_ids"))})
    weights = objective.weights(batch, 0)
    fields, supervised = batch.main.fields, (batch.main.weights > 0) & np.isin(batch.main.roles, [THINK, ANSWER])
    np.testing.assert_array_equal(weights.masks["nll"], supervised & (fields["chosen"] > 0))
    assert np.isclose(weights.weights["nll"].sum(), 1.0)
    np.testing.assert_array_equal(weights.weights["ce"], weights.weights["nll"])
    traces = np.unique(fields["trace_ids"][supervised])
    for trace in traces:
        here = supervised & (fields["trace_ids"] == trace)
        np.testing.assert_allclose(np.asarray(weights.weights["chunks"])[here], 1 / len(traces) / here.sum(), rtol=1e-5)
    student, _, heads = states(batch)
    _, metrics = jax.jit(lambda: objective.loss({"student/main": (student, heads[0])}, batch, weights))()
    np.testing.assert_allclose(metrics["nll"].sum, metrics["ce"].sum, rtol=1e-5)


def test_no_array_of_all_logits():
    objective, batch = build_objective(BOTH), batch_of()
    student, reference, heads = states(batch)
    weights = objective.weights(batch, 1)
    fn = jax.grad(lambda s: objective.loss({"student/main": (s, heads[0]), "reference/main": (reference, heads[1])},
                                           batch, weights, objective.dynamic(1), chunk=16)[0])
    assert not big_arrays(fn, student, size=B * T * VOCAB // 4)
    assert big_arrays(fn, student, size=16 * VOCAB), "the walk must reach the chunks"


def test_nothing_to_learn_from_is_zero_not_nan():
    batch = batch_of()
    empty = dataclasses.replace(batch, views={"main": dataclasses.replace(batch.main, weights=batch.main.weights * 0)})
    value, metrics, hidden, head, _ = evaluate(BOTH, empty)
    assert value == 0 and not np.any(hidden) and not np.any(head)
    assert all(v == 0 for v in means(metrics).values())


def test_terms_are_written_to_yaml_and_read_back():
    for term in [*BOTH.values(), *policy_metrics().values()]:
        assert spec.load(spec.dump(term), "term") == term


def test_errors():
    batch = batch_of()
    for bad in (lambda: TokenTerm(ppo_clip, per="row"), lambda: TokenTerm(ppo_clip, on=()),
                lambda: TokenTerm(ppo_clip, student="student"), lambda: TokenTerm(ppo_clip, target="reference"),
                lambda: build_objective({"x": TokenTerm(kl, target="reference/other")})):
        with pytest.raises(ValueError, match=r"TokenTerm\.|term 'x'"):
            bad()
    for term, message in ((TokenTerm(ppo_clip, where="correct"), "taken where the field 'correct'"),
                          (TokenTerm(kl, target="signals/none"), "needs signal 'none'"),
                          (TokenTerm(ppo_clip, per=MeanOver(field="group_ids")), "needs the field 'group_ids'")):
        with pytest.raises(ValueError, match=message):
            build_objective({"x": term}).weights(batch, 0)
    bare = dataclasses.replace(batch, views={"main": dataclasses.replace(batch.main, fields={})})
    for terms, given, message in (({"x": TokenTerm(ppo_clip)}, bare, "needs the field 'behaviour_logprobs'"),
                                  ({"x": TokenTerm(kl, target="signals/topk")}, batch, "is a TopK"),
                                  ({"x": TokenTerm(kl)}, batch, "give the term a target")):
        with pytest.raises(ValueError, match=message):
            evaluate(terms, given)
