"""`distill-jax store fidelity`: stored signals of a store against the whole teacher, as a given student sees them.

Held-out rows are read by teacher and student; the measures are those of `eval.fidelity`, over the tokens that every
signal speaks of. Log-probs of another program are measured the same way once `store ingest` has made a signal of them.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from distill_jax.core.head import Head
from distill_jax.data.choosing import held_out
from distill_jax.data.tokenizer import Tokenizer, load_tokenizer
from distill_jax.decode.generator import bucket
from distill_jax.eval.fidelity import Fidelity, projection
from distill_jax.jobs.inspect_store import stored_bytes
from distill_jax.losses.targets import Full, SampledTarget, Target, TopKTarget
from distill_jax.traces.store import HiddenRow, SampledRow, SignalReader, SignalRow, TopKRow, TraceStore


@dataclass(frozen=True, kw_only=True)
class FidelityJob:
    """store, teacher, student: folder or MODEL. signals: names, () for all of them.

    holdout  share of the questions that are held out (as `Store.holdout` of a recipe); 0: rows from the whole store
    tokens   measured at most
    chunk    tokens whose whole distributions exist at a time
    """

    store: str
    teacher: str
    student: str
    signals: tuple[str, ...] = ()
    holdout: float = 0.02
    tokens: int = 4096
    chunk: int = 64
    dtype: str = "float32"


def fidelity(job: FidelityJob) -> dict[str, Any]:
    """Load both models and measure. Returns `Fidelity.report()`."""
    from distill_jax.loading import load

    store = TraceStore.open(job.store)
    models = {name: load(where, dtype=jnp.dtype(job.dtype)) for name, where in (
        ("teacher", job.teacher), ("student", job.student))}
    toks = {"teacher": load_tokenizer(job.teacher), "student": load_tokenizer(job.student)}
    return measure(store, models, toks, job)


def measure(store: TraceStore, models: Mapping[str, Any], toks: Mapping[str, Tokenizer], job: FidelityJob
            ) -> dict[str, Any]:
    """As `fidelity`, with {"teacher", "student"} models (model, params) and tokenizers at hand. Raises ValueError for
    models of another tokenizer than the store's, and where there is nothing to measure."""
    for name, tok in toks.items():
        if tok.hash != store.header.tokenizer.get("hash"):
            raise ValueError(f"the {name}'s tokenizer is not the store's: fidelity compares distributions over the "
                             "stored tokens; give models of the store's tokenizer")
    readers = {name: store.signal(name) for name in job.signals or store.signals()}
    if not readers:
        raise ValueError(f"{store.url} has no signal; make one with `distill-jax score` or `store ingest`")
    rows = _rows(store, job, min(m.config.context_length for m, _ in models.values()), min(map(len, readers.values())))
    real = toks["teacher"].real
    measured = Fidelity(bytes={n: _bytes_per_token(store, r) for n, r in readers.items()}, about={
        "store": store.url, "teacher": job.teacher, "student": job.student, "holdout": job.holdout})
    width = models["student"][0].config.hidden_size
    onto = jnp.asarray(projection(width))
    stored = {n: _head(r) for n, r in readers.items()}
    left = job.tokens
    for number in rows:
        tokens = store.read([number])[0].tokens
        said = {n: r.read([number])[0] for n, r in readers.items()}
        states = {name: _hidden(model, params, tokens) for name, (model, params) in models.items()}
        heads = {name: replace(model.head(params), real=real) for name, (model, params) in models.items()}
        where = np.flatnonzero(np.logical_and.reduce([s.mask for s in said.values()]))[:left]
        for at, valid in _chunks(where, job.chunk):
            before = {name: x[at - 1].astype(jnp.float32) for name, x in states.items()}
            measured.add(heads["teacher"].logits(before["teacher"]), heads["student"].logits(before["student"]),
                         before["student"] @ onto, jnp.asarray(tokens[at]), jnp.asarray(valid),
                         {n: target(s, at, tokens, stored[n]) for n, s in said.items()})
        left -= len(where)
        if left <= 0:
            break
    return measured.report()


def target(row: SignalRow, at: np.ndarray, tokens: np.ndarray, head: Head | None = None) -> Target:
    """What the signal of a row says at tokens `at`, as row losses are given it."""
    if isinstance(row, TopKRow):
        return TopKTarget(jnp.asarray(row.ids[at]), jnp.asarray(row.logprobs[at]))
    if isinstance(row, SampledRow):
        return SampledTarget(jnp.asarray(row.ids[at]), jnp.asarray(row.weights[at]))
    if isinstance(row, HiddenRow):
        assert head is not None and row.scales is not None
        return Full(head.logits(jnp.asarray(row.states[at].astype(np.float32) * row.scales[at, None])))
    values: Any = row
    return TopKTarget(jnp.asarray(tokens[at][:, None]), jnp.asarray(values.logprobs[at][:, None]))


def _rows(store: TraceStore, job: FidelityJob, context: int, scored: int) -> Sequence[int]:
    index = store.index()
    chosen = held_out(index.groups, job.holdout) if job.holdout else np.ones(len(store), bool)
    chosen &= (index.lengths <= context) & (np.arange(len(store)) < scored)
    if not chosen.any():
        raise ValueError(f"no row to measure: {len(store)} rows, {job.holdout:.0%} of the questions held out, at most "
                         f"{context} tokens a row, {scored} rows with all signals. Give another --holdout (0: any row)")
    rows = np.flatnonzero(chosen)
    return np.random.default_rng(0).permutation(rows).tolist()


def _bytes_per_token(store: TraceStore, reader: SignalReader) -> float:
    """Bytes on disk over the tokens that the signal speaks of, from a sample of rows."""
    ids = np.unique(np.linspace(0, max(len(reader) - 1, 0), min(128, len(reader)), dtype=np.int64))
    share = sum(int(s.mask.sum()) for s in reader.read(ids)) / max(int(store.lengths()[ids].sum()), 1)
    return sum(stored_bytes(reader.shards).values()) / max(share * int(store.lengths()[:len(reader)].sum()), 1)


def _head(reader: SignalReader) -> Head | None:
    if reader.header.head is None:
        return None
    h = reader.head()
    as32 = lambda x: None if x is None else jnp.asarray(x.astype(np.float32))
    return Head(kernel=as32(h.kernel), bias=as32(h.bias), scale=h.scale, soft_cap=h.soft_cap, real=h.real)


def _hidden(model: Any, params: Any, tokens: np.ndarray) -> jax.Array:
    width = bucket(len(tokens), ())
    padded = np.zeros((1, width), np.int32)
    padded[0, :len(tokens)] = tokens
    return _apply(model, params, padded, (np.arange(width) < len(tokens))[None].astype(np.int32))[0]


@partial(jax.jit, static_argnums=0)
def _apply(model: Any, params: Any, tokens: Any, segments: Any) -> Any:
    return model.apply({"params": params}, tokens, segment_ids=segments, method="hidden").hidden


def _chunks(where: np.ndarray, size: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(tokens, which of them count) of `size` each; the last is filled up."""
    for i in range(0, len(where), size):
        part = where[i:i + size]
        yield np.concatenate([part, np.ones(size - len(part), np.int64)]), np.arange(size) < len(part)
