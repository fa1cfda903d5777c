"""A head cut over `tensor`, and the loop over the vocabulary: equal to one device and whole logits."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distill_jax.core.batch import HiddenStates
from distill_jax.core.tree import cast
from distill_jax.losses.rows.adaptive import adaptive_kl
from distill_jax.losses.rows.alpha_beta import alpha_beta
from distill_jax.losses.rows.cross_entropy import cross_entropy
from distill_jax.losses.rows.divergences import (
    forward_kl,
    generalized_jsd,
    reverse_kl,
    skew_forward_kl,
    skew_reverse_kl,
    total_variation,
)
from distill_jax.losses.rows.logprob import entropy
from distill_jax.losses.rows.plackett_luce import plackett_luce
from distill_jax.losses.rows.selective import Selective, uncertain
from distill_jax.losses.rows.taid import taid
from distill_jax.losses.rows.truncated import truncated_kl
from distill_jax.losses.rows.uld import uld
from distill_jax.losses.targets import Full, Known, Labels, SampledTarget, TopKTarget
from distill_jax.losses.tokens.inputs import Tokens
from distill_jax.losses.tokens.policy import reinforce
from distill_jax.objective import chunks
from distill_jax.objective.lift import lift_sum, lift_tokens
from distill_jax.objective.rows import RowTerm
from distill_jax.objective.tokens import _OnLogits
from tests.objective.dense import (
    arrays,
    big_arrays,
    dense_total,
    random_head,
    random_sampled,
    random_token_signal,
    random_topk,
    rel,
)
from tests.objective.test_lift_mesh import collectives, mesh_of

B, T, D, V = 4, 16, 8, 40
REAL = 37

OUTCOMES = {  # what a short row of logits is enough for
    "ce": RowTerm(loss=cross_entropy),
    "fkl": RowTerm(loss=forward_kl, target="signals/topk"),
    "rkl": RowTerm(loss=reverse_kl, target="signals/topk"),
    "jsd": RowTerm(loss=generalized_jsd, target="signals/other", kwargs={"beta": 0.3}),
    "token": RowTerm(loss=reverse_kl, target="signals/token"),
    "sampled": RowTerm(loss=forward_kl, target="signals/sampled"),
    "skew": RowTerm(loss=skew_forward_kl, target="signals/topk"),
    "taid": RowTerm(loss=taid, target="signals/topk", dynamic={"t": jnp.float32(0.4)}),
    "rank": RowTerm(loss=plackett_luce, target="signals/topk"),
    "adaptive": RowTerm(loss=adaptive_kl, target="signals/topk"),
    "truncated": RowTerm(loss=truncated_kl, target="signals/topk"),
}
WHOLE = {  # what needs every id
    "live": RowTerm(loss=forward_kl, target="teacher/main", kwargs={"temperature": 2.0}),
    "hidden": RowTerm(loss=reverse_kl, target="signals/hidden"),
    "jsd_live": RowTerm(loss=generalized_jsd, target="teacher/main", kwargs={"beta": 0.3}),
    "skew_live": RowTerm(loss=skew_reverse_kl, target="teacher/main"),
    "tv": RowTerm(loss=total_variation, target="teacher/main"),
    "ab": RowTerm(loss=alpha_beta, target="teacher/main"),
    "taid_live": RowTerm(loss=taid, target="teacher/main", dynamic={"t": jnp.float32(0.4)}),
    "ce_live": RowTerm(loss=cross_entropy, target="teacher/main"),
    "mutual": RowTerm(loss=forward_kl, source="peer/main", target="student/main"),
    "entropy": RowTerm(loss=entropy),
    "selective": RowTerm(loss=Selective(loss=forward_kl), target="teacher/main", dynamic={"threshold": jnp.float32(2)}),
    "share": RowTerm(loss=uncertain, dynamic={"threshold": jnp.float32(2)}),
    "tempered": RowTerm(loss=forward_kl, target="signals/topk", kwargs={"temperature": 2.0, "temper": "student"}),
    "even": RowTerm(loss=forward_kl, target="signals/topk", kwargs={"temperature": 2.0, "temper": "even"}),
}
GATHERED = {"uld": RowTerm(loss=uld, target="signals/topk"), "rank_live": RowTerm(loss=plackett_luce,
                                                                                  target="teacher/main")}


def make(terms, vocab=V, b=B, t=T, seed=0):
    """(sources, weights, tokens, signals): padded heads with bias, scale and soft cap; ids that no head has."""
    rng = np.random.default_rng(seed)
    states = lambda d: jnp.asarray(rng.normal(size=(b, t, d)), jnp.float32)
    real = vocab - 3
    sources = {
        "student/main": (states(D), random_head(rng, vocab, D, with_bias=True, scale=0.7, soft_cap=5.0, real=real)),
        "peer/main": (states(4), random_head(rng, vocab, 4)),
        "teacher/main": (states(6), random_head(rng, vocab, 6, real=real)),
        "signals/hidden": (HiddenStates(states=states(6), scales=jnp.ones((b, t)), mask=jnp.ones((b, t), bool)),
                           random_head(rng, vocab, 6, real=real)),
    }
    used = {x for t in terms.values() for x in (t.source, t.target)}
    topk = random_topk(rng, (b, t), vocab, 5)  # may keep ids that the student's head masks
    topk = dataclasses.replace(topk, ids=topk.ids.at[0, 3, 0].set(2**20))
    signals = {"topk": topk, "other": random_topk(rng, (b, t), real, 6), "token": random_token_signal(rng, (b, t)),
               "sampled": random_sampled(rng, (b, t), real, 6)}
    weights = {n: jnp.asarray(rng.random((b, t)) * (rng.random((b, t)) < 0.7), jnp.float32) for n in terms}
    tokens = jnp.asarray(rng.integers(0, real, (b, t)), jnp.int32)
    return {s: x for s, x in sources.items() if s in used}, weights, tokens, signals


def step(terms, mesh=None, **kw):
    def fn(trained, frozen, weights, tokens, signals):
        return lift_sum(trained | frozen, terms, weights, tokens=tokens, signals=signals, mesh=mesh, chunk=8, **kw)

    gradient = jax.jit(jax.value_and_grad(fn, has_aux=True))
    return lambda sources, *rest: gradient({s: x for s, x in sources.items() if "signals" not in s},
                                           {s: x for s, x in sources.items() if "signals" in s}, *rest)


def assert_same(got, want, tolerance=1e-6):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for (path, b), a in zip(jax.tree_util.tree_leaves_with_path(want), jax.tree.leaves(got), strict=True):
        assert rel(a, b) < tolerance, (path, rel(a, b))


@pytest.fixture
def seen(monkeypatch):
    """What the lift decided: [(how the vocabulary was cut, loop)]."""
    found = []
    local = chunks._Local
    monkeypatch.setattr(chunks, "_Local", lambda *a: (found.append(a[-2:]), local(*a))[1])
    return found


@pytest.mark.parametrize(("shape", "names"), [
    ((2, 4), ("fsdp", "tensor")), pytest.param((2, 2, 2), ("data", "context", "tensor"), marks=pytest.mark.slow),
    pytest.param((8,), ("tensor",), marks=pytest.mark.slow)])
def test_a_cut_head_equals_one_device(shape, names, seen):
    """Values by role and every gradient, for all losses that can be had from cut logits, at once."""
    terms = OUTCOMES | WHOLE
    case = make(terms)
    want, got = step(terms)(*case), step(terms, mesh_of(shape, names))(*case)
    assert [part and part.parts for part, _ in seen] == [None, dict(zip(names, shape))["tensor"]]
    assert np.linalg.norm(want[1]["student/main"][1].kernel) > 1e-2
    assert np.linalg.norm(want[1]["student/main"][1].bias) > 1e-2
    assert_same(got, want)


def test_a_cut_head_in_float64():
    terms = {n: (OUTCOMES | WHOLE)[n] for n in ("ce", "fkl", "live", "jsd_live", "taid_live", "selective")}
    with jax.enable_x64(True):
        sources, *rest = make(terms)
        case = cast(sources, jnp.float64), *rest
        (total, _), grads = step(terms, mesh_of((2, 4), ("data", "tensor")))(*case)
        (want, _), of_one = step(terms)(*case)
        assert_same((total, grads), (want, of_one), 1e-11)


@pytest.mark.parametrize(("terms", "vocab"), [(GATHERED | {"ce": OUTCOMES["ce"]}, V), ({"ce": OUTCOMES["ce"]}, 41)])
def test_what_needs_whole_rows_gathers_the_head(terms, vocab, seen):
    """A loss that sorts all ids, a vocabulary that does not divide: chosen for the call, the same numbers."""
    case = make(terms, vocab)
    assert_same(step(terms, mesh_of((4, 2), ("data", "tensor")))(*case), step(terms)(*case))
    assert seen == [(None, "tokens")] * 2


def test_an_undeclared_loss_is_never_given_cut_logits(seen):
    terms = {"mine": RowTerm(loss=lambda logits, target: jnp.max(logits, axis=-1) + jnp.sum(logits**2, axis=-1))}
    case = make(terms)
    case = ({"student/main": (case[0]["student/main"][0], dataclasses.replace(case[0]["student/main"][1], real=None))},
            *case[1:])
    assert_same(step(terms, mesh_of((4, 2), ("data", "tensor")))(*case), step(terms)(*case))
    assert seen[-1][0] is None


def test_lift_tokens_and_local_token_losses_with_a_cut_head(seen):
    (hidden, head) = make(OUTCOMES)[0]["student/main"]
    rng = np.random.default_rng(5)
    tokens, mask = jnp.asarray(rng.integers(0, REAL, (B, T)), jnp.int32), jnp.asarray(rng.random((B, T)) < 0.7)
    weights = jnp.asarray(rng.exponential(size=(B, T)), jnp.float32)
    known = Tokens(logprobs=None, entropies=None, mask=mask, segment_ids=None,
                   fields={"behaviour_logprobs": -jnp.ones((B, T)), "advantages": weights})
    term = {"pg": RowTerm(loss=_OnLogits(reinforce), target="signals/about/pg")}

    def fn(source, mesh):
        logp, ent = lift_tokens(*source, tokens, mask=mask, mesh=mesh, chunk=8)
        policy = lift_sum({"student/main": source}, term, {"pg": mask.astype(jnp.float32)}, tokens=tokens,
                          signals={"about/pg": known}, mesh=mesh, chunk=8)
        return jnp.sum(weights * jnp.exp(logp) * ent) + policy[0]

    mesh = mesh_of((4, 2), ("data", "tensor"))
    want, got = (jax.jit(jax.value_and_grad(lambda s, m=m: fn(s, m)))((hidden, head)) for m in (None, mesh))
    assert_same(got, want)
    assert {part and part.parts for part, _ in seen} == {None, 2}


def test_collectives_of_a_cut_head():
    """Inside the loop numbers per token and the hidden gradient of a chunk, outside nothing that gathers the head."""
    terms = {n: (OUTCOMES | WHOLE)[n] for n in ("ce", "fkl", "live")}
    vocab, chunk, k = 320, 8 * 2, 5
    mesh = mesh_of((4, 2), ("data", "tensor"))
    sources, *rest = make(terms, vocab, b=8)
    put = lambda x, *spec: jax.device_put(x, jax.NamedSharding(mesh, jax.P(*spec)))
    sources = {s: (put(x, "data"), dataclasses.replace(h, kernel=put(h.kernel, "tensor")))
               for s, (x, h) in sources.items()}

    def fn(sources, weights, tokens, signals):
        return lift_sum(sources, terms, weights, tokens=tokens, signals=signals, mesh=mesh, chunk=8)

    hlo = jax.jit(jax.grad(fn, has_aux=True)).lower(sources, *rest).compile().as_text()
    inside, outside = (collectives(hlo, inside_loops=x) for x in (True, False))
    assert inside and set(inside) <= {chunk, 2 * chunk * k, chunk * D}, inside
    assert inside.count(chunk * D) == 1, "the hidden gradient, once a chunk"
    assert max(outside) == vocab // 2 * D, "this device's rows of the head's gradient, summed over data"
    assert sum(n >= vocab // 2 * D for n in outside) == 1, outside


@pytest.mark.parametrize("vocab", [41, pytest.param(V, marks=pytest.mark.slow)])
def test_the_loop_over_the_vocabulary_equals_the_one_over_tokens(vocab, seen):
    """For every loss that it is for; 41 ids do not divide into blocks, so the last one overlaps its neighbour."""
    case = make(OUTCOMES, vocab)
    assert_same(step(OUTCOMES, loop="vocabulary")(*case), step(OUTCOMES, loop="tokens")(*case))
    assert [loop for _, loop in seen] == ["vocabulary", "tokens"]


def test_the_loop_over_the_vocabulary_equals_dense_logits():
    """Against another implementation altogether, in float64."""
    with jax.enable_x64(True):
        sources, weights, tokens, signals = make(OUTCOMES)
        sources = cast(sources, jnp.float64)
        dense = jax.jit(jax.value_and_grad(lambda s: dense_total(s, OUTCOMES, weights, tokens=tokens, signals=signals)))
        (total, _), grads = step(OUTCOMES, loop="vocabulary")(sources, weights, tokens, signals)
        assert_same((total, grads), dense(sources), 1e-11)


@pytest.mark.parametrize(("shape", "names"), [
    ((2, 2, 2), ("data", "fsdp", "tensor")), pytest.param((2, 4), ("data", "fsdp"), marks=pytest.mark.slow)])
def test_the_loop_over_the_vocabulary_on_a_mesh(shape, names, seen, monkeypatch):
    """With the head cut over tensor, and its width gathered block by block; several groups of tokens."""
    terms = {n: OUTCOMES[n] for n in ("ce", "fkl", "sampled")}
    monkeypatch.setattr(chunks, "GROUP", 8)
    case = make(terms, b=8)
    assert_same(step(terms, mesh_of(shape, names), loop="vocabulary")(*case), step(terms)(*case))
    assert seen[0][1] == "vocabulary" and (seen[0][0] is not None) == ("tensor" in names)


def test_the_head_is_never_whole_in_the_loop_over_the_vocabulary():
    """Gathered and scattered over fsdp by blocks: no collective of V*D, no copy of the head in bfloat16."""
    mesh, terms, vocab = mesh_of((2, 4), ("data", "fsdp")), {"ce": OUTCOMES["ce"]}, 640
    sources, *rest = make(terms, vocab, b=8)
    hidden, head = sources["student/main"]
    kernel = jax.device_put(head.kernel, jax.NamedSharding(mesh, jax.P(None, "fsdp")))
    sources = {"student/main": (hidden.astype(jnp.bfloat16), dataclasses.replace(head, kernel=kernel))}

    def fn(sources, weights, tokens, signals, loop):
        return lift_sum(sources, terms, weights, tokens=tokens, signals=signals, mesh=mesh, chunk=4, loop=loop)[0]

    hlo = {loop: jax.jit(jax.grad(fn), static_argnums=4).lower(sources, *rest, loop).compile().as_text()
           for loop in ("tokens", "vocabulary")}
    assert max(collectives(hlo["vocabulary"], inside_loops=True)) <= vocab // 2 * D
    assert max(collectives(hlo["vocabulary"], inside_loops=False)) == vocab * D // 4, "summed over data: its share"
    assert max(collectives(hlo["tokens"], inside_loops=False)) == vocab * D
    assert f"bf16[{vocab},{D}]" in hlo["tokens"] and f"bf16[{vocab},{D}]" not in hlo["vocabulary"]


def test_without_gradient_the_vocabulary_is_read_once():
    terms = {"ce": OUTCOMES["ce"]}
    sources, weights, tokens, signals = make(terms)

    def fn(sources):
        return lift_sum(sources, terms, weights, tokens=tokens, signals=signals, chunk=8, loop="vocabulary")[0]

    products = lambda f: sum(n == "dot_general" for n, _ in arrays(jax.make_jaxpr(f)(sources).jaxpr)) // 3
    assert (products(fn), products(jax.grad(fn))) == (1, 4)
    assert not big_arrays(fn, sources, size=B * T * V)
    np.testing.assert_allclose(jax.jit(fn)(sources), step(terms)(sources, weights, tokens, signals)[0][0], rtol=1e-6)


def test_which_loop_is_chosen(monkeypatch, seen):
    """By memory where it may choose; never for what needs all ids."""
    case = make(OUTCOMES | WHOLE, vocab=40 * V)
    of = lambda terms, **kw: jax.eval_shape(lambda: step(terms, **kw)(*case))
    few = {n: OUTCOMES[n] for n in ("ce", "fkl")}
    of(few)
    monkeypatch.setattr(chunks, "BUDGET", 1000)
    of(few)
    of(few | {"entropy": WHOLE["entropy"]})
    assert [loop for _, loop in seen] == ["tokens", "vocabulary", "tokens"]
    with pytest.raises(ValueError, match=r"terms \['tempered'\] read the whole distribution: use 'auto'"):
        of(few | {"tempered": WHOLE["tempered"]}, loop="vocabulary")
    with pytest.raises(ValueError, match=r"one of .*'vocabulary'.*, got 'blocks'"):
        of(few, loop="blocks")


def test_kinds_are_those_of_the_targets():
    """`kind_of` and `target_of` must not drift apart: the one decides, the other is what losses get."""
    from distill_jax.objective.rows import Fields, kind_of, target_of

    _, _, tokens, signals = make(OUTCOMES)
    known = Tokens(logprobs=None, entropies=None, mask=tokens > 0, segment_ids=None, fields={})
    fields = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), Fields(tokens, {}, tokens > 0, signals | {"k": known}))
    wanted = {"tokens": Labels, "teacher/main": Full, "signals/topk": TopKTarget, "signals/token": TopKTarget,
              "signals/sampled": SampledTarget, "signals/k": Known}
    for name, kind in wanted.items():
        made = target_of(name, {"teacher/main": jnp.zeros((B * T, V))}, fields, jnp.float32)
        assert type(made) is kind is kind_of(name, {"teacher/main": 0}, fields)
