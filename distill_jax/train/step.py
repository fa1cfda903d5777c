"""One training step: micro-batches, gradients, update, all in one jitted function with the state donated.

Shapes: B rows, T tokens, M micro-batches. Sums and counts are global everywhere: the weights of all tokens are
computed from the whole batch before the first micro-batch, so the gradient does not depend on how a batch is cut up.
"""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from distill_jax.core import tree
from distill_jax.core.batch import Batch, Stream, TopK
from distill_jax.core.head import Head
from distill_jax.data.views import Derived, with_made
from distill_jax.models.projectors import ProjectorModel
from distill_jax.objective.term import Objective, Weights
from distill_jax.sharding import batch_spec, fit_spec, row_shards
from distill_jax.train.balance import balanced, load, real_tokens
from distill_jax.train.flops import Flops
from distill_jax.train.moments import select
from distill_jax.train.sources import Made, make_sources, needed_states, provider_of, stored_sources
from distill_jax.train.state import Optimizers, TrainState

Array = Any
Tree = Any
Params = Mapping[str, Tree]
Metrics = dict[str, Any]


class Model(Protocol):
    """What the step needs of a model (`models.Transformer`)."""

    def apply(self, variables: Any, *args: Any, method: Any = None, **kwargs: Any) -> Any: ...

    def head(self, params: Any) -> Head: ...


@dataclass(frozen=True, kw_only=True)
class StepConfig:
    """What a step is compiled for.

    models         {provider: model}; those with an optimiser are trained, the others stay as they are
    projectors     {provider: projector}: trained maps between the models' spaces, run after them
    views          further views (`data.views`), made of the whole batch before it is cut up
    micro_batches  M: the rows of a batch are cut into this many parts, run one after another
    mesh           devices; rows are cut over its `data` and `fsdp` axes
    flops          {provider: FLOPs counter} for the MFU; empty: not reported
    schedules      {provider: learning rate by update}, reported only (the optimiser has its own)
    """

    objective: Objective
    models: Mapping[str, Model]
    optimizers: Optimizers = field(default_factory=dict)
    projectors: Mapping[str, ProjectorModel] = field(default_factory=dict)
    views: Mapping[str, Callable[[Stream], Stream] | Derived] = field(default_factory=dict)
    micro_batches: int = 1
    mesh: Mesh
    flops: Mapping[str, Flops] = field(default_factory=dict)
    schedules: Mapping[str, Callable[[Array], Array]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        providers = {provider_of(s) for s in [*self.objective.sources, *self.runs]}
        if missing := sorted((providers | set(self.optimizers)) - set(self.models) - set(self.projectors)):
            raise ValueError(f"terms, projectors or optimisers name providers {missing}; there are "
                             f"{sorted([*self.models, *self.projectors])}")
        for source, layers in self.runs.items():
            check_layers(source, self.models.get(provider_of(source)), tuple(layers))
        if self.micro_batches < 1:
            raise ValueError(f"micro_batches must be at least 1, got {self.micro_batches}")

    @property
    def runs(self) -> dict[str, dict[Any, None]]:
        """{"<model>/<view>": layers} that are run for the objective, whether a term or a projector reads them."""
        return needed_states(self.objective.states, self.projectors)

    @property
    def lift_mesh(self) -> Mesh | None:
        """The objective shares its work over a mesh of several devices only: `shard_map` is not free."""
        return self.mesh if self.mesh.size > 1 else None


def make_step(config: StepConfig, like: TrainState) -> Callable[..., tuple[TrainState, Metrics]]:
    """jitted `step(state, frozen, batch, votes=None) -> (state, metrics)`. The state is donated; nothing waits.

    like     a state whose shardings the new state keeps
    frozen   {provider: params} of the providers that are not trained; {"signals/<name>": Head} of the teachers whose
             hidden states are a signal
    votes    int32 [devices]: what each process wants (`votes.Votes`); the largest comes back as metric "vote"
    metrics  "loss", "grad_norm", "ok" (False: not finite, nothing was changed), "lr" {provider: rate}, "terms" (the
             objective's sums), "experts" {"provider/view": {"balance", "load"}} (`balance`), and what
             `batch_metrics` counts; replicated, still on the device
    """
    shardings = jax.tree.map(lambda x: x.sharding, like)
    gradient = make_gradient(config, shardings.params)

    def step(state: TrainState, frozen: Params, batch: Batch, votes: Array | None = None,
             ) -> tuple[TrainState, Metrics]:
        grads, metrics = gradient(state.params, frozen, batch, state.step, state.controllers)
        with jax.named_scope("optimizer"):
            norm = tree.global_norm(grads)
            ok = jnp.isfinite(norm) & jnp.isfinite(metrics["loss"])
            params, opt_state = {}, {}
            for name, tx in config.optimizers.items():
                updates, opt_state[name] = tx.update(
                    grads[name], state.opt_state[name], state.params[name], ok=ok)
                params[name] = optax.apply_updates(state.params[name], updates)
        controllers = {**state.controllers,  # beside the objective's: a steered source's, changed by the host only
                       **config.objective.update(state.controllers, metrics["terms"], state.step)}
        keep = jax.named_scope("optimizer")(functools.partial(select, ok))
        new = TrainState(
            step=state.step + 1, params=keep(params, state.params), opt_state=opt_state,
            controllers=keep(controllers, state.controllers), rng=state.rng,
            skipped=state.skipped + jnp.where(ok, 0, 1))
        metrics |= {"grad_norm": norm, "ok": ok,
                    "lr": {name: rate(state.step - state.skipped) for name, rate in config.schedules.items()}}
        return new, metrics if votes is None else metrics | {"vote": jnp.max(votes)}

    everywhere = NamedSharding(config.mesh, PartitionSpec())
    return _under(config.mesh, jax.jit(step, donate_argnums=0, out_shardings=(shardings, everywhere)))


def make_evaluation(config: StepConfig) -> Callable[..., Tree]:
    """jitted `evaluate(params, frozen, batch, step, controllers) -> {term: RoleSums}` of one batch, no update."""

    def evaluate(params: Params, frozen: Params, batch: Batch, step: Array, controllers: dict[str, Tree]) -> Tree:
        batch = with_views(config, batch)
        weights = config.objective.weights(batch, step, controllers)
        made = _made(config, {**frozen, **params}, batch)
        return config.objective.loss(made.sources, batch, weights, config.objective.dynamic(step, controllers),
                                     layers=made.layers, trainable=(), mesh=config.lift_mesh)[1]

    return _under(config.mesh, jax.jit(evaluate, out_shardings=NamedSharding(config.mesh, PartitionSpec())))


def make_gradient(config: StepConfig, shardings: Tree = None) -> Callable[..., tuple[dict[str, Tree], Metrics]]:
    """`gradient(params, frozen, batch, step, controllers) -> (grads {provider: tree}, metrics)` of a global batch.

    shardings  of the trained parameters: gradients are kept like them, so that sums are as small as the parameters
    Gradients have the parameters' dtype (float32 masters): models cast to their compute dtype inside, and the sum
    over micro-batches is in full precision.
    """
    objective, trained = config.objective, tuple(config.optimizers)

    def gradient(params: Params, frozen: Params, batch: Batch, step: Array, controllers: dict[str, Tree],
                 ) -> tuple[dict[str, Tree], Metrics]:
        batch = with_views(config, batch)
        weights, dynamic = objective.weights(batch, step, controllers), objective.dynamic(step, controllers)
        totals = real_tokens(batch)

        def part(rows: Batch, of_rows: Weights) -> tuple[dict[str, Tree], tuple[Array, Tree, Tree]]:
            def loss(params: Params) -> tuple[Array, tuple[Tree, Tree]]:
                made = _made(config, {**frozen, **params}, rows)
                trainable = tuple(s for s in made.layers if provider_of(s) in trained)
                with jax.named_scope("loss"):
                    total, terms = objective.loss(made.sources, rows, of_rows, dynamic, layers=made.layers,
                                                  trainable=trainable, mesh=config.lift_mesh)
                even, routing = balanced(made.routing, config.models, trained, totals)
                return (total + even if routing else total), (terms, routing)

            (value, (terms, routing)), grads = jax.value_and_grad(loss, has_aux=True)(dict(params))
            aux = (value, terms, routing)
            return grads if shardings is None else jax.lax.with_sharding_constraint(grads, shardings), aux

        if config.micro_batches == 1:
            grads, (loss, terms, routing) = part(batch, weights)
        else:
            cuts = split((batch, weights), config.micro_batches, config.mesh)
            shapes = jax.eval_shape(lambda c: part(*jax.tree.map(lambda x: x[0], c)), cuts)
            zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
            add = lambda total, cut: (jax.tree.map(jnp.add, total, part(*cut)), None)
            (grads, (loss, terms, routing)), _ = jax.lax.scan(add, zeros, cuts)
        loads = {name: {"balance": r["balance"], "load": load(r["counts"])} for name, r in routing.items()}
        return grads, {"loss": loss, "terms": terms, "experts": loads, **batch_metrics(config, batch, weights)}

    return gradient


def _made(config: StepConfig, params: Params, batch: Batch) -> Made:
    """States of what the objective reads; frozen providers get no gradient."""
    made = make_sources(config.objective.states, config.models, config.projectors, params, batch)
    return made._replace(sources=made.sources | stored_sources(params, batch))


def with_views(config: StepConfig, batch: Batch) -> Batch:
    """The batch with the views that the stage makes of those it has."""
    return replace(batch, views=with_made(batch.views, config.views))


def check_layers(source: str, model: Any, layers: tuple[Any, ...]) -> None:
    """Raises ValueError where a layer map or projector names a layer that the model does not have."""
    total = getattr(getattr(model, "config", None), "num_layers", None)
    for layer in layers:
        if isinstance(layer, int) and total is not None and not -total <= layer < total:
            raise ValueError(f"layer {layer} of {source!r}: {provider_of(source)!r} has layers 0 to {total - 1} (or "
                             f"-{total} to -1), 'embedding' and 'final'; correct the term's or projector's layers")


def split(batch: Tree, parts: int, mesh: Mesh) -> Tree:
    """Leaves [B, ...] -> [parts, B/parts, ...]; part m holds rows m, m + parts, ...

    Taken in turn, each device keeps its own rows: nothing is sent. Raises ValueError where rows do not divide.
    """
    shards = row_shards(mesh)
    spec = PartitionSpec(None, *batch_spec(), "context")

    def one(x: Array) -> Array:
        if x.shape[0] % (parts * shards):
            raise ValueError(f"{x.shape[0]} rows cannot be cut into micro_batches={parts} over the {shards} parts that "
                             f"the mesh cuts rows into; make the batch a multiple of {parts * shards}")
        cut = jnp.moveaxis(x.reshape(x.shape[0] // parts, parts, *x.shape[1:]), 1, 0)
        return jax.lax.with_sharding_constraint(cut, NamedSharding(mesh, fit_spec(spec, cut.shape, mesh.shape)))

    return jax.tree.map(one, batch)


def batch_metrics(config: StepConfig, batch: Batch, weights: Weights) -> Metrics:
    """Counts of a global batch: "tokens" (no padding) and "supervised" of view `main`, "flops" of every run of a model,
    "retained" {signal: (sum, count)}."""
    asked = {view: jnp.zeros(stream.tokens.shape, bool) for view, stream in batch.views.items()}
    for name, mask in weights.masks.items():
        view = config.objective.terms[name].view
        asked[view] = asked[view] | (mask != 0)
    predicted = asked["main"]
    out: Metrics = {"tokens": jnp.sum(batch.main.segment_ids != 0), "supervised": jnp.sum(predicted)}
    if config.flops:
        runs = [(provider_of(s), s.split("/")[1]) for s in config.runs]
        out["flops"] = sum((config.flops[p].count(batch.views[v], asked[v]) for p, v in runs if p in config.flops),
                           jnp.float32(0))
    out["retained"] = {}
    for name, signal in batch.signals.items():
        if isinstance(signal, TopK):
            mask = signal.mask & predicted
            mass = jnp.sum(jnp.exp(signal.logprobs.astype(jnp.float32)), axis=-1)
            out["retained"][name] = (jnp.sum(jnp.where(mask, mass, 0.0)), jnp.sum(mask))
    return out


def lowerable(step: Callable[..., Any]) -> Any:
    """The jitted function of a step or evaluation: has `lower`, and wants the mesh set by its caller."""
    return step if hasattr(step, "lower") else getattr(step, "__wrapped__")  # noqa: B009


def _under(mesh: Mesh, fn: Callable[..., Any]) -> Callable[..., Any]:
    """Call `fn` with the mesh set, so that models can name layouts of activations; one device has no layout."""
    if mesh.size == 1:
        return fn

    @functools.wraps(fn)  # the jitted function stays reachable, for `lower`
    def call(*args: Any) -> Any:
        with jax.set_mesh(mesh):
            return fn(*args)

    return call
