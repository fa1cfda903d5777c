"""Teacher signals of rows: one forward pass, then the head over chunks of the tokens that are asked for.

B rows, T tokens, N tokens a batch is asked about, K kept outcomes, V vocabulary, D width. The hidden state of
token t-1 says what the teacher thinks of token t, so the first token of a row has no signal. `[B,T,V]` never exists.
"""

import contextlib
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, partial
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from distill_jax.core.head import Head
from distill_jax.core.roles import NUM_ROLES, SUPERVISED, Role
from distill_jax.decode.generator import bucket
from distill_jax.decode.loop import compute_params
from distill_jax.rollout.draws import merge, systematic, uniform
from distill_jax.sharding import batch_spec
from distill_jax.traces.store import SignalRow, StoredHead
from distill_jax.traces.store.signals import ROWS

Array = Any
P = PartitionSpec


@dataclass(frozen=True, kw_only=True)
class SignalSpec:
    """Which signal, as it is written on the command line.

    topk:64           the 64 most probable outcomes
    token             the log-prob of the token that stands there
    sampled:50        50 draws from the teacher; sampled:50:0.8: drawn at temperature 0.8, with importance weights
    hidden            the final states and the head, in bfloat16; hidden:int8
    """

    kind: str
    k: int = 0
    temperature: float = 1.0
    precision: str = ""

    def __post_init__(self) -> None:
        if not 0 < self.temperature < float("inf"):
            raise ValueError(f"the temperature of draws must be above 0, got {self.temperature}")

    @classmethod
    def parse(cls, text: str) -> "SignalSpec":
        kind, *rest = text.split(":")
        with contextlib.suppress(ValueError, IndexError):
            if kind == "token" and not rest:
                return cls(kind=kind)
            if kind == "hidden" and (not rest or rest in (["int8"], ["bf16"])):
                return cls(kind=kind, precision="".join(rest))
            if kind == "topk" and len(rest) == 1 and int(rest[0]) > 0:
                return cls(kind=kind, k=int(rest[0]))
            if kind == "sampled" and len(rest) in (1, 2) and int(rest[0]) > 0:
                return cls(kind=kind, k=int(rest[0]), temperature=float(rest[1]) if rest[1:] else 1.0)
        raise ValueError(f"unknown signal {text!r}; expected topk:K (for example topk:64), sampled:N (sampled:50, or "
                         "sampled:50:0.8 to draw at temperature 0.8), hidden, hidden:int8 or token")

    def __str__(self) -> str:
        rest = [str(self.k)] if self.k else [self.precision] if self.precision == "int8" else []
        return ":".join([self.kind, *rest, *([f"{self.temperature:g}"] if self.temperature != 1 else [])])


class Rows(Protocol):
    """What is scored: tokens i32 [T] and roles u8 [T] of one row."""

    @property
    def tokens(self) -> np.ndarray: ...
    @property
    def roles(self) -> np.ndarray: ...


@dataclass(frozen=True, kw_only=True)
class Totals:
    """Sums over scored tokens, by role (float64 [roles] each): their count, the teacher's negative log-likelihood of
    the tokens that stand there, its entropy (nats, whole vocabulary), and the mass of the kept outcomes."""

    count: np.ndarray = field(default_factory=lambda: np.zeros(NUM_ROLES))
    nll: np.ndarray = field(default_factory=lambda: np.zeros(NUM_ROLES))
    entropy: np.ndarray = field(default_factory=lambda: np.zeros(NUM_ROLES))
    mass: np.ndarray = field(default_factory=lambda: np.zeros(NUM_ROLES))

    def __add__(self, other: "Totals") -> "Totals":
        return Totals(**{k: v + getattr(other, k) for k, v in vars(self).items()})

    def to_json(self) -> dict[str, list[float]]:
        return {k: v.tolist() for k, v in vars(self).items()}

    @classmethod
    def from_json(cls, value: dict[str, list[float]]) -> "Totals":
        return cls(**{k: np.asarray(v, np.float64) for k, v in value.items()})

    def means(self) -> dict[str, Any]:
        """`{"tokens", "nll", "entropy", "mass", "by_role": {role: the same}}`; nothing where no token was scored."""
        def of(index: Any) -> dict[str, float]:
            n = float(self.count[index].sum())
            return {"tokens": int(n)} | {k: float(getattr(self, k)[index].sum()) / n
                                         for k in ("nll", "entropy", "mass") if n}
        return of(slice(None)) | {"by_role": {Role(r).name.lower(): of([r]) for r in np.flatnonzero(self.count)}}


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class _Scores:
    """What the device returns for N places, of which the first are filled: the arrays [N,...] of the signal's rows but
    for their mask; the log-prob of the token there, the entropy, and the mass of the kept outcomes [N]."""

    signal: dict[str, Array]
    token: Array
    entropy: Array
    mass: Array


@dataclass(frozen=True, kw_only=True)
class _Static:
    """What a scoring is compiled for: the signal, tokens whose logits exist at a time, real ids, devices."""

    spec: SignalSpec
    chunk: int
    real: int
    mesh: Mesh | None = None


class Scorer:
    """Scores rows with a teacher. Compiled once per bucket of row lengths.

    batch_tokens  padded tokens of a batch
    chunk         tokens whose logits exist at a time, per device
    on            roles to score; None: every token but a row's first
    real          number of real token ids; others get no mass. Default: as the model's head says
    buckets       row lengths to pad to; default: see `decode.generator.bucket`
    """

    def __init__(self, model: Any, params: Any, spec: SignalSpec, *, batch_tokens: int = 16384, chunk: int = 512,
                 on: tuple[Role, ...] | None = SUPERVISED, real: int | None = None, buckets: Sequence[int] = (),
                 mesh: Mesh | None = None) -> None:
        self.model, self.params, self.spec, self.mesh = model, params, spec, mesh
        self.batch_tokens, self.on, self.buckets = batch_tokens, on, tuple(buckets)
        vocab = model.config.vocab_size
        known = [n for n in (real, model.config.real_vocab, vocab) if n is not None]
        self.static = _Static(spec=spec, chunk=chunk, real=min(known), mesh=mesh)
        if spec.kind == "topk" and spec.k > self.static.real:
            raise ValueError(f"{spec}: the teacher has only {self.static.real} token ids; ask for fewer")

    @property
    def head(self) -> StoredHead:
        """The teacher's head on the host in its compute dtype, as a `hidden` signal stores it."""
        head: Head = self.model.head(self.params)
        host = lambda x: _storable(jax.device_get(x.astype(self.model.dtype)))
        return StoredHead(kernel=host(head.kernel), bias=None if head.bias is None else host(head.bias),
                          scale=head.scale, soft_cap=head.soft_cap, real=self.static.real)

    def __call__(self, rows: Sequence[Rows]) -> tuple[list[SignalRow], Totals]:
        """The signal of every row, in order, and sums for the report. Deterministic: the same rows give the same
        bits, draws included (a row's tokens are their seed). A row of which the teacher says NaN is all masked and not
        counted. Raises ValueError for a row longer than the model's context, or with an id the teacher does not have.
        """
        self._check(rows)
        out: list[SignalRow | None] = [None] * len(rows)
        totals, waiting = Totals(), None
        cuts = row_batches([len(r.tokens) for r in rows], self.batch_tokens, mesh=self.mesh, buckets=self.buckets)
        for job in [*cuts, None]:
            running = None if job is None else self._run([rows[i] for i in job[0]], job)
            if waiting is not None:  # read one batch while the next one runs
                totals += self._collect(rows, out, *waiting)
            waiting = running
        return [r for r in out if r is not None], totals

    def wanted(self, row: Rows) -> np.ndarray:
        """bool [T]: the tokens of a row that are scored."""
        out = np.ones(len(row.tokens), bool) if self.on is None else np.isin(row.roles, [int(x) for x in self.on])
        out[:1] = False
        return out

    def _check(self, rows: Sequence[Rows]) -> None:
        limit, vocab = self.model.config.context_length, self.model.config.vocab_size
        for i, row in enumerate(rows):
            if len(row.tokens) > limit:
                raise ValueError(f"row {i} has {len(row.tokens)} tokens, the teacher's context is {limit}: drop or "
                                 "cut long traces, or use a teacher with a longer context")
            if len(row.tokens) and int(row.tokens.max()) >= vocab:
                raise ValueError(f"row {i} holds token id {int(row.tokens.max())}, the teacher's vocabulary has "
                                 f"{vocab} entries: the rows are of another tokenizer")

    def _run(self, rows: Sequence[Rows], job: tuple[np.ndarray, int, int]) -> tuple[np.ndarray, np.ndarray, _Scores]:
        """-> indices of the rows, wanted bool [rows of the batch, width], what the device makes of them."""
        index, size, width = job
        tokens, lengths = np.zeros((size, width), np.int32), np.zeros(size, np.int32)
        seeds = np.zeros(size, np.uint32)
        wanted = np.zeros((size, width), bool)
        for r, row in enumerate(rows):
            tokens[r, :len(row.tokens)], lengths[r] = row.tokens, len(row.tokens)
            seeds[r] = zlib.crc32(np.ascontiguousarray(row.tokens, "<i4").data)
            wanted[r, :len(row.tokens)] = self.wanted(row)
        place = partial(_place, self.mesh)
        with contextlib.nullcontext() if self.mesh is None else jax.set_mesh(self.mesh):
            return index, wanted, _compiled(self.mesh)(
                model=self.model, params=self.params, tokens=place(tokens), lengths=place(lengths),
                wanted=place(wanted), seeds=place(seeds), static=self.static)

    def _collect(self, rows: Sequence[Rows], out: list[Any], index: np.ndarray, wanted: np.ndarray,
                 scores: _Scores) -> Totals:
        host: _Scores = jax.device_get(scores)
        shards = _row_shards(self.mesh)
        starts = _starts(wanted, len(host.token) // shards, shards)
        totals, kind = Totals(), ROWS[self.spec.kind]
        for r, i in enumerate(index):
            mask = wanted[r, :len(rows[i].tokens)]
            here = slice(starts[r], starts[r] + int(mask.sum()))
            if not np.all(np.isfinite(host.token[here])):
                mask = np.zeros_like(mask)
                here = slice(0, 0)
            spread = {name: _spread(x[here], mask, kind.empty[name]) for name, x in host.signal.items()}
            out[i] = kind(mask=mask, **spread)
            roles = np.asarray(rows[i].roles)[mask]
            add = lambda x, roles=roles: np.bincount(roles, np.asarray(x, np.float64), NUM_ROLES)
            totals += Totals(count=add(np.ones(len(roles))), nll=add(-host.token[here]),
                             entropy=add(host.entropy[here]), mass=add(host.mass[here]))
        return totals


def score_rows(model: Any, params: Any, rows: Sequence[Rows], spec: SignalSpec, **kwargs: Any) -> list[SignalRow]:
    """The teacher's signal of every row, in order; keywords as for `Scorer`."""
    return Scorer(model, params, spec, **kwargs)(rows)[0]


def row_batches(lengths: Sequence[int], batch_tokens: int, *, mesh: Mesh | None = None, buckets: Sequence[int] = ()
                ) -> Iterator[tuple[np.ndarray, int, int]]:
    """(indices of rows, rows of the batch, its width): longest first, so that neighbours in length share one."""
    order, start = np.argsort(-np.asarray(lengths, np.int64), kind="stable"), 0
    multiple = _row_shards(mesh)
    while start < len(order):
        width = bucket(lengths[order[start]], buckets)
        size = max(1, batch_tokens // width // multiple) * multiple
        yield order[start:start + size], size, width
        start += size


def _row_shards(mesh: Mesh | None) -> int:
    return 1 if mesh is None else int(np.prod([mesh.shape[a] for a in batch_spec()[0]]))


def _place(mesh: Mesh | None, rows: np.ndarray) -> Any:
    if mesh is None:
        return rows
    return jax.make_array_from_callback(rows.shape, NamedSharding(mesh, batch_spec()), lambda i: rows[i])


def _starts(wanted: np.ndarray, places: int, shards: int) -> np.ndarray:
    """Where each row's entries begin: every shard of rows fills its own `places` from the front."""
    counts = wanted.sum(axis=1).reshape(shards, -1)
    return (np.cumsum(counts, axis=1) - counts + places * np.arange(shards)[:, None]).reshape(-1)


def _spread(values: np.ndarray, mask: np.ndarray, empty: Any) -> np.ndarray:
    out = np.full((len(mask), *values.shape[1:]), empty, values.dtype)
    out[mask] = values
    return out


def _storable(x: np.ndarray) -> np.ndarray:
    """A head's array in a type that is stored; half precision becomes float32, which holds it."""
    return x if x.dtype.name in ("bfloat16", "float32") else x.astype(np.float32)


@cache
def _compiled(mesh: Mesh | None) -> Any:
    outs: dict[str, Any] = {} if mesh is None else {"out_shardings": NamedSharding(mesh, P())}
    return jax.jit(_score, static_argnames=("model", "static"), **outs)


def _score(model: Any, params: Any, tokens: Array, lengths: Array, wanted: Array, seeds: Array, static: _Static
           ) -> _Scores:
    """tokens i32 [B,T] right-padded; wanted bool [B,T]: which tokens to score; seeds u32 [B] of the rows' draws."""
    params = compute_params(params, model.dtype)
    real_token = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None] < lengths[:, None]
    hidden = model.apply({"params": params}, tokens, segment_ids=real_token.astype(jnp.int32), method="hidden").hidden
    head = replace(model.head(params), real=static.real)
    score = partial(_score_places, static=static)
    if static.mesh is not None:  # every device works on its own rows with the whole head
        rows = batch_spec()
        score = jax.shard_map(score, mesh=static.mesh, in_specs=(rows, rows, rows, rows, P()), out_specs=rows,
                              check_vma=False)
    return score(hidden, tokens, wanted, seeds, head)


def _score_places(hidden: Array, tokens: Array, wanted: Array, seeds: Array, head: Head, *, static: _Static
                  ) -> _Scores:
    """The wanted tokens, gathered to the front and taken through the head `chunk` at a time."""
    rows, width, size = hidden.shape
    chunk = min(static.chunk, rows * width)
    places = -(-rows * width // chunk) * chunk
    at = jnp.nonzero(wanted.reshape(-1), size=places, fill_value=1)[0]
    flat, ids = hidden.reshape(-1, size), tokens.reshape(-1)

    def score(here: Array) -> _Scores:
        states = flat[here - 1]  # t-1 is the token before, in the same row
        draws = partial(uniform, seeds[here // width], here % width)
        return _score_logits(head.logits(states), ids[here], states, draws, static.spec)

    def body(i: Array, out: _Scores) -> _Scores:
        new = score(jax.lax.dynamic_slice_in_dim(at, i * chunk, chunk))
        put = lambda whole, part: jax.lax.dynamic_update_slice_in_dim(whole, part, i * chunk, axis=0)
        return jax.tree.map(put, out, new)

    shapes = jax.eval_shape(score, at[:chunk])
    empty = jax.tree.map(lambda x: jnp.zeros((places, *x.shape[1:]), x.dtype), shapes)
    used = (jnp.sum(wanted, dtype=jnp.int32) + chunk - 1) // chunk
    return jax.lax.fori_loop(jnp.int32(0), used, body, empty)


def _score_logits(logits: Array, token: Array, states: Array, draws: Callable[[], Array], spec: SignalSpec) -> _Scores:
    """float32 logits [C,V], token i32 [C] -> its scores."""
    logp = jax.nn.log_softmax(logits, axis=-1)
    p = jnp.exp(logp)
    realised = jnp.take_along_axis(logp, token[:, None], axis=-1)[:, 0]
    signal, mass = _SIGNALS[spec.kind](logp, p, realised, states, draws, spec)
    return _Scores(signal=signal, token=realised, mass=mass,
                   entropy=-jnp.sum(jnp.where(p > 0, p * logp, 0.0), axis=-1))


def _topk(logp: Array, p: Array, realised: Array, states: Array, draws: Any, spec: SignalSpec) -> Any:
    """The tail is summed from what is left: 1 - sum cancels."""
    kept, ids = jax.lax.top_k(logp, spec.k)
    tail = jnp.sum(p.at[jnp.arange(p.shape[0])[:, None], ids].set(0.0), axis=-1)
    return {"ids": ids, "logprobs": kept, "tail": tail}, 1 - tail


def _token(logp: Array, p: Array, realised: Array, states: Array, draws: Any, spec: SignalSpec) -> Any:
    return {"logprobs": realised}, jnp.exp(realised)


def _hidden(logp: Array, p: Array, realised: Array, states: Array, draws: Any, spec: SignalSpec) -> Any:
    return {"states": states}, jnp.ones_like(realised)


def _sampled(logp: Array, p: Array, realised: Array, states: Array, draws: Callable[[], Array], spec: SignalSpec
             ) -> Any:
    """Draws from p^(1/t) / Z, weighted by p over it. With t = 1 all weigh the same."""
    ids = systematic(p if spec.temperature == 1 else jax.nn.softmax(logp / spec.temperature, axis=-1), draws(), spec.k)
    of_each = jnp.take_along_axis(logp, ids, axis=-1)
    kept, weights = merge(ids, jax.nn.softmax(of_each * (1 - 1 / spec.temperature), axis=-1))
    there = kept >= 0
    mass = jnp.sum(jnp.where(there, jnp.take_along_axis(p, jnp.where(there, kept, 0), axis=-1), 0.0), axis=-1)
    return {"ids": kept, "weights": weights}, mass


_SIGNALS = {"topk": _topk, "token": _token, "hidden": _hidden, "sampled": _sampled}
