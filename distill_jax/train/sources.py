"""From parameters and a batch to what the objective reads: every provider is run once, projectors after models."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax

from distill_jax.core.batch import Batch
from distill_jax.core.head import Head
from distill_jax.models.lora import joined
from distill_jax.models.moe import Routing
from distill_jax.models.projectors import Found, ProjectorModel, Written, constant

Array = Any
Tree = Any
States = dict[str, dict[Any, None]]


class Made(NamedTuple):
    """sources {"provider/view": (final states [B,T,D], head)}; layers {"provider/view": {layer: [B,T,D]}};
    routing {"provider/view": statistics of its routers} of the models with experts."""

    sources: dict[str, tuple[Array, Head]]
    layers: dict[str, dict[Any, Array]]
    routing: dict[str, Routing]


def provider_of(source: str) -> str:
    """"student" of "student/main", "cma" of "cma.t2s/main"."""
    return source.split("/")[0].split(".")[0]


def needed_states(asked: Mapping[str, tuple[Any, ...]], projectors: Mapping[str, ProjectorModel]) -> States:
    """{"provider/view": layers} that models must make: what is asked of them, and what projectors in use read."""
    out: States = {}
    for source, layers in asked.items():
        projector = projectors.get(provider_of(source))
        for name, layer in ((source, x) for x in layers) if projector is None else projector.reads:
            out.setdefault(name, {})[layer] = None
    return out


def make_sources(asked: Mapping[str, tuple[Any, ...]], models: Mapping[str, Any],
                 projectors: Mapping[str, ProjectorModel], params: Mapping[str, Tree], batch: Batch) -> Made:
    """Run what `asked` ({"provider/view": layers}) needs. Raises ValueError for views and fields that do not exist."""
    made, params = Made({}, {}, {}), joined(params)
    for source, layers in needed_states(asked, projectors).items():
        provider, view = source.split("/")
        if view not in batch.views:
            raise ValueError(f"{source!r} needs view {view!r}; the batch has {sorted(batch.views)}. Add it to "
                             "Stage.views")
        with jax.named_scope(provider):
            _run(made, source, models[provider], params[provider], batch.views[view], tuple(layers))
    found = Found(state=lambda source, layer: made.layers[source][layer], views=batch.views,
                  head=lambda name: constant(models[name].head(params[name])))
    for name in dict.fromkeys(map(provider_of, asked)):
        if name in projectors:
            with jax.named_scope(name):
                written = {name + where: w for where, w in projectors[name].write(params[name], found).items()}
            _take(made, written)
    if unknown := sorted(set(asked) - set(made.layers)):
        raise ValueError(f"nobody writes {unknown}; there are {sorted(made.layers)}")
    return made


def stored_sources(params: Mapping[str, Tree], batch: Batch) -> dict[str, Any]:
    """{"signals/<name>": (HiddenStates, Head)} of the signals whose teacher's head is among the frozen parameters."""
    return {name: (batch.signals[name.removeprefix("signals/")], head) for name, head in params.items()
            if name.startswith("signals/")}


def _run(made: Made, source: str, model: Any, params: Tree, stream: Any, layers: tuple[Any, ...]) -> None:
    taps = tuple(layer for layer in layers if isinstance(layer, int))
    variables = {"params": params}
    out = model.apply(variables, stream.tokens, stream.positions, stream.segment_ids, method="hidden",
                      **({"taps": taps} if taps else {}))
    if out.routing is not None:
        made.routing[source] = out.routing
    states = {"final": out.hidden} | dict(zip(taps, out.taps))
    if "embedding" in layers:
        states["embedding"] = model.apply(variables, stream.tokens, method="embedding")
    _take(made, {source: Written(states, model.head(params))})


def _take(made: Made, written: Mapping[str, Written]) -> None:
    for source, (states, head) in written.items():
        made.layers[source] = dict(states)
        if "final" in states:
            made.sources[source] = (states["final"], head)
