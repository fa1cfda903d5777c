"""One training step: micro-batches, gradients, update, all in one jitted function with the state donated.

Shapes: B rows, T tokens, M micro-batches. Sums and counts are global everywhere: the weights of all tokens are
computed from the whole batch before the first micro-batch, so the gradient does not depend on how a batch is cut up.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from distill_jax.core import tree
from distill_jax.core.batch import Batch, TopK
from distill_jax.core.head import Head
from distill_jax.objective.term import Objective, Weights
from distill_jax.sharding import batch_spec
from distill_jax.train.flops import Flops
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
    micro_batches  M: the rows of a batch are cut into this many parts, run one after another
    mesh           devices; rows are cut over its `data` and `fsdp` axes
    flops          {provider: FLOPs counter} for the MFU; empty: not reported
    schedules      {provider: learning rate by update}, reported only (the optimiser has its own)
    """

    objective: Objective
    models: Mapping[str, Model]
    optimizers: Optimizers = field(default_factory=dict)
    micro_batches: int = 1
    mesh: Mesh
    flops: Mapping[str, Flops] = field(default_factory=dict)
    schedules: Mapping[str, Callable[[Array], Array]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        providers = {s.split("/")[0] for s in self.objective.sources}
        if missing := sorted((providers | set(self.optimizers)) - set(self.models)):
            raise ValueError(f"terms or optimisers name providers {missing}; there are {sorted(self.models)}")
        if self.micro_batches < 1:
            raise ValueError(f"micro_batches must be at least 1, got {self.micro_batches}")

    @property
    def lift_mesh(self) -> Mesh | None:
        """The objective shares its work over a mesh of several devices only: `shard_map` is not free."""
        return self.mesh if self.mesh.size > 1 else None


def make_step(config: StepConfig, like: TrainState) -> Callable[..., tuple[TrainState, Metrics]]:
    """jitted `step(state, frozen, batch, votes=None) -> (state, metrics)`. The state is donated; nothing waits.

    like     a state whose shardings the new state keeps
    frozen   {provider: params} of the providers that are not trained
    votes    int32 [devices]: what each process wants (`votes.Votes`); the largest comes back as metric "vote"
    metrics  "loss", "grad_norm", "ok" (False: not finite, nothing was changed), "lr" {provider: rate}, "terms" (the
             objective's sums), and what `batch_metrics` counts; replicated, still on the device
    """
    shardings = jax.tree.map(lambda x: x.sharding, like)
    gradient = make_gradient(config, shardings.params)

    def step(state: TrainState, frozen: Params, batch: Batch, votes: Array | None = None,
             ) -> tuple[TrainState, Metrics]:
        grads, metrics = gradient(state.params, frozen, batch, state.step, state.controllers)
        norm = tree.global_norm(grads)
        ok = jnp.isfinite(norm) & jnp.isfinite(metrics["loss"])
        params, opt_state = {}, {}
        for name, tx in config.optimizers.items():
            updates, opt_state[name] = tx.update(grads[name], state.opt_state[name], state.params[name])
            params[name] = optax.apply_updates(state.params[name], updates)
        controllers = {**state.controllers,  # beside the objective's: the mixture, which only the host changes
                       **config.objective.update(state.controllers, metrics["terms"], state.step)}
        keep = lambda new, old: jax.tree.map(lambda n, o: jnp.where(ok, n, o), new, old)
        new = TrainState(
            step=state.step + 1, params=keep(params, state.params), opt_state=keep(opt_state, state.opt_state),
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
        weights = config.objective.weights(batch, step, controllers)
        sources = _sources(config, {**frozen, **params}, batch)
        return config.objective.loss(sources, batch, weights, config.objective.dynamic(step, controllers),
                                     trainable=(), mesh=config.lift_mesh)[1]

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
        weights, dynamic = objective.weights(batch, step, controllers), objective.dynamic(step, controllers)

        def part(rows: Batch, of_rows: Weights) -> tuple[dict[str, Tree], tuple[Array, Tree]]:
            def loss(params: Params) -> tuple[Array, Tree]:
                sources = _sources(config, {**frozen, **params}, rows)
                trainable = tuple(s for s in sources if s.split("/")[0] in trained)
                return objective.loss(sources, rows, of_rows, dynamic, trainable=trainable, mesh=config.lift_mesh)

            aux, grads = jax.value_and_grad(loss, has_aux=True)(dict(params))
            return grads if shardings is None else jax.lax.with_sharding_constraint(grads, shardings), aux

        if config.micro_batches == 1:
            grads, (loss, terms) = part(batch, weights)
        else:
            cuts = split((batch, weights), config.micro_batches, config.mesh)
            shapes = jax.eval_shape(lambda c: part(*jax.tree.map(lambda x: x[0], c)), cuts)
            zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
            add = lambda total, cut: (jax.tree.map(jnp.add, total, part(*cut)), None)
            (grads, (loss, terms)), _ = jax.lax.scan(add, zeros, cuts)
        return grads, {"loss": loss, "terms": terms, **batch_metrics(config, batch, weights)}

    return gradient


def _sources(config: StepConfig, params: Params, batch: Batch) -> dict[str, tuple[Array, Head]]:
    """{"provider/view": (hidden [B,T,D], head)} of what the objective reads; frozen providers get no gradient."""
    out = {}
    for source in config.objective.sources:
        provider, view = source.split("/")
        model, stream = config.models[provider], batch.views[view]
        hidden = model.apply({"params": params[provider]}, stream.tokens, stream.positions, stream.segment_ids,
                             method="hidden").hidden
        out[source] = (hidden, model.head(params[provider]))
    return out


def split(batch: Tree, parts: int, mesh: Mesh) -> Tree:
    """Leaves [B, ...] -> [parts, B/parts, ...]; part m holds rows m, m + parts, ...

    Taken in turn, each device keeps its own rows: nothing is sent. Raises ValueError where rows do not divide.
    """
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    spec = NamedSharding(mesh, PartitionSpec(None, *batch_spec()))

    def one(x: Array) -> Array:
        if x.shape[0] % (parts * shards):
            raise ValueError(f"{x.shape[0]} rows cannot be cut into micro_batches={parts} over data x fsdp={shards} "
                             f"devices; make the batch a multiple of {parts * shards}")
        cut = jnp.moveaxis(x.reshape(x.shape[0] // parts, parts, *x.shape[1:]), 1, 0)
        return jax.lax.with_sharding_constraint(cut, spec)

    return jax.tree.map(one, batch)


def batch_metrics(config: StepConfig, batch: Batch, weights: Weights) -> Metrics:
    """Counts of a global batch: "tokens" (no padding), "supervised", "flops", "retained" {signal: (sum, count)}."""
    shape = batch.main.tokens.shape
    predicted = jnp.zeros(shape, bool)
    for mask in weights.masks.values():  # terms on other views have masks of other shapes
        predicted = predicted | (mask != 0) if mask.shape == shape else predicted
    out: Metrics = {"tokens": jnp.sum(batch.main.segment_ids != 0), "supervised": jnp.sum(predicted)}
    if config.flops:
        views = {s.split("/")[0]: batch.views[s.split("/")[1]] for s in config.objective.sources}
        out["flops"] = sum((f.count(views[p], predicted) for p, f in config.flops.items() if p in views),
                           jnp.float32(0))
    out["retained"] = {}
    for name, signal in batch.signals.items():
        if isinstance(signal, TopK):
            mask = signal.mask & predicted
            mass = jnp.sum(jnp.exp(signal.logprobs.astype(jnp.float32)), axis=-1)
            out["retained"][name] = (jnp.sum(jnp.where(mask, mass, 0.0)), jnp.sum(mask))
    return out


def _under(mesh: Mesh, fn: Callable[..., Any]) -> Callable[..., Any]:
    """Call `fn` with the mesh set, so that models can name layouts of activations; one device has no layout."""
    if mesh.size == 1:
        return fn

    def call(*args: Any) -> Any:
        with jax.set_mesh(mesh):
            return fn(*args)

    return call
