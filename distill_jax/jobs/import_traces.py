"""`distill-jax import`: traces of others, verified and rendered into a store.

Killed at any moment and started again, the result is the same to the bit: the rows are read again from the start (that
is fast), verdicts of algebra come from the journal, and what the store already holds is not rendered again.

In the output folder: the store itself, `summary.json` (written last: the import is finished), `rejects.jsonl` and
`verdicts.jsonl` (the journal). In the summary `traces` = `kept` + the sum of `rejected`. A row that gives no trace
at all counts as one rejected trace; `rows_without_trace` says how many those are.
"""

import contextlib
import hashlib
import json
import os
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any

from distill_jax.core.roles import Role
from distill_jax.data.render import render
from distill_jax.data.tokenizer import Tokenizer, load_tokenizer
from distill_jax.jobs.import_rows import FOUND_WRONG, UNDECIDED, Candidate, Inputs, judged, open_sources
from distill_jax.jobs.progress import Ticker
from distill_jax.jobs.write_store import store_header
from distill_jax.rewards.checker import Checker
from distill_jax.rewards.journal import Journal
from distill_jax.traces.store import StoreHeader, TraceStore
from distill_jax.traces.store.kv import Kv
from distill_jax.traces.store.store import MANIFEST
from distill_jax.traces.store.writers import StoreWriter

SUMMARY, REJECTS, VERDICTS = "summary.json", "rejects.jsonl", "verdicts.jsonl"


@dataclass(frozen=True, kw_only=True)
class ImportJob:
    """out: folder or object-store URL. workers, timeout: of the answer checker (`rewards.checker.Checker`).
    shard_rows: traces committed at once, and so the most that a kill makes render again."""

    inputs: Inputs
    tokenizer: str
    out: str
    chat_template: str | None = None
    workers: int | None = None
    timeout: float = 5.0
    shard_rows: int = 256

    def __post_init__(self) -> None:
        if self.shard_rows < 1:
            raise ValueError(f"--shard-rows must be at least 1, got {self.shard_rows}")
        if self.workers is not None and self.workers < 1:
            raise ValueError(f"--workers must be at least 1, got {self.workers}")
        if self.timeout <= 0:
            raise ValueError(f"--check-timeout must be more than 0 seconds, got {self.timeout:g}")


def import_traces(job: ImportJob, ticker: Ticker | None = None) -> dict[str, Any]:
    """Run or continue an import; returns the summary. Raises ValueError in one line for bad input, and then nothing
    is left behind that was not there."""
    ticker = ticker or Ticker("import")
    tok = load_tokenizer(job.tokenizer, chat_template=job.chat_template)
    header = store_header(tok, **{"import": job.inputs.identity()})
    out = Output(job.out, header, job.shard_rows)
    finished = out.finished()
    if finished is not None:
        ticker.say(f"{job.out} holds the result of this import already: {finished['kept']:,} traces; nothing to do")
        return finished
    sources = open_sources(job.inputs)
    for s in sources:
        ticker.say(f"{s.file}: {s.format.name}")
    with out, ticker, Checker(job.workers, job.timeout) as checker:
        tally = Tally(settings=header.extra["import"], formats={s.file: s.format.name for s in sources})
        journal = Journal(out.journal) if job.inputs.verify else None
        try:
            write_candidates(out, judged(sources, job.inputs, checker, journal), tok, tally, ticker)
            if not tally.kept:
                raise ValueError(tally.nothing_kept())
        except ValueError:  # of a file that cannot be read to its end: no later start could go on from here
            out.discard()
            raise
        return out.publish(tally)


def write_candidates(out: "Output", candidates: Iterator[Candidate], tok: Tokenizer, tally: "Tally",
                     ticker: Ticker) -> None:
    """Render and append what is kept. `seen` counts the traces that were to be kept, `bad` names those among them
    that could not be rendered; both are committed with each shard."""
    state = out.state
    done, bad = int(state.get("seen", 0)), dict(state.get("unrenderable", {}))
    seen = 0
    for c in candidates:
        if c.rejected is None and c.trace is not None:
            seen += 1
            reason = bad.get(str(seen)) if seen <= done else None
            if seen > done:
                try:
                    row = render(c.trace, tok)
                    out.append(row, {"seen": seen, "unrenderable": dict(bad)})
                except ValueError as e:
                    reason = bad[str(seen)] = str(e)
            if reason is not None:
                c = replace(c, rejected="cannot_render", detail=reason)
        tally.add(c)
        if c.rejected is not None:
            out.reject(c)
        ticker.at(tally.rows_in, f"rows read, {tally.kept:,} of {tally.traces:,} traces kept")


@dataclass
class Tally:
    """The numbers of `summary.json`."""

    settings: dict[str, Any]
    formats: dict[str, str]
    rows_in: int = 0
    rows_without_trace: int = 0
    traces: int = 0
    kept: int = 0
    rejected: Counter[str] = field(default_factory=Counter)
    verdicts: Counter[str] = field(default_factory=Counter)
    methods: Counter[str] = field(default_factory=Counter)
    flags: Counter[str] = field(default_factory=Counter)
    files: dict[str, Counter[str]] = field(default_factory=dict)
    example: str = ""

    def add(self, c: Candidate) -> None:
        file = self.files.setdefault(c.file, Counter())
        self.rows_in += (c.sample == 0)
        self.traces += 1
        file.update(rows_in=int(c.sample == 0), traces=1, kept=int(c.rejected is None))
        if c.rejected is None:
            self.kept += 1
        else:
            self.rejected[c.rejected] += 1
            self.example = self.example or f"{c.file}, row {c.index + 1}: {c.rejected} {c.detail}".rstrip()
        if c.trace is None:
            self.rows_without_trace += (c.sample == 0)
            return
        self.verdicts[{True: "right", False: "wrong", None: "unchecked"}[c.trace.verdict]] += 1
        self.flags.update(c.trace.flags)
        if c.method:
            self.methods[c.method] += 1

    def nothing_kept(self) -> str:
        why = ", ".join(f"{n:,} {reason}" for reason, n in self.rejected.most_common())
        by_keep = self.rejected.keys() & {*UNDECIDED.values(), *FOUND_WRONG.values()}
        return (f"no trace kept of {self.rows_in:,} rows ({why}); first: {self.example[:300]}. No store was written"
                + (". If those are wanted: --keep all" if by_keep else ""))

    def to_json(self, store: TraceStore) -> dict[str, Any]:
        roles: Counter[str] = Counter()
        for shard in store.shards:
            roles.update(shard.body["roles"])
        counts = lambda c: dict(sorted(c.items()))
        return {
            "rows_in": self.rows_in, "rows_without_trace": self.rows_without_trace, "traces": self.traces,
            "kept": self.kept, "rejected": counts(self.rejected), "tokens": sum(roles.values()),
            "by_role_tokens": {r.name.lower(): roles[r.name.lower()] for r in Role if roles[r.name.lower()]},
            "verdicts": counts(self.verdicts), "checked_by": counts(self.methods),
            "timeouts": self.methods["timeout"], "flags": counts(self.flags),
            "files": {f: {"format": self.formats[f], **dict(n)} for f, n in self.files.items()},
            "settings": self.settings,
        }


class Output:
    """The output folder: nothing appears in it before the first trace is kept but the journal of verdicts.

    kind   entry of the header's `extra` that says what the store is made from
    other  names of further files that the job itself puts there
    """

    def __init__(self, url: str, header: StoreHeader, shard_rows: int, kind: str = "import",
                 other: Sequence[str] = ()) -> None:
        self.kv, self.header, self.shard_rows = Kv(url), header, shard_rows
        self.local = Path(self.kv.spec["path"]) if self.kv.spec["driver"] == "file" else None
        if self.local is not None and self.local.exists() and not self.local.is_dir():
            raise ValueError(f"{url} is a file; --out takes the folder or URL of a store to write")
        try:
            self.store: TraceStore | None = TraceStore.open(url)
        except FileNotFoundError:
            self.store = None
        self.created = self.local is not None and not self.local.exists()
        if self.store is not None:
            _same_inputs(self.store, header, kind)
        elif self.local is not None and self.local.exists():
            others = sorted(p.name for p in self.local.iterdir() if p.name not in (VERDICTS, *other))
            if others:
                raise ValueError(f"{url} is not empty and holds no trace store ({', '.join(others[:4])}); "
                                 "name another --out")
        self._rejects: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 (closed by __exit__)
        self._writer: StoreWriter | None = None
        self._began = False

    @property
    def journal(self) -> Path:
        """On this machine also when the store is not: an object store cannot append."""
        if self.local is not None:
            return self.local / VERDICTS
        name = hashlib.blake2b(self.kv.url.encode(), digest_size=8).hexdigest()
        return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "distill_jax" / f"{name}.{VERDICTS}"

    def finished(self) -> dict[str, Any] | None:
        """The summary, if this import is complete."""
        if self.store is None or not self.store.complete:
            return None
        summary = self.kv.read(SUMMARY)
        return json.loads(summary) if summary is not None else None

    @property
    def state(self) -> dict[str, Any]:
        """What was committed with the last shard."""
        if self.store is None:
            return {}
        self._writer = self._writer or self.store.writer(self.shard_rows)
        return self._writer.state

    def append(self, row: Any, state: dict[str, Any]) -> None:
        if self.store is None:
            self.store, self._began = TraceStore.create(self.kv.url, self.header), True
        self._writer = self._writer or self.store.writer(self.shard_rows)
        self._writer.append(row, state)

    def reject(self, c: Candidate) -> None:
        entry = {"reason": c.rejected, "detail": c.detail, "file": c.file, "row_number": c.index, "sample": c.sample,
                 "row": c.row}
        self._rejects.write(json.dumps(entry).encode() + b"\n")

    def discard(self) -> None:
        """Delete the store if this start began it."""
        if not self._began:
            return
        if self._writer is not None:
            self._writer.abort()
        for folder in ("shards/", "data/"):
            self.kv.delete(folder)
        self.kv.remove(MANIFEST)
        self.store = None

    def publish(self, tally: Tally) -> dict[str, Any]:
        """Complete the store, then the rejects, then the summary, each whole or not at all."""
        if self.store is None:
            self.store, self._began = TraceStore.create(self.kv.url, self.header), True
        (self._writer or self.store.writer(self.shard_rows)).close()
        self.store.refresh()
        summary = tally.to_json(self.store)
        self._rejects.seek(0)
        self.kv.write_many({REJECTS: self._rejects.read()})
        self.kv.write_many({SUMMARY: json.dumps(summary, indent=1, ensure_ascii=False).encode()})
        return summary

    def __enter__(self) -> "Output":
        return self

    def __exit__(self, *_: object) -> None:
        self._rejects.close()
        if self.store is None and self.local is not None:  # nothing was kept: leave nothing
            self.journal.unlink(missing_ok=True)
            if self.created:
                with contextlib.suppress(OSError):
                    self.local.rmdir()


def _same_inputs(store: TraceStore, header: StoreHeader, kind: str) -> None:
    """Raises ValueError that says what differs if the store there was made from something else."""
    old, new = store.header, header
    if kind not in old.extra:
        raise ValueError(f"{store.url} holds a store that was not made by {kind}; name another --out")
    a, b = old.extra[kind], json.loads(json.dumps(new.extra[kind]))
    changed = [f"{k}: {_brief(a.get(k))} there, {_brief(b[k])} now" for k in b if a.get(k) != b[k]]
    changed += [k for k in ("tokenizer", "template") if json.loads(json.dumps(getattr(new, k))) != getattr(old, k)]
    if changed:
        raise ValueError(f"{store.url} holds the result of another {kind} ({'; '.join(changed)}); name another --out")


def _brief(value: Any) -> str:
    """A setting in a few words; files by name and content hash."""
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return ", ".join(f"{Path(f['path']).name} ({f['hash'][:6]})" for f in value[:4]) + (", ..." * (len(value) > 4))
    return str(value)
