"""The outer problem of TGeo-KD: fusion parameters w such that one more update with them lowers a held-out loss.

With L(theta, w) = sum_n c_n (CE_n + alpha_n(w) (KD_n - CE_n)), theta' = theta - eta grad_theta L and g the gradient of
the held-out cross-entropy at theta', the chain rule gives

    d L_val(theta') / dw = -eta d/dw <grad_theta L, g> = -eta sum_n c_n  d alpha_n / dw  D_n,
    D_n = d/de (KD_n - CE_n)(theta + e g)  at e = 0,

because the ratios carry no gradient to theta. D_n comes from a central difference (Liu et al. 2019, DARTS, eq. 8), in
float32; everything else is exact. Costs two gradients and three forward passes, each `FusionNet.every` updates.
Shapes: B rows, T tokens, P fusion parameters.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from distill_jax.core import tree
from distill_jax.losses.rows.cross_entropy import cross_entropy
from distill_jax.losses.rows.trilateral import FEATURES, Fused, ratio, side
from distill_jax.objective.chunks import RowTerm
from distill_jax.objective.controllers import FusionNet
from distill_jax.objective.lift import lift_values
from distill_jax.objective.term import Objective, Term, build_objective
from distill_jax.train.sources import make_sources, stored_sources
from distill_jax.train.step import StepConfig, make_gradient, split, with_views

Array = Any
Tree = Any
Outer = Callable[..., dict[str, Tree]]
STRIDE = 0.01
"""Length of the step of the central difference, in parameters."""


def fused_term(objective: Objective) -> tuple[str, Term, FusionNet] | None:
    """(name, term, its network) of the term whose fusion is learned; None where there is none.

    Raises ValueError for a `FusionNet` that no `Fused` term has, and for several different ones.
    """
    nets = {k: c for k, c in objective.controllers().items() if isinstance(c, FusionNet)}
    if not nets:
        return None
    found = [(n, t) for n, t in objective.terms.items() if isinstance(t, Term) and isinstance(t.loss, Fused)
             and f"{n}.fusion" in nets]
    if len(found) != 1 or len(set(nets.values())) != 1:
        raise ValueError(f"a FusionNet is learned for exactly one term of loss Fused(...), and is the same wherever it "
                         f"is used; got it at {sorted(nets)}, Fused terms {[n for n, _ in found]}")
    name, term = found[0]
    return name, term, nets[f"{name}.fusion"]


def make_outer(config: StepConfig) -> Outer:
    """jitted `outer(params, frozen, inner, heldout, step, controllers) -> controllers`: one update of the network.

    inner, heldout  global batches: of the training rows, and of rows that are never trained on
    Raises ValueError where no term has a `FusionNet` (see `fused_term`).
    """
    found = fused_term(config.objective)
    if found is None:
        raise ValueError("no term of the objective has a FusionNet")
    name, term, net = found
    inner_gradient = make_gradient(config)
    outside = build_objective({"ce": Term(loss=cross_entropy, student=term.student, on=term.on)})
    outer_gradient = make_gradient(replace(config, objective=outside))
    clone = lambda m: getattr(m, "clone", lambda **_: m)
    exact = {n: clone(m)(dtype=jnp.float32) for n, m in config.models.items()}

    def outer(params: Any, frozen: Any, inner: Any, heldout: Any, step: Array, controllers: dict[str, Tree]) -> Any:
        grads, _ = inner_gradient(params, frozen, inner, step, controllers)
        ahead = _along(params, grads, -net.inner_lr)
        tangent, _ = outer_gradient(ahead, frozen, heldout, step, {})
        norm = tree.global_norm(tangent)
        stride = STRIDE / jnp.maximum(norm, 1e-12)
        batch = with_views(config, inner)
        weights = config.objective.weights(batch, step, controllers).weights[name]
        states = [params, _along(params, tangent, stride), _along(params, tangent, -stride)]
        w = controllers[f"{name}.fusion"]["w"]

        def part(rows: Any, of_rows: Array) -> Array:
            here, plus, minus = (_values(config, exact, term, {**frozen, **p}, rows, of_rows != 0) for p in states)
            gap = lambda v: v["kd"] - v["ce"]
            slope = (gap(plus) - gap(minus)) / (2 * stride)
            features = jnp.stack([here[f] for f in FEATURES], axis=-1)
            flat = lambda x: x.reshape(-1, *x.shape[2:])
            f = lambda w: -net.inner_lr * jnp.sum(flat(of_rows * slope) * ratio(w, flat(features)))
            return jax.grad(f)(w)

        if config.micro_batches == 1:
            grad = part(batch, weights)
        else:
            cuts = split((batch, weights), config.micro_batches, config.mesh)
            grad = jax.lax.scan(lambda total, cut: (total + part(*cut), None), jnp.zeros_like(w), cuts)[0]
        moved = net.moved(controllers[f"{name}.fusion"], grad)
        same = [k for k, c in config.objective.controllers().items() if c == net]
        return {**controllers, **dict.fromkeys(same, moved)}

    jitted = jax.jit(outer, out_shardings=NamedSharding(config.mesh, PartitionSpec()))

    def call(*args: Any) -> Any:
        with jax.set_mesh(config.mesh):
            return jitted(*args)

    return jitted if config.mesh.size == 1 else call


def _along(params: Mapping[str, Tree], direction: Mapping[str, Tree], factor: Any) -> dict[str, Tree]:
    return {n: jax.tree.map(lambda p, d: p + factor * d, params[n], direction[n]) for n in direction}


def _values(config: StepConfig, models: Mapping[str, Any], term: Term, params: Mapping[str, Tree], batch: Any,
            active: Array) -> dict[str, Array]:
    """{"kd", "ce", and the features: f32 [B,T]} of a `Fused` term."""
    assert isinstance(term.loss, Fused)
    made = make_sources(config.objective.states, models, config.projectors, params, batch)
    sources = made.sources | stored_sources(params, batch)
    kd = RowTerm(loss=term.loss.kd, source=term.student, target=term.target)
    rows = {"kd": kd, "ce": RowTerm(loss=cross_entropy, source=term.student)}
    rows |= {f: replace(kd, loss=side, kwargs={"index": i}) for i, f in enumerate(FEATURES)}
    needed = {s: x for s, x in sources.items() if s in (term.student, term.target)}
    return lift_values(needed, rows, tokens=batch.views[term.view].tokens, active=active, signals=batch.signals,
                       mesh=config.lift_mesh)
