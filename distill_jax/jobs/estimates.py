"""Advantages of single tokens of a round: what providers say of the sampled tokens, estimated and written down.

A file `rollouts/<update>.npz` beside the round's store: {field: float32 [all tokens of all rows]} and `lengths` [rows],
rows in the store's order, 0 at tokens the student did not write.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from distill_jax.core.batch import Batch, Stream
from distill_jax.core.roles import SUPERVISED, Role
from distill_jax.losses.rows.logprob import log_prob
from distill_jax.losses.rows.value import value
from distill_jax.objective.chunks import RowTerm
from distill_jax.objective.lift import lift_values
from distill_jax.rollout.estimators import ADVANTAGES, RETURNS, VALUES, Answer, Estimator
from distill_jax.rollout.scoring import row_batches
from distill_jax.traces.store import Row
from distill_jax.traces.trace import Trace
from distill_jax.train.feed import place_global
from distill_jax.train.sources import make_sources
from distill_jax.train.step import StepConfig

Estimates = dict[str, list[np.ndarray]]
"""{stream field: float32 [T] of each row}."""


class Measures:
    """What a critic and a reference say of rows, with the parameters they have now: one forward pass over each.

    frozen        {provider: params} of those that are not trained
    batch_tokens  padded tokens of a batch
    """

    def __init__(self, config: StepConfig, frozen: Mapping[str, Any], batch_tokens: int = 16384) -> None:
        self.config, self.frozen, self.batch_tokens = config, frozen, batch_tokens
        self._compiled: dict[tuple[str, ...], Any] = {}

    def __call__(self, estimator: Estimator, params: Mapping[str, Any], rows: Sequence[Row]) -> Estimates:
        """{"values", "reference"}, those that the estimator reads: float32 [T] of each row, 0 but at the tokens the
        student wrote."""
        terms = {}
        if estimator.critic:
            terms["values"] = RowTerm(loss=value, source=f"{estimator.critic}/main")
        if estimator.reference:
            terms["reference"] = RowTerm(loss=log_prob, source=f"{estimator.reference}/main")
        out: Estimates = {name: [np.zeros(0, np.float32)] * len(rows) for name in terms}
        if not terms:
            return out
        lengths = [len(r.tokens) for r in rows]
        for index, size, width in row_batches(lengths, self.batch_tokens, mesh=self.config.mesh):
            batch = _batch([rows[i] for i in index], size, width)
            got = jax.device_get(self._run(terms)({**self.frozen, **params}, place_global(batch, self.config.mesh)))
            for name, of in got.items():
                for b, i in enumerate(index.tolist()):
                    out[name][i] = np.array(of[b, :lengths[i]])
        return out

    def _run(self, terms: Mapping[str, RowTerm]) -> Any:
        """jitted (params, batch) -> {term: f32 [B,T]}."""
        config, asked = self.config, {t.source: ("final",) for t in terms.values()}

        def run(params: Mapping[str, Any], batch: Batch) -> dict[str, Any]:
            made = make_sources(asked, config.models, config.projectors, params, batch)
            return lift_values({s: made.sources[s] for s in asked}, terms, tokens=batch.main.tokens,
                               active=batch.main.roles != int(Role.PAD), mesh=config.lift_mesh)

        key = (*sorted(asked),)
        if key not in self._compiled:
            self._compiled[key] = jax.jit(run, out_shardings=NamedSharding(config.mesh, PartitionSpec()))
        return self._compiled[key]


def _batch(rows: Sequence[Row], size: int, width: int) -> Batch:
    """The rows, one a line, from the left; tokens that the student did not write have the role PAD."""
    arrays = {name: np.zeros((size, width), np.int32) for name in ("tokens", "positions", "segment_ids", "roles",
                                                                  "step_ids")}
    arrays["positions"][:] = np.arange(width)
    for b, row in enumerate(rows):
        n = len(row.tokens)
        arrays["tokens"][b, :n], arrays["segment_ids"][b, :n] = row.tokens, 1
        arrays["roles"][b, :n] = np.where(written(row), row.roles, int(Role.PAD))
    return Batch(views={"main": Stream(**arrays, weights=np.ones((size, width), np.float32),
                                       row_ids=np.full((size, width), -1, np.int32))}, signals={})


def written(row: Row) -> np.ndarray:
    """bool [T]: the tokens of a rollout's row that the student wrote and is trained on."""
    out = np.isin(row.roles, [int(r) for r in SUPERVISED])
    out[:1] = False
    return out


def estimate(estimator: Estimator, traces: Sequence[Trace], rows: Sequence[Row], rewards: Sequence[float],
             groups: np.ndarray, trained: Sequence[bool], measured: Estimates) -> Estimates:
    """The estimator's fields for sampled traces, whose rows are `rows`; see `Answer`."""
    at, answers = [written(r) for r in rows], []
    for i, (trace, row) in enumerate(zip(traces, rows)):
        assert trace.encoded is not None and trace.encoded.logprobs is not None
        found = {name: of[i][at[i]] for name, of in measured.items()}
        answers.append(Answer(reward=rewards[i], group=int(groups[i]), ids=row.tokens[at[i]], trained=trained[i],
                              logprobs=np.asarray(trace.encoded.logprobs)[at[i]], **found))
    out: Estimates = {name: [np.zeros(len(mask), np.float32) for mask in at] for name in estimator.fields}
    for i, said in enumerate(estimator(answers)):
        for name in estimator.fields:
            out[name][i][at[i]] = said[name]
    return out


def save_estimates(path: Path, estimates: Estimates) -> None:
    """The file appears whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    arrays: dict[str, Any] = {name: np.concatenate([*of, np.zeros(0, np.float32)]) for name, of in estimates.items()}
    part = path.with_name(f".{path.name}.part")
    with part.open("wb") as file:
        np.savez(file, lengths=np.array([len(x) for x in estimates[ADVANTAGES]], np.int64), **arrays)
    part.replace(path)


def load_estimates(path: Path) -> Estimates:
    """Inverse of `save_estimates`. Raises ValueError where the file is missing."""
    if not path.is_file():
        raise ValueError(f"{path} is missing: the advantages of the round beside it; delete the checkpoints after it, "
                         "or start the stage anew")
    with np.load(path) as file:
        ends = np.cumsum(file["lengths"])[:-1]
        return {name: np.split(file[name], ends) if len(file["lengths"]) else [] for name in file.files
                if name != "lengths"}


def numbers_of(estimates: Estimates, traces: Sequence[Trace]) -> dict[str, float]:
    """Of a critic over a round's answers: means of its values and of the returns, and 1 - var(R - V) / var(R)."""
    if RETURNS not in estimates:
        return {}
    sampled = []
    for t in traces:
        assert t.encoded is not None
        at = np.arange(len(t.encoded.ids)) >= t.encoded.prompt_length
        sampled.append(at if t.encoded.injected is None else at & ~t.encoded.injected)
    values, goals = (np.concatenate([x[at] for x, at in zip(estimates[n], sampled)]) for n in (VALUES, RETURNS))
    spread = float(np.var(goals))
    explained = 1.0 - float(np.var(goals - values)) / spread if spread else 0.0
    return {"value": float(values.mean()), "return": float(goals.mean()), "explained_variance": explained}
