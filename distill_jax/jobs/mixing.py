"""A `Mix` whose shares follow the student: opens what `DomainGap` measures, for `train.loop.fit`."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from distill_jax.data import mixture
from distill_jax.data.source_specs import Mix, Store
from distill_jax.data.sources import BatchSource, open_source
from distill_jax.data.tokenizer import Tokenizer
from distill_jax.losses.rows.perplexity import log_perplexity_ratio
from distill_jax.objective.term import Term, build_objective
from distill_jax.train.feed import place_global
from distill_jax.train.step import Model, StepConfig, make_evaluation


class DomainSteering:
    """`train.loop.Steering` of a `Mix` with a `DomainGap`.

    The gap of a source is exp(mean of log p(y) - log q(y)) over the supervised tokens of its first held-out batches:
    the same tokens for student and teacher, the same batches at every measurement.
    """

    def __init__(self, mix: Mix, opened: BatchSource, tokenizer: Tokenizer, *, student: str, model: Model, mesh: Mesh,
                 seed: int) -> None:
        assert mix.controller is not None
        self.spec, self._opened, self._mesh = mix.controller, opened, mesh
        heldout = lambda s: dataclasses.replace(s, split="heldout", rows=mix.rows, prefix=None, max_rows=None,
                                                signals=(self.spec.teacher,))
        self._heldout = [open_source(heldout(s), tokenizer, seed=seed) for s in mix.sources]
        for store, source in zip(mix.sources, self._heldout, strict=True):
            _check_signal(store, source.signals[self.spec.teacher].kind, self.spec.teacher)
        term = Term(loss=log_perplexity_ratio, student=f"{student}/main", target=f"signals/{self.spec.teacher}")
        config = StepConfig(objective=build_objective({"gap": term}), models={student: model}, mesh=mesh)
        self._evaluate: Callable[..., Any] = make_evaluation(config)

    @property
    def every(self) -> int:
        return self.spec.every

    def source(self, state: Mapping[str, Any]) -> BatchSource:
        return self._opened.mixed(state)

    def update(self, state: Mapping[str, Any], params: Mapping[str, Any], step: int) -> mixture.State:
        taken = self._opened.mixed(state).taken_before(step)
        return mixture.steered(state, self.gaps(params), self.spec.alpha, step, taken)

    def numbers(self, state: Mapping[str, Any]) -> dict[str, float]:
        """Shares of the sources, by their number."""
        return {f"share/{i}": float(x) for i, x in enumerate(state["shares"])}

    def close(self) -> None:
        """Nothing to end."""

    def initial(self) -> mixture.State:
        """Before anything was measured."""
        return mixture.initial(self._opened.shares)

    def gaps(self, params: Mapping[str, Any]) -> np.ndarray:
        """Student's perplexity / teacher's on each source [N]; 0 tokens (no signal) give NaN, which `steered` names."""
        out = []
        for source in self._heldout:
            total = np.zeros(2)
            for i in range(self.spec.batches):
                sums = self._evaluate(params, {}, place_global(source.batch(i), self._mesh), jnp.int32(0), {})["gap"]
                total += [float(np.sum(x)) for x in jax.device_get((sums.sum, sums.count))]
            out.append(np.exp(total[0] / total[1]) if total[1] else np.nan)
        return np.array(out)


def _check_signal(store: Store, kind: str, name: str) -> None:
    if kind != "token":
        raise ValueError(f"{store.path}: a DomainGap needs the teacher's log-probability of the tokens that stand "
                         f"there; signal {name!r} is of kind {kind}. Run `distill-jax score {store.path} --signal "
                         "token` with the teacher, and name that signal")


def steering_of(source: Any, opened: Any, tokenizer: Tokenizer, **kwargs: Any) -> DomainSteering | None:
    """The steering of a stage's source; None where its shares are fixed. kwargs as of `DomainSteering`."""
    if isinstance(source, Mix) and source.controller is not None:
        return DomainSteering(source, opened, tokenizer, **kwargs)
    return None
