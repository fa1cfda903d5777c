"""lift_sum and lift_tokens equal the dense loss: value, hidden gradient, head gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distill_jax.core.batch import HiddenStates
from distill_jax.core.tree import cast
from distill_jax.losses.rows.cross_entropy import cross_entropy
from distill_jax.losses.rows.divergences import forward_kl, generalized_jsd, reverse_kl
from distill_jax.losses.rows.logprob import entropy
from distill_jax.losses.rows.taid import taid
from distill_jax.objective.chunks import RowTerm
from distill_jax.objective.lift import lift_sum, lift_tokens
from tests.objective.dense import arrays, big_arrays, dense_total, random_head, random_token_signal, random_topk, rel

B, T, D, V = 3, 13, 8, 37


@pytest.fixture(scope="module")
def case():
    rng = np.random.default_rng(0)
    hidden = lambda d: jnp.asarray(rng.normal(size=(B, T, d)), jnp.float32)
    sources = {
        "student/main": (hidden(D), random_head(rng, V, D, with_bias=True, scale=0.7, soft_cap=5.0, real=V - 3)),
        "peer/main": (hidden(4), random_head(rng, V, 4)),
        "teacher/main": (hidden(6), random_head(rng, V + 5, 6, real=V - 3)),
    }
    terms = {
        "ce": RowTerm(loss=cross_entropy),
        "kd": RowTerm(loss=forward_kl, target="signals/topk"),
        "token": RowTerm(loss=reverse_kl, target="signals/token"),
        "online": RowTerm(loss=generalized_jsd, target="teacher/main", kwargs={"beta": 0.3}),
        "mutual": RowTerm(loss=forward_kl, source="peer/main", target="student/main", kwargs={"temperature": 2.0}),
        "taid": RowTerm(loss=taid, target="signals/topk", dynamic={"t": jnp.float32(0.4)}),
        "entropy": RowTerm(loss=entropy, source="peer/main"),
    }
    tokens = jnp.asarray(rng.integers(0, V - 3, (B, T)), jnp.int32)
    weights = {n: jnp.asarray(rng.random((B, T)) * (rng.random((B, T)) < 0.6), jnp.float32) for n in terms}
    signals = {"topk": random_topk(rng, (B, T), V - 3, 5), "token": random_token_signal(rng, (B, T))}
    return sources, terms, weights, tokens, signals


def value_and_grads(fn, sources):
    return jax.jit(jax.value_and_grad(fn))(sources)


@pytest.mark.parametrize("chunk", [8, 16, 512])
def test_equals_dense(case, chunk):
    sources, terms, weights, tokens, signals = case
    want = value_and_grads(lambda s: dense_total(s, terms, weights, tokens=tokens, signals=signals), sources)
    got = value_and_grads(lambda s: lift_sum(s, terms, weights, tokens=tokens, signals=signals, chunk=chunk)[0],
                          sources)
    assert rel(got[0], want[0]) < 1e-5
    for path, leaf in jax.tree_util.tree_leaves_with_path(want[1]):
        other = dict(jax.tree_util.tree_leaves_with_path(got[1]))[path]
        if path[0].key == "teacher/main":
            assert not np.any(other) and not np.any(leaf), "a teacher gets no gradient"
        else:
            assert np.linalg.norm(leaf) > 1e-3 and rel(other, leaf) < 1e-5, path


def test_float64_is_kept(case):
    """Under x64 the lifted loss is exact enough to compare devices and packings to 1e-11."""
    with jax.enable_x64(True):
        sources, terms, weights, tokens, signals = case
        sources = cast(sources, jnp.float64)
        kw = {"tokens": tokens, "signals": signals}
        terms = {n: terms[n] for n in ("ce", "kd", "online", "taid")}
        dense = jax.jit(jax.value_and_grad(lambda s: dense_total(s, terms, weights, **kw)))(sources)
        lifted = jax.jit(jax.value_and_grad(lambda s: lift_sum(s, terms, weights, chunk=8, **kw)[0]))(sources)
        for a, b in zip(jax.tree.leaves(lifted), jax.tree.leaves(dense), strict=True):
            assert a.dtype == jnp.float64 and rel(a, b) < 1e-11


def test_no_array_of_all_logits(case):
    """In neither entry, with and without gradients, is there an array of B*T*V or more elements."""
    sources, terms, weights, tokens, signals = case
    total = lambda s: lift_sum(s, terms, weights, tokens=tokens, signals=signals, chunk=8)[0]
    per_token = lambda x: sum(jnp.sum(v) for v in lift_tokens(*x, tokens, chunk=8))
    student = sources["student/main"]
    for fn, arg in ((total, sources), (jax.grad(total), sources),
                    (per_token, student), (jax.grad(per_token), student)):
        assert not big_arrays(fn, arg, size=B * T * V)
        assert big_arrays(fn, arg, size=8 * V), "the walk must reach the chunk's logits"
    naive = lambda s: dense_total(s, terms, weights, tokens=tokens, signals=signals)
    assert big_arrays(jax.grad(naive), sources, size=B * (T - 1) * V)


def test_value_alone_makes_no_gradient(case):
    """Evaluation must not pay for the head's gradient: no array of V*D float32 is made."""
    sources, terms, weights, tokens, signals = case
    total = lambda s: lift_sum(s, terms, weights, tokens=tokens, signals=signals, chunk=8)[0]
    products = lambda fn: sum(name == "dot_general" for name, _ in arrays(jax.make_jaxpr(fn)(sources).jaxpr))
    assert products(total) == 3 * products(lambda s: s["peer/main"][1].project(s["peer/main"][0][0]))
    assert products(jax.grad(total)) > products(total)


def test_only_what_is_differentiated_is_computed(case):
    """A frozen head (LoRA) drops one product, a frozen hidden state the other, `trainable=()` both."""
    sources, _, weights, tokens, _ = case
    hidden, head = sources["peer/main"]
    one = {"ce": RowTerm(loss=cross_entropy)}

    def products(fn, arg):
        return sum(name == "dot_general" for name, _ in arrays(jax.make_jaxpr(jax.grad(fn))(arg).jaxpr)) // 3

    def fn(hidden, head, **kw):
        return lift_sum({"student/main": (hidden, head)}, one, {"ce": weights["ce"]}, tokens=tokens, chunk=8, **kw)[0]

    assert products(lambda h: fn(h, head), hidden) == 2
    assert products(lambda k: fn(hidden, k), head) == 2
    assert products(lambda x: fn(*x), (hidden, head)) == 3
    assert products(lambda x: fn(*x, trainable=()), (hidden, head)) == 1
    whole = jax.jit(jax.grad(lambda x: fn(*x)))((hidden, head))
    assert rel(jax.jit(jax.grad(lambda h: fn(h, head)))(hidden), whole[0]) < 1e-6
    assert rel(jax.jit(jax.grad(lambda k: fn(hidden, k)))(head).kernel, whole[1].kernel) < 1e-6


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_lift_tokens_equals_dense(case, dtype):
    """A loss that is not additive over tokens: per-row sums through a nonlinearity, entropies, a mask."""
    sources, _, _, tokens, _ = case
    hidden, head = sources["student/main"]
    hidden = hidden.astype(dtype)
    mask = jnp.asarray(np.random.default_rng(5).random((B, T)) < 0.7)

    def score(logp, ent):
        return jnp.sum(jnp.tanh(jnp.sum(jnp.where(mask, logp, 0), 1)) + jnp.sum(jnp.where(mask, ent, 0), 1) ** 2)

    def dense(hidden, head):
        logits = head.logits(hidden)[:, :-1]
        logp = jax.nn.log_softmax(logits)
        pad = lambda x: jnp.pad(x, ((0, 0), (1, 0)))
        taken = jnp.take_along_axis(logp, tokens[:, 1:, None], -1)[..., 0]
        return score(pad(taken), pad(-jnp.sum(jnp.exp(logp) * logp, -1)))

    lifted = lambda hidden, head: score(*lift_tokens(hidden, head, tokens, mask=mask, chunk=8))
    want = jax.jit(jax.value_and_grad(dense, argnums=(0, 1)))(hidden, head)
    got = jax.jit(jax.value_and_grad(lifted, argnums=(0, 1)))(hidden, head)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert a.dtype == b.dtype and rel(a, b) < (1e-5 if dtype == jnp.float32 else 2e-2)
    assert not np.any(np.where(mask, 0, lift_tokens(hidden, head, tokens, mask=mask)[0]))


def test_bf16_products_and_float32_head_gradient(case):
    """Hidden states in bf16 with the parameters' float32 head: gradients come back in each one's own dtype."""
    sources, terms, weights, tokens, signals = case
    hidden, head = sources["student/main"]
    one = {n: terms[n] for n in ("ce", "kd")}

    def fn(dtype):
        f = lambda h, k: lift_sum({"student/main": (h, k)}, one, weights, tokens=tokens, signals=signals, chunk=8)[0]
        return jax.jit(jax.value_and_grad(f, argnums=(0, 1)))(hidden.astype(dtype), head)

    (low, (dh, dk)), (full, (fh, fk)) = fn(jnp.bfloat16), fn(jnp.float32)
    assert dh.dtype == jnp.bfloat16 and dk.kernel.dtype == jnp.float32
    assert rel(low, full) < 1e-2 and rel(dh, fh) < 2e-2 and rel(dk.kernel, fk.kernel) < 2e-2


def test_padding_rows_and_neighbours_do_not_matter(case):
    """Garbage in tokens that no term weighs, more padding, other rows: same value, same gradients."""
    sources, terms, weights, tokens, signals = case
    hidden, head = sources["student/main"]
    one = {n: terms[n] for n in ("ce", "kd")}
    weights = {n: w.at[:, 9:].set(0).at[2].set(0) for n, w in weights.items() if n in one}
    total = lambda x, w, tok, sig: lift_sum({"student/main": x}, one, w, tokens=tok, signals=sig, chunk=8)
    fn = jax.jit(jax.grad(total, has_aux=True))
    grads, metrics = fn((hidden, head), weights, tokens, signals)
    off = jnp.zeros((B, T), bool).at[:, 9:].set(True).at[2].set(True)
    noisy = jnp.where(jnp.roll(off, -1, axis=1).at[:, -1].set(True)[..., None], jnp.inf, hidden)
    junk = jax.tree.map(lambda x: jnp.where(off.reshape(B, T, *[1] * (x.ndim - 2)), jnp.full_like(x, 1), x), signals)
    again, same = fn((noisy, head), weights, jnp.where(off, 7, tokens), junk)
    longer = lambda x: jnp.concatenate([x, jnp.ones((B, 5, *x.shape[2:]), x.dtype)], axis=1)
    w5 = {n: jnp.pad(w, ((0, 0), (0, 5))) for n, w in weights.items()}
    more, _ = fn((longer(hidden), head), w5, longer(tokens), jax.tree.map(longer, signals))
    assert rel(again[1].kernel, grads[1].kernel) < 1e-6 and rel(more[1].kernel, grads[1].kernel) < 1e-6
    assert rel(again[0][:2, :8], grads[0][:2, :8]) < 1e-6 and rel(more[0][:, :T], grads[0]) < 1e-6
    assert rel(same["kd"].sum, metrics["kd"].sum) < 1e-6
    assert not np.any(again[0][2]) and not np.any(more[0][:, T:])


def test_nothing_to_do_is_zero(case):
    sources, terms, _, tokens, signals = case
    none = {n: jnp.zeros((B, T)) for n in terms}
    fn = lambda s: lift_sum(s, terms, none, tokens=tokens, signals=signals)
    (total, metrics), grads = jax.jit(jax.value_and_grad(fn, has_aux=True))(sources)
    assert total == 0 and not any(np.any(x) for x in jax.tree.leaves((grads, metrics)))


def test_weights_and_dynamic_values_are_constants(case):
    """Traced weights shape the gradient but receive none; neither does TAID's t."""
    sources, _, weights, tokens, signals = case

    def fn(scale, t):
        terms = {"taid": RowTerm(loss=taid, target="signals/topk", dynamic={"t": t})}
        return lift_sum(sources, terms, {"taid": scale * weights["taid"]}, tokens=tokens, signals=signals)[0]

    grad = jax.jit(jax.value_and_grad(fn, argnums=(0, 1)))
    (one, none), (two, _) = (grad(jnp.float32(s), jnp.float32(0.3)) for s in (1, 2))
    assert none == (0, 0) and rel(two, 2 * one) < 1e-6


def test_gradient_scales_with_the_cotangent(case):
    sources, terms, weights, tokens, _ = case
    hidden, head = sources["peer/main"]
    fn = lambda h: lift_sum({"peer/main": (h, head)}, {"x": terms["entropy"]}, {"x": weights["kd"]}, tokens=tokens)[0]
    value, one = jax.jit(jax.value_and_grad(fn))(hidden)
    other = jax.jit(jax.grad(lambda h: jnp.sin(fn(h))))(hidden)
    assert rel(other, jnp.cos(value) * one) < 1e-5


def test_errors_name_what_is_there(case):
    sources, _, _, tokens, signals = case
    w = {"x": jnp.zeros((B, T))}
    call = lambda term, weights=w: lift_sum(sources, {"x": term}, weights, tokens=tokens, signals=signals)
    for term, message in ((RowTerm(loss=forward_kl, source="pupil/main"), "student/main"),
                          (RowTerm(loss=forward_kl, target="signals/top"), "signals/topk"),
                          (RowTerm(loss=forward_kl), "distributions")):
        with pytest.raises(ValueError, match=message):
            call(term)
    with pytest.raises(ValueError, match=r"\(3, 12\)"):
        call(RowTerm(loss=cross_entropy), {"x": jnp.zeros((B, T - 1))})
    with pytest.raises(ValueError, match="no weights"):
        call(RowTerm(loss=cross_entropy), {})


@pytest.mark.parametrize("int8", [False, True])
def test_hidden_states_equal_a_teacher_beside_the_student(int8):
    """A signal of states, stored at the tokens they predict, gives what the teacher itself gives as a source."""
    rng = np.random.default_rng(5)
    hidden, head = jnp.asarray(rng.normal(size=(B, T, D)), jnp.float32), random_head(rng, V, D)
    raw = rng.integers(-127, 128, (B, T, 6)).astype(np.int8 if int8 else np.float32)
    scales = rng.random((B, T)).astype(np.float32) / 30
    teacher_head = random_head(rng, V + 3, 6, soft_cap=4.0, real=V - 2)
    weights = {"kd": jnp.asarray(rng.random((B, T)) * (rng.random((B, T)) < 0.7), jnp.float32)}
    tokens = jnp.asarray(rng.integers(0, V - 3, (B, T)), jnp.int32)
    after = lambda x: np.concatenate([np.zeros_like(x[:, :1]), x[:, :-1]], axis=1)  # at the token it predicts
    signal = HiddenStates(states=jnp.asarray(after(raw)), scales=jnp.asarray(after(scales)),
                          mask=jnp.ones((B, T), bool))

    def total(target, teacher):
        term = {"kd": RowTerm(loss=generalized_jsd, target=target, kwargs={"beta": 0.3})}
        return lambda s: lift_sum({"student/main": s, target: teacher}, term, weights, tokens=tokens,
                                  signals={"states": signal}, chunk=8)[0]

    states = jnp.asarray(raw.astype(np.float32) * scales[..., None])
    want = value_and_grads(total("teacher/main", (states, teacher_head)), (hidden, head))
    got = value_and_grads(total("signals/states", (signal, teacher_head)), (hidden, head))
    assert rel(got[0], want[0]) < 1e-5 and rel(got[1][0], want[1][0]) < 1e-5
    assert rel(got[1][1].kernel, want[1][1].kernel) < 1e-5 and np.linalg.norm(want[1][0]) > 1e-3
    with pytest.raises(ValueError, match="give the teacher's head"):
        term = {"kd": RowTerm(loss=forward_kl, target="signals/states")}
        lift_sum({"student/main": (hidden, head)}, term, weights, tokens=tokens, signals={"states": signal})
    with pytest.raises(ValueError, match="do not fit"):
        total("signals/states", (signal, random_head(rng, V, 5)))((hidden, head))
