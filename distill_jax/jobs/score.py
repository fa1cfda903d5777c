"""`distill-jax score`: what a teacher thinks of every token of a store, written beside it as a signal.

Same tokenizer and template: the teacher reads the stored tokens. Same learned vocabulary, but another template or other
added tokens: the teacher reads the trace rendered as it knows it, and the signal goes to the stored tokens by byte
offsets. Another vocabulary: the same, by groups of tokens that cover the same bytes (`data.cross`): a distribution goes
to the token that begins a group, a token's log-prob to the same token.

Works shard by shard, always with the same batches: killed and started again, the signal is the same to the bit (same
machine and devices).
"""

import hashlib
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from distill_jax.core.roles import SUPERVISED, Role
from distill_jax.core.tree import paths
from distill_jax.data.align import Alignment, align, gather, require_coverage, token_map
from distill_jax.data.cross import byte_map, cross_align, merged, require_same_text
from distill_jax.data.render import render, template_id
from distill_jax.data.tokenizer import Tokenizer, load_tokenizer
from distill_jax.jobs.parts import Part, PartFolder, tally_key
from distill_jax.jobs.progress import Ticker
from distill_jax.rollout.scoring import Scorer, SignalSpec, Totals
from distill_jax.traces.store import RowArrays, SignalHeader, SignalRow, TokenRow, TraceStore, blank
from distill_jax.traces.store.heads import write_head
from distill_jax.traces.store.kv import Kv
from distill_jax.traces.store.shards import Commit
from distill_jax.traces.trace import Trace

SAMPLE = 256
"""Rows whose coverage is looked at before anything is scored."""


@dataclass(frozen=True, kw_only=True)
class ScoreJob:
    """store: folder or URL. teacher: a MODEL. signal: a `SignalSpec`. name: of the signal, `topk64` by default.

    batch_tokens  padded tokens of a batch
    dtype         of the teacher's computation; "auto": bfloat16 on an accelerator, float32 on the CPU
    on            roles to score; None: all tokens
    precision     how values are stored, see `traces.store.SignalHeader`; "" for the signal's default
    skip_long     rows longer than the teacher's context get no signal (else they are an error)
    tokenizer     the teacher's, if it is not beside the teacher
    student_tokenizer  the store's, asked for when the teacher's vocabulary is another; default: what the store names
    across        outcomes that the student has no id for: "match" keeps them apart (`core.batch.FOREIGN`; for `uld`),
                  "prefix" gives their mass to the longest id their bytes begin with (for divergences)
    part          score only these shards, into a folder of their own; `jobs.parts.join` makes the signal
    """

    store: str
    teacher: str
    signal: str = "topk:64"
    name: str = ""
    batch_tokens: int = 16384
    dtype: str = "auto"
    on: tuple[Role, ...] | None = SUPERVISED
    precision: str = ""
    skip_long: bool = False
    tokenizer: str = ""
    student_tokenizer: str = ""
    across: str = "match"
    part: Part | None = None

    def __post_init__(self) -> None:
        SignalSpec.parse(self.signal)
        if self.across not in ("match", "prefix"):
            raise ValueError(f"across {self.across!r}: expected match or prefix")
        if self.batch_tokens < 1:
            raise ValueError(f"batch_tokens must be at least 1, got {self.batch_tokens}")
        if self.dtype != "auto" and self.dtype not in ("float32", "bfloat16", "float16"):
            raise ValueError(f"dtype {self.dtype!r}: expected auto, float32, bfloat16 or float16")

    @property
    def compute_dtype(self) -> str:
        if self.dtype != "auto":
            return self.dtype
        return "float32" if jax.default_backend() == "cpu" else "bfloat16"

    @property
    def signal_name(self) -> str:
        return self.name or str(SignalSpec.parse(self.signal)).replace(":int8", "-int8").replace(":", "", 1).replace(
            ":", "-t")


@dataclass(frozen=True, kw_only=True)
class Tally:
    """Sums of one shard, or of several: the teacher's numbers, and tokens and rows that found no signal."""

    totals: Totals = field(default_factory=Totals)
    rows: int = 0
    supervised: int = 0
    covered: int = 0
    begun: int = 0
    skipped: dict[str, int] = field(default_factory=dict)

    def __add__(self, other: "Tally") -> "Tally":
        keys = {*self.skipped, *other.skipped}
        return Tally(totals=self.totals + other.totals, rows=self.rows + other.rows,
                     supervised=self.supervised + other.supervised, covered=self.covered + other.covered,
                     begun=self.begun + other.begun,
                     skipped={k: self.skipped.get(k, 0) + other.skipped.get(k, 0) for k in sorted(keys)})

    def to_json(self) -> dict[str, Any]:
        return {**vars(self), "totals": self.totals.to_json()}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "Tally":
        return cls(**{**value, "totals": Totals.from_json(value["totals"])})

    def report(self) -> dict[str, Any]:
        """`rows`, `rows_without_signal` by reason, `coverage`, `with_distribution` (another vocabulary: the share of
        the supervised tokens that begin a group), and the means of `Totals`, over the teacher's tokens."""
        share = lambda n: n / self.supervised if self.supervised else 1.0
        return {"rows": self.rows, "rows_without_signal": self.skipped, "coverage": share(self.covered),
                "with_distribution": share(self.begun), **self.totals.means()}


class _Reader:
    """What the teacher reads of a store's rows, and how its signal goes back to them."""

    def __init__(self, store: TraceStore, tok: Tokenizer, job: ScoreJob, context: int) -> None:
        self.store, self.tok, self.skip_long, self.context = store, tok, job.skip_long, context
        about = store.header.tokenizer
        self.stored = about.get("hash") == tok.hash and store.header.template == template_id(tok)
        self.student: Tokenizer | None = None  # of another vocabulary
        self.prefix = job.across == "prefix"
        if self.stored or about.get("base_hash") == tok.base_hash:
            self.mapping = None if self.stored else token_map(tok.info(), about)
            return
        self.student = _student_tokenizer(store, job)
        self.exact = self.mapping = byte_map(tok, self.student)
        if self.prefix:
            self.mapping = byte_map(tok, self.student, prefix=True)

    @property
    def attached(self) -> str:
        """How the signal finds its tokens; part of its header."""
        if self.stored or self.student is None:
            return "tokens" if self.stored else "offsets"
        return "groups/prefix" if self.prefix else "groups/match"

    def check(self) -> None:
        """Raises ValueError for a store that this teacher cannot score, before anything is written."""
        if self.stored:
            long = int((self.store.lengths() > self.context).sum())
            if long and not self.skip_long:
                raise ValueError(f"{long:,} of {len(self.store):,} rows are longer than the teacher's context of "
                                 f"{self.context} tokens (the longest has {self.store.lengths().max():,}); score the "
                                 "others with --skip-long, or use a teacher with a longer context")
            return
        sample = np.unique(np.linspace(0, len(self.store) - 1, min(SAMPLE, len(self.store))).astype(int)).tolist()
        traces = list(self.store.traces(sample))
        found = {number: self._align(row, target) for number, target, trace in zip(
            sample, self.store.read(sample), traces) if (row := self._rendered(trace)) is not None}
        if not found:
            render(traces[0].replace(encoded=None), self.tok)  # says why
        if self.student is None:
            require_coverage(found.values())
        else:
            require_same_text(found, (self.tok.name, self.student.name))

    def shard(self, commit: Commit) -> Iterator["_Item"]:
        ids = np.arange(commit.first_row, commit.first_row + commit.rows)
        targets = self.store.read(ids)
        traces: Any = [None] * len(ids) if self.stored else self.store.traces(ids)
        for number, target, trace in zip(ids, targets, traces):
            source = target if self.stored else self._rendered(trace)
            if source is None:
                yield _Item(number=int(number), target=target, source=None, why="cannot_render")
            elif len(source.tokens) > self.context:
                if not self.skip_long:
                    raise ValueError(f"row {number} has {len(source.tokens)} tokens as the teacher reads it, more than "
                                     f"its context of {self.context}; score the others with --skip-long")
                yield _Item(number=int(number), target=target, source=None, why="longer_than_context")
            else:
                yield _Item(number=int(number), target=target, source=source,
                            alignment=None if self.stored else self._align(source, target))

    def _align(self, source: Any, target: RowArrays) -> Alignment:
        if self.student is None:
            return align(source, target, self.mapping)
        return cross_align(source, target, self.exact, (self.tok, self.student))

    def _rendered(self, trace: Trace) -> Any:
        """The trace as the teacher knows it, or None where its template cannot show it. Ids sampled by somebody else
        stand behind that model's prompt, so the text is encoded again."""
        try:
            return render(trace.replace(encoded=None), self.tok)
        except ValueError:
            return None

    def attach(self, item: "_Item", signal: SignalRow | None, header: SignalHeader) -> SignalRow:
        """The signal of the stored row."""
        if signal is None:
            return blank(header, len(item.target))
        if item.alignment is None:
            return signal
        a = item.alignment
        out = gather(signal, a.pairs if isinstance(signal, TokenRow) and a.pairs is not None else a.index, self.mapping)
        return merged(out) if self.student is not None and self.prefix else out


@dataclass(frozen=True, kw_only=True)
class _Item:
    """A stored row, what the teacher reads in its place (None: nothing, and why), and where tokens of both meet."""

    number: int
    target: RowArrays
    source: Any
    alignment: Alignment | None = None
    why: str = ""


def score(job: ScoreJob, *, mesh: Mesh | None = None, ticker: Ticker | None = None) -> dict[str, Any]:
    """Load the teacher and score the store; continues what an earlier start began. Returns the report."""
    from distill_jax.loading import load

    tok = load_tokenizer(job.tokenizer or job.teacher)
    store = TraceStore.open(job.store)
    dtype = jnp.dtype(job.compute_dtype)
    model, params = load(job.teacher, mesh=mesh, dtype=dtype)
    return score_store(store, model, params, tok, job, mesh=mesh, ticker=ticker)


def score_store(store: TraceStore, model: Any, params: Any, tok: Tokenizer, job: ScoreJob, *,
                mesh: Mesh | None = None, ticker: Ticker | None = None) -> dict[str, Any]:
    """Score `store` with a teacher at hand; `tok` is the teacher's tokenizer. Returns the report: rows, coverage,
    teacher's negative log-likelihood and entropy, retained mass (means over all tokens and by role), tokens/s.

    Raises ValueError where teacher and store do not fit, and says what to use instead.
    """
    if not len(store):
        raise ValueError(f"{store.url} has no rows to score; import or generate traces first")
    spec = SignalSpec.parse(job.signal)
    reader = _Reader(store, tok, job, model.config.context_length)
    if spec.kind == "hidden" and reader.mapping is not None:
        raise ValueError("hidden states come with the teacher's head, whose ids are not those of the store: "
                         "score topk or sampled, whose ids are translated")
    reader.check()
    scorer = Scorer(model, params, spec, batch_tokens=job.batch_tokens, on=job.on, real=tok.real, mesh=mesh)
    start, tokens, name = time.monotonic(), 0, job.signal_name
    folder = None if job.part is None else PartFolder(store, name, job.part)
    header = _header(store.kv if folder is None else folder.kv, job, spec, reader, _identity(job, params, tok), scorer)
    if folder is not None:
        return _score_part(folder, scorer, reader, header, ticker)
    with (ticker or Ticker("score", len(store))) as shown, store.signal_writer(name, header) as writer:
        tally = earlier(store, name, writer.next_row)
        for commit in store.shards:
            if not commit.rows or commit.first_row < writer.next_row:
                continue
            items = list(reader.shard(commit))
            signals, made = _score_shard(scorer, reader, items, header)
            store.kv.write_many({tally_key(name, commit): json.dumps(made.to_json()).encode()})  # before the commit
            for signal in signals:
                writer.append(signal)
            tally += made
            tokens += sum(len(i.source.tokens) for i in items if i.source is not None)
            shown.at(writer.next_row, f"{tokens / (time.monotonic() - start):,.0f} tokens/s")
    seconds = time.monotonic() - start
    return {"signal": name, "kind": str(spec), "attached": header.params["attached"], **tally.report(),
            "tokens_read": tokens, "seconds": round(seconds, 2), "tokens_per_second": round(tokens / seconds, 1)}


def _score_part(folder: PartFolder, scorer: Scorer, reader: _Reader, header: SignalHeader,
                ticker: Ticker | None) -> dict[str, Any]:
    """The shards of one part that are not there yet. Returns its counts, of this start."""
    shards, tokens, start = folder.part.of(folder.store.shards), 0, time.monotonic()
    if folder.joined(header):
        folder.store.kv.delete(f"parts/{folder.name}/{folder.part.folder}/")  # a head, at most
        todo = []
    else:
        folder.begin(header)
        done = folder.done()
        todo = [c for c in shards if c.number not in done]
    rows = sum(c.rows for c in shards)
    left = sum(c.rows for c in todo)
    with ticker or Ticker("score", rows) as shown:
        for commit in todo:
            items = list(reader.shard(commit))
            signals, made = _score_shard(scorer, reader, items, header)
            folder.write(commit, signals, made.to_json())
            left -= commit.rows
            tokens += sum(len(i.source.tokens) for i in items if i.source is not None)
            shown.at(rows - left, f"{tokens / (time.monotonic() - start):,.0f} tokens/s")
    return {"signal": folder.name, "part": str(folder.part), "rows": rows, "shards": len(shards),
            "shards_scored_now": len(todo), "tokens_read": tokens, "seconds": round(time.monotonic() - start, 2)}


def _header(kv: Kv, job: ScoreJob, spec: SignalSpec, reader: _Reader, teacher: Mapping[str, Any],
            scorer: Scorer) -> SignalHeader:
    """What the signal says of itself; a hidden one's head is stored on the way."""
    params = {"attached": reader.attached, "dtype": str(jnp.dtype(scorer.model.dtype)),
              "batch_tokens": job.batch_tokens, "skip_long": job.skip_long,
              "on": None if job.on is None else [r.name.lower() for r in job.on]}
    if spec.kind == "sampled":
        params |= {"draws": "systematic", "temperature": spec.temperature}
    precision = job.precision or spec.precision
    if spec.kind == "sampled" and not precision and (spec.temperature != 1 or reader.mapping is not None):
        precision = "u16"  # with importance, or without the draws of ids that were lost, weights are no counts
    head, width = None, spec.k
    if spec.kind == "hidden":
        width = scorer.model.config.hidden_size
        head = write_head(kv, job.signal_name, scorer.head)
    return SignalHeader(kind=spec.kind, k=width, precision=precision, teacher=teacher, params=params, head=head)


NAN_SHARE = 0.1
"""Rows of a shard of which the teacher may say NaN: they are counted and left without signal. With more of them it is
the teacher that is wrong."""


def _score_shard(scorer: Scorer, reader: _Reader, items: Sequence[_Item], header: SignalHeader
                 ) -> tuple[list[SignalRow], Tally]:
    read = [i for i in items if i.source is not None]
    found, totals = scorer([i.source for i in read])
    broken = [i.number for i, s in zip(read, found) if not s.mask.any() and scorer.wanted(i.source).any()]
    if len(broken) > max(1, NAN_SHARE * len(read)):
        raise ValueError(f"the teacher's log-probs are not finite for {len(broken)} of {len(read)} rows, the first is "
                         f"row {broken[0]}: compute in another dtype (--dtype float32), or check the teacher's weights")
    by_item = iter(found)
    signals = [reader.attach(i, None if i.source is None else next(by_item), header) for i in items]
    reasons = [i.why for i in items if i.why] + ["not_finite"] * len(broken)
    aligned = [i.alignment for i in items if i.alignment is not None]
    return signals, Tally(totals=totals, rows=len(items), supervised=sum(a.supervised for a in aligned),
                          covered=sum(a.covered for a in aligned),
                          begun=sum(a.covered if a.begun is None else a.begun for a in aligned),
                          skipped={why: reasons.count(why) for why in sorted(set(reasons))})


def _student_tokenizer(store: TraceStore, job: ScoreJob) -> Tokenizer:
    """The tokenizer of the stored rows. Raises ValueError when it cannot be loaded or is not the store's."""
    about = store.header.tokenizer
    name = job.student_tokenizer or str(about.get("name", ""))
    try:
        tok = load_tokenizer(name)
    except ValueError as e:
        raise ValueError(f"the teacher's vocabulary is not the store's ({about.get('name')}): their tokens are "
                         "attached by bytes, which takes the store's tokenizer too, and it cannot be loaded here "
                         f"({e}). Give --student-tokenizer") from None
    if tok.hash != about.get("hash"):
        raise ValueError(f"tokenizer {name} (hash {tok.hash}) did not make this store: it was made with "
                         f"{about.get('name')} (hash {about.get('hash')}). Give that one as --student-tokenizer")
    return tok


def earlier(store: TraceStore, name: str, rows: int) -> Tally:
    """Sums of the shards that an earlier start has committed."""
    done = [c for c in store.shards if c.rows and c.first_row < rows]
    read = store.kv.read_many([tally_key(name, c) for c in done])
    return sum((Tally.from_json(json.loads(data)) for data in read if data is not None), Tally())


def _identity(job: ScoreJob, params: Any, tok: Tokenizer) -> dict[str, Any]:
    where = Path(job.teacher)
    return {"model": str(where.resolve()) if where.exists() else job.teacher, "fingerprint": fingerprint(params),
            "tokenizer": tok.hash, "template": template_id(tok)}


def fingerprint(params: Any) -> str:
    """Hash of 64 values of every parameter: tells one checkpoint from another without reading all of it."""
    def some(x: Any) -> Any:
        at = np.unique(np.linspace(0, x.size - 1, min(64, x.size)).astype(np.int64))
        return x[np.unravel_index(at, x.shape)].astype(jnp.float32)

    leaves = dict(paths(params))
    values = jax.device_get(jax.jit(lambda tree: {name: some(x) for name, x in tree.items()})(leaves))
    h = hashlib.blake2b(digest_size=8)
    for name, leaf in leaves.items():
        h.update(f"{name}{leaf.shape}".encode() + values[name].tobytes())
    return h.hexdigest()
