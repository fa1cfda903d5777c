"""Row losses lifted to hidden states without ever holding logits of all tokens. The only place that shifts.

`lift_sum` is for losses that add over tokens: gradients are made in the forward pass, and the backward only scales
them. `lift_tokens` returns differentiable log-probabilities and entropies per token, recomputed in the backward, for
losses that are not additive (sequence ratios, preferences). `lift_values` only evaluates row losses, token by token.
DESIGN section 5; the loop is `objective.chunks`.

Shapes: B rows, T tokens, D width, V vocabulary.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jax.sharding import Mesh

from distill_jax.core.batch import HiddenStates, Signal
from distill_jax.core.head import Head
from distill_jax.losses.rows.logprob import entropy, log_prob
from distill_jax.losses.tokens.inputs import Tokens
from distill_jax.objective.chunks import run
from distill_jax.objective.memory import CHUNK, Loop
from distill_jax.objective.reduce import RoleSums, by_role
from distill_jax.objective.rows import Fields, Grads, Result, RowTerm, Wanted

Array = Any
Sources = Mapping[str, tuple[Array, Head]]


def lift_sum(sources: Sources, terms: Mapping[str, RowTerm], weights: Mapping[str, Array], *, tokens: Array,
             signals: Mapping[str, Signal | Tokens] | None = None, trainable: tuple[str, ...] | None = None,
             roles: Array | None = None, masks: Mapping[str, Array] | None = None,
             mesh: Mesh | None = None, chunk: int = CHUNK, loop: Loop = "auto"
             ) -> tuple[Array, dict[str, RoleSums]]:
    """sum over terms and tokens of weights[term] * loss, and what each term was per role.

    sources    {name: (hidden [B,T,D], Head)}; hidden[:, t] has seen token t, and predicts token t+1. A signal of
               hidden states is one too: {"signals/<name>": (`HiddenStates`, the teacher's Head)}
    terms      {name: RowTerm}
    weights    {term: f32 [B,T]}, aligned with tokens; mask x schedule x token weight / global count, already
    tokens     int32 [B,T]
    signals    {name: Signal} aligned with tokens; a `Tokens` (what is known about each) becomes a `Known` target
    trainable  sources that may receive gradients, None = all. Of these only what is really being differentiated is
               computed, so a frozen head (LoRA) or teacher costs nothing
    roles      int32 [B,T] for the metrics; None = everything counts as role 0
    masks      {term: f32 [B,T]} weights of the metrics; None = 1 where the term's weight is not 0
    mesh       devices to share the work over; None = wherever the arrays are
    chunk      tokens per device whose logits exist at a time
    loop       over tokens, or over the vocabulary: less memory, more time (`memory.Loop`)

    Returns (total f32, {term: RoleSums}); the metrics carry no gradient. Give the head in its parameters' dtype
    (float32): the products run in the hidden states' dtype, the head's gradient is accumulated and returned in full.
    Raises ValueError for an unknown source, target or signal, weights of another shape, a loop that a loss cannot use.
    """
    signals = signals or {}
    trainable = tuple(s for s in sources if not s.startswith("signals/")) if trainable is None else trainable
    sources = {s: (_predicting(x, sources), head) for s, (x, head) in sources.items()}
    _check(sources, terms, weights, tokens, signals)
    stop = jax.lax.stop_gradient
    sources = {s: x if s in trainable else stop(x) for s, x in sources.items()}
    weights = {t: stop(weights[t]) for t in terms}
    masks = {t: stop(masks[t] if masks else (weights[t] != 0).astype(jnp.float32)) for t in terms}
    used = {t.target.removeprefix("signals/") for t in terms.values() if t.target.startswith("signals/")}
    active = jnp.zeros(tokens.shape, bool)
    for name in terms:
        active |= (weights[name] != 0) | (masks[name] != 0)
    fields = shift(Fields(tokens, weights, active, {s: stop(signals[s]) for s in used
                                                     if f"signals/{s}" not in sources}))
    dynamic = {name: {k: stop(v) for k, v in t.dynamic.items()} for name, t in terms.items()}
    total, values = _lifted(terms, {s: _dtypes(x) for s, x in sources.items()}, mesh, chunk,
                            loop)(sources, fields, dynamic)
    roles = jnp.zeros(tokens.shape, jnp.int32) if roles is None else roles
    return total, {t: by_role(unshift(stop(v)), masks[t], roles) for t, v in values.items()}


def lift_values(sources: Sources, terms: Mapping[str, RowTerm], *, tokens: Array, active: Array,
                signals: Mapping[str, Signal] | None = None, mesh: Mesh | None = None, chunk: int = CHUNK
                ) -> dict[str, Array]:
    """What every term is at every token, {term: f32 [B,T]}: no gradient. Aligned with tokens; 0 where `active` [B,T]
    is False, and at t = 0. Other arguments and errors as of `lift_sum`."""
    signals = signals or {}
    sources = jax.lax.stop_gradient({s: (_predicting(x, sources), head) for s, (x, head) in sources.items()})
    none = dict.fromkeys(terms, jnp.zeros(tokens.shape, jnp.float32))
    _check(sources, terms, none, tokens, signals)
    used = {t.target.removeprefix("signals/") for t in terms.values() if t.target.startswith("signals/")}
    fields = shift(Fields(tokens, none, active, {s: signals[s] for s in used if f"signals/{s}" not in sources}))
    hiddens, heads = {s: x[0] for s, x in sources.items()}, {s: x[1] for s, x in sources.items()}
    return {t: unshift(v) for t, v in run(terms, hiddens, heads, fields, {}, mesh=mesh, chunk=chunk).values.items()}


def lift_tokens(hidden: Array, head: Head, tokens: Array, *, mask: Array | None = None, mesh: Mesh | None = None,
                chunk: int = CHUNK) -> tuple[Array, Array]:
    """Log-probability of each token and entropy of the distribution it was drawn from, differentiable.

    hidden [B,T,D], tokens int32 [B,T] -> (logprobs f32 [B,T], entropies f32 [B,T]), aligned with tokens: index t
    describes token t. 0 at t = 0 (nothing predicts it) and where `mask` [B,T] is False or 0; those cost nothing.
    """
    active = jnp.ones(tokens.shape, bool) if mask is None else jnp.asarray(mask, bool)
    values = _token_values(_dtypes((hidden, head)), mesh, chunk)((hidden, head), tokens, active)
    return values["logprob"], values["entropy"]


def _lifted(terms: Mapping[str, RowTerm], dtypes: Any, mesh: Mesh | None, chunk: int, loop: Loop) -> Any:
    """custom_vjp (sources, fields, dynamic) -> (total, values): gradients in the forward, scaled in the backward."""
    read = {t.source for t in terms.values()}

    def evaluate(sources: Any, fields: Fields, dynamic: Any, wanted: Mapping[str, Wanted]) -> Result:
        bound = {name: replace(t, dynamic=dynamic[name]) for name, t in terms.items()}
        hiddens, heads = {s: x[0] for s, x in sources.items()}, {s: x[1] for s, x in sources.items()}
        return run(bound, hiddens, heads, fields, wanted, mesh=mesh, chunk=chunk, loop=loop)

    @jax.custom_vjp
    def lifted(sources: Any, fields: Fields, dynamic: Any) -> tuple[Array, dict[str, Array]]:
        out = evaluate(sources, fields, dynamic, {})
        return out.total, out.values

    def forward(sources: Any, fields: Any, dynamic: Any) -> Any:
        wanted = {s: w for s, x in sources.items() if (w := _wanted(x)) and s in read}
        sources, fields, dynamic = _primals((sources, fields, dynamic))
        out = evaluate(sources, fields, dynamic, wanted)
        grads = {s: _as_source(out.grads[s], head) if s in wanted else None for s, (_, head) in sources.items()}
        return (out.total, out.values), grads

    def backward(grads: Any, cotangents: Any) -> Any:
        scale = cotangents[0]
        if isinstance(scale, SymbolicZero):
            return None, None, None
        times = lambda g, dtype: None if g is None else (g.astype(scale.dtype) * scale).astype(dtype)
        return _map(times, grads, dtypes), None, None

    lifted.defvjp(forward, backward, symbolic_zeros=True)
    return lifted


def _token_values(dtypes: Any, mesh: Mesh | None, chunk: int) -> Any:
    """custom_vjp (source, tokens, active) -> {logprob, entropy} [B,T], recomputed in the backward."""
    losses = {"logprob": log_prob, "entropy": entropy}

    def evaluate(source: Any, tokens: Array, active: Array, weights: dict[str, Array], wanted: Wanted) -> Result:
        fields = shift(Fields(tokens, weights, active, {}))
        return run({n: RowTerm(loss=losses[n], source="it") for n in weights}, {"it": source[0]}, {"it": source[1]},
                   fields, {"it": wanted} if wanted else {}, mesh=mesh, chunk=chunk)

    @jax.custom_vjp
    def values(source: Any, tokens: Array, active: Array) -> dict[str, Array]:
        none = jnp.zeros(tokens.shape, jnp.float32)
        out = evaluate(source, tokens, active, dict.fromkeys(losses, none), Wanted())
        return {n: unshift(v) for n, v in out.values.items()}

    def forward(source: Any, tokens: Any, active: Any) -> Any:
        wanted = _wanted(source)
        args = _primals((source, tokens, active))
        return values(*args), (args, wanted)

    def backward(saved: Any, cotangents: dict[str, Any]) -> Any:
        (source, tokens, active), wanted = saved
        # The gradient of sum(cotangent * value) is what lift_sum's forward makes.
        asked = {n: c for n, c in cotangents.items() if not isinstance(c, SymbolicZero)}
        weights = {n: jnp.where(active, c, jnp.zeros_like(c)) for n, c in asked.items()}
        moved = jnp.zeros(tokens.shape, bool)
        for weight in weights.values():
            moved |= weight != 0
        if not (wanted and weights):
            return None, None, None
        out = evaluate(source, tokens, moved, weights, wanted)
        cast = lambda g, dtype: None if g is None else g.astype(dtype)
        return _map(cast, {"it": _as_source(out.grads["it"], source[1])}, {"it": dtypes})["it"], None, None

    values.defvjp(forward, backward, symbolic_zeros=True)
    return values


def _wanted(source: Any) -> Wanted:
    """Which leaves of a (hidden, Head) of `CustomVJPPrimal`s are being differentiated."""
    hidden, head = source
    return Wanted(hidden.perturbed, head.kernel.perturbed, head.bias is not None and head.bias.perturbed)


def _primals(tree: Any) -> Any:
    return jax.tree.map(lambda p: p.value, tree, is_leaf=lambda x: hasattr(x, "perturbed"))


def _as_source(grads: Grads, head: Head) -> tuple[Array | None, Head]:
    """Gradients in the structure of a source; None where not wanted."""
    return grads.hidden, replace(head, kernel=grads.kernel, bias=grads.bias)


def _dtypes(source: tuple[Array, Head]) -> tuple[Any, Any, Any]:
    hidden, head = source
    return hidden.dtype, head.kernel.dtype, None if head.bias is None else head.bias.dtype


def _map(fn: Any, grads: dict[str, Any], dtypes: Mapping[str, tuple[Any, Any, Any]]) -> dict[str, Any]:
    """fn(gradient, dtype of its primal) over {source: (hidden, Head) or None}; None is a zero cotangent."""
    out: dict[str, Any] = {}
    for name, source in grads.items():
        if source is None:
            out[name] = None
            continue
        (hidden, head), (d_hidden, d_kernel, d_bias) = source, dtypes[name]
        out[name] = fn(hidden, d_hidden), replace(head, kernel=fn(head.kernel, d_kernel), bias=fn(head.bias, d_bias))
    return out


def shift(fields: Any) -> Any:
    """Fields [B,T,...] of token t+1 at index t, beside the state that predicts it; zero at the last index."""
    left = lambda x: jnp.concatenate([x[:, 1:], jnp.zeros_like(x[:, :1])], axis=1)
    return jax.tree.map(lambda x: left(jnp.asarray(x)), fields)


def _predicting(hidden: Any, sources: Mapping[str, Any]) -> Array:
    """Stored states as a model's are: at the place of the token before the one they predict, in the dtype that the
    other sources compute in."""
    if not isinstance(hidden, HiddenStates):
        return hidden
    dtype = next(x.dtype for x, _ in sources.values() if not isinstance(x, HiddenStates))
    states, scales = (shift(x) for x in (hidden.states, hidden.scales))
    return jnp.where(scales[..., None] > 0, states.astype(jnp.float32) * scales[..., None], 0.0).astype(dtype)


def unshift(values: Array) -> Array:
    """Values [B,T] at the states back at the tokens these predict; zero at the first."""
    return jnp.concatenate([jnp.zeros_like(values[:, :1]), values[:, :-1]], axis=1)


def _check(sources: Sources, terms: Mapping[str, RowTerm], weights: Mapping[str, Array], tokens: Array,
           signals: Mapping[str, Signal | Tokens]) -> None:
    for name, term in terms.items():
        if term.source not in sources:
            raise ValueError(f"term {name!r} reads source {term.source!r}; given: {sorted(sources)}")
        known = {"tokens", *sources, *(f"signals/{s}" for s in signals)}
        if term.target not in known:
            raise ValueError(f"term {name!r} has target {term.target!r}; available: {sorted(known)}")
        if isinstance(signals.get(term.target.removeprefix("signals/")), HiddenStates) and term.target not in sources:
            raise ValueError(f"term {name!r}: {term.target!r} are hidden states; give the teacher's head with them, "
                             f"sources[{term.target!r}] = (HiddenStates, Head)")
        if name not in weights:
            raise ValueError(f"no weights for term {name!r}; given: {sorted(weights)}")
        if weights[name].shape != tokens.shape:
            raise ValueError(f"weights[{name!r}] is {weights[name].shape}, tokens are {tokens.shape}")
    for name, (hidden, head) in sources.items():
        if hidden.shape[:2] != tokens.shape or hidden.shape[-1] != head.kernel.shape[-1]:
            raise ValueError(f"source {name!r}: hidden {hidden.shape} and head {head.kernel.shape} do not fit tokens "
                             f"{tokens.shape}; expected [B,T,D] and [V,D]")
