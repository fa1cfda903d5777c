"""`distill-jax ops`: text Ops over the traces of a store, into a new store.

The rows are worked off in units: whole questions where an Op looks at one, else consecutive rows; everything where one
looks at the corpus. What an Op draws is seeded by its unit, so that the result does not depend on who did which part.
A unit is committed before the next is begun. One process is one part, joined at once (`store_parts`).
"""

import json
import pkgutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from distill_jax.core import spec
from distill_jax.core.roles import Role
from distill_jax.data.render import render, template_id
from distill_jax.data.tokenizer import Tokenizer, load_tokenizer
from distill_jax.jobs.import_traces import REJECTS, SUMMARY
from distill_jax.jobs.parts import Part
from distill_jax.jobs.progress import Ticker
from distill_jax.jobs.store_parts import join_rows, place
from distill_jax.jobs.write_store import store_header
from distill_jax.traces import ops
from distill_jax.traces.ops.base import Op, run_op
from distill_jax.traces.store import Row, StoreHeader, TraceStore
from distill_jax.traces.store.writers import SHARD_TOKENS
from distill_jax.traces.trace import Trace

TALLIES = "tallies"


@dataclass(frozen=True, kw_only=True)
class OpsJob:
    """store, out: folders or URLs. ops: in their order. tokenizer: the new store's, by default that of the old one.
    part: only these rows, into a store of their own. shard_rows: rows of a shard, and about as many of a unit."""

    store: str
    out: str
    ops: tuple[Op, ...]
    tokenizer: str = ""
    seed: int = 0
    shard_rows: int = 256
    part: Part | None = None

    def __post_init__(self) -> None:
        if not self.ops:
            raise ValueError("nothing to do: name at least one --op")
        if self.shard_rows < 1:
            raise ValueError(f"--shard-rows must be at least 1, got {self.shard_rows}")
        wide = [op.name for op in self.ops if op.scope == "corpus"]
        if wide and self.part is not None:
            raise ValueError(f"{' and '.join(wide)}: looks at all traces at once and cannot run in parts; run it "
                             "without --part on the joined store, or question by question: --op 'NAME: {scope: group}'")


def parse_op(text: str) -> Op:
    """`dedup`, `max_length: {chars: 4000}` (files of `traces.ops`), or `module:Class` likewise."""
    value = spec.parse(text, f"--op {text}")
    name, fields = next(iter(value.items())) if isinstance(value, dict) and len(value) == 1 else (value, {})
    if not isinstance(name, str) or not isinstance(fields or {}, dict):
        raise ValueError(f"--op {text}: expected NAME, or 'NAME: {{FIELD: VALUE, ...}}'")
    if ":" not in name:
        name = f"distill_jax.traces.ops.{name}:{''.join(w.title() for w in name.split('_'))}"
    try:
        op = spec.build(spec.by_name(name), fields or {})
    except (ValueError, TypeError, ImportError) as e:
        raise ValueError(f"--op {text}: {e}; known: {', '.join(known_ops())}, or module:Class") from None
    if not isinstance(op, Op):
        raise ValueError(f"--op {text}: {name} is no Op (scope, keeps_context, name and a call)")
    return op


def known_ops() -> list[str]:
    """Names of the Ops of this package."""
    return sorted(m.name for m in pkgutil.iter_modules(ops.__path__) if m.name != "base")


def run_ops(job: OpsJob, ticker: Ticker | None = None) -> dict[str, Any]:
    """Run or continue the job; returns the summary: `traces` (read), `after` each Op, `kept`, `rejected`, tokens.

    Raises ValueError in one line for bad input, and where no trace is left.
    """
    source = TraceStore.open(job.store)
    if not len(source) or not source.complete:
        raise ValueError(f"{source.url} has {len(source)} rows" + ("" if source.complete else " and is not complete: "
                         "its writer was interrupted or still runs") + "; expected a whole store")
    tok = _tokenizer(source, job)
    settings = {"store": source.fingerprint(), "ops": [spec.to_plain(op) for op in job.ops], "seed": job.seed}
    header = store_header(tok, ops=settings)
    part = job.part or Part(index=0, count=1)
    url, finished = place(job.out, part, header, job.shard_rows, "ops")
    if finished is None:
        finished = _run_part(source, tok, job, header, url, part, ticker or Ticker("ops"))
    return join_rows(job.out) if job.part is None else finished


def _tokenizer(source: TraceStore, job: OpsJob) -> Tokenizer:
    about = source.header
    tok = load_tokenizer(job.tokenizer or str(about.tokenizer.get("name", "")))
    if not job.tokenizer and (tok.hash != about.tokenizer.get("hash") or template_id(tok) != about.template):
        raise ValueError(f"{source.url} was rendered with {about.tokenizer.get('name')} (hash "
                         f"{about.tokenizer.get('hash')}, template {about.template}), which is now another (hash "
                         f"{tok.hash}, template {template_id(tok)}); say with --tokenizer what to render for")
    return tok


def units_of(source: TraceStore, ops: Sequence[Op], size: int) -> list[np.ndarray]:
    """Row numbers of each unit: `size` rows or a shard's tokens, and the rest of the last question."""
    scopes, lengths = {op.scope for op in ops}, source.lengths()
    if "corpus" in scopes:
        return [np.arange(len(source))]
    if "group" in scopes:
        groups: dict[str, list[int]] = {}
        for i, group in enumerate(source.index().groups):
            groups.setdefault(group, []).append(i)
        blocks = list(groups.values())
    else:
        blocks = [[i] for i in range(len(source))]
    units: list[list[int]] = [[]]
    tokens = 0
    for block in blocks:
        if len(units[-1]) >= size or tokens >= SHARD_TOKENS:
            units.append([])
            tokens = 0
        units[-1] += block
        tokens += int(lengths[block].sum())
    return [np.array(sorted(u)) for u in units]


def _run_part(source: TraceStore, tok: Tokenizer, job: OpsJob, header: StoreHeader, url: str, part: Part,
              ticker: Ticker) -> dict[str, Any]:
    units = list(part.cut(list(enumerate(units_of(source, job.ops, job.shard_rows)))))
    store = TraceStore.open_or_create(url, header)
    if (there := store.kv.read(SUMMARY)) is not None:
        return json.loads(there)
    ticker.total = sum(len(rows) for _, rows in units)
    tallies = {int(k[:-5]): k for k in store.kv.keys(f"{TALLIES}/") if k.endswith(".json")}
    seen = 0
    with ticker, store.writer(job.shard_rows) as writer:
        for number, ids in units:
            seen += len(ids)
            if number in tallies:
                continue
            rows, tally = _unit(list(source.traces(ids)), job, tok, number)
            at = writer.state if writer.state.get("unit") == number else {"rows": 0}
            if writer.state.get("unit", -1) <= number:
                for i in range(at["rows"], len(rows)):
                    writer.append(rows[i], {"unit": number, "rows": i + 1})
                writer.commit()
            store.kv.write_many({f"{TALLIES}/{number:06d}.json": json.dumps(tally).encode()})
            ticker.at(seen, f"{writer.next_row:,} kept")
    store.refresh()
    return _publish(store, [n for n, _ in units], header)


def _unit(traces: Sequence[Trace], job: OpsJob, tok: Tokenizer, number: int) -> tuple[list[Row], dict[str, Any]]:
    """What the Ops leave of a unit, rendered, and its counts."""
    rng = np.random.default_rng([job.seed, 2, number])
    out, after = list(traces), []
    for op in job.ops:
        out = run_op(op, out, rng)
        after.append(len(out))
    rows, bad = [], []
    for trace in out:
        try:
            rows.append(render(trace, tok))
        except ValueError as e:
            bad.append({"reason": "cannot_render", "detail": str(e), "row": trace.to_json()})
    return rows, {"traces": len(traces), "after": after, "kept": len(rows), "rejects": bad}


def _publish(store: TraceStore, numbers: Sequence[int], header: StoreHeader) -> dict[str, Any]:
    tallies = list(_read_tallies(store, numbers))
    total = lambda name: sum(t[name] for t in tallies)
    roles = {r.name.lower(): sum(c.body["roles"].get(r.name.lower(), 0) for c in store.shards) for r in Role}
    rejects = [r for t in tallies for r in t["rejects"]]
    summary = {"traces": total("traces"),
               "after": [sum(t["after"][i] for t in tallies) for i in range(len(header.extra["ops"]["ops"]))],
               "kept": total("kept"), "rejected": {"cannot_render": len(rejects)},
               "tokens": sum(roles.values()), "by_role_tokens": roles, "settings": header.extra["ops"]}
    store.kv.write_many({REJECTS: b"".join(json.dumps(r).encode() + b"\n" for r in rejects)})
    store.kv.write_many({SUMMARY: json.dumps(summary, indent=1, ensure_ascii=False).encode()})
    return summary


def _read_tallies(store: TraceStore, numbers: Sequence[int]) -> Iterator[dict[str, Any]]:
    for data in store.kv.read_many(f"{TALLIES}/{n:06d}.json" for n in numbers):
        assert data is not None
        yield json.loads(data)
