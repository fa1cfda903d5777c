"""Parts of a job that writes a store (`generate`, `ops`): each is a store of its own, `join_rows` makes one of them.

    parts/00003-of-00016/part.json      what it was begun with: header of the store, rows of a shard
    parts/00003-of-00016/...            the part's store, `rejects.jsonl`; `summary.json` once it is whole

The rows of the joined store are those of one process, in its order, and its shards are cut as one process cuts them.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from distill_jax.jobs.import_traces import REJECTS, SUMMARY, Output
from distill_jax.jobs.parts import ABOUT, Part
from distill_jax.traces.store import StoreHeader, TraceStore
from distill_jax.traces.store.kv import Kv
from distill_jax.traces.store.sealed import seal, unseal

PARTS = "parts"


def part_url(out: str, part: Part) -> str:
    return f"{out.rstrip('/')}/{PARTS}/{part.folder}"


def _folders(kv: Kv) -> list[str]:
    return [n for n in kv.folders(f"{PARTS}/") if re.fullmatch(r"\d{5,}-of-\d{5,}", n)]  # others are of signals


def begun(kv: Kv) -> dict[Part, dict[str, Any]]:
    """Parts of the store at `kv` that were begun, in order, with what they were begun with."""
    names = _folders(kv)
    keys = [f"{PARTS}/{n}/{ABOUT}" for n in names]
    out = {}
    for name, key, data in zip(names, keys, kv.read_many(keys)):
        if data is not None:
            index, _, count = name.partition("-of-")
            out[Part(index=int(index), count=int(count))] = unseal(data, f"{kv.url}: {key}")
    return out


def place(out: str, part: Part | None, header: StoreHeader, shard_rows: int, kind: str
          ) -> tuple[str, dict[str, Any] | None]:
    """Where a job (`kind` as in `Output`) or a part of it writes, and the summary of the whole where that is finished.

    Raises ValueError where parts there, or a store there, were made from something else or cut otherwise.
    """
    kv = Kv(out)
    parts = begun(kv)
    if part is None:
        if parts:
            raise ValueError(f"{out} holds {_said(parts)} of a {kind}; when all are whole, `distill-jax store join "
                             f"{out}` makes the store, or name another --out")
        return out, None
    with Output(out, header, shard_rows, kind, (PARTS,)) as whole:
        finished = whole.finished()
    if finished is not None:
        return out, finished
    about = json.loads(json.dumps({"header": header.to_json(), "shard_rows": shard_rows}))
    data = seal(about, "the part's settings")
    for other, there in parts.items():
        if other.count != part.count:
            raise ValueError(f"{out} was begun in {other.count} parts, this is part {part}; go on with those, or name "
                             "another --out")
        _require_same(out, other, there, about, f"part {part}")
    Kv(part_url(out, part)).write_new(ABOUT, data)
    return part_url(out, part), None


def _said(parts: Mapping[Part, Any]) -> str:
    first = next(iter(parts))
    return f"{len(parts)} of {first.count} parts"


def _require_same(out: str, part: Part, there: Mapping[str, Any], about: Mapping[str, Any], who: str) -> None:
    old, new = (dict(_leaves(a)) for a in (there, about))
    changed = [k.removeprefix("header.extra.") for k in {**old, **new} if old.get(k) != new.get(k)]
    if changed:
        raise ValueError(f"{out}: part {part} was begun with another {' and '.join(changed[:4])} than {who}; give all "
                         "parts the same settings, or name another --out")


def _leaves(value: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for k, v in value.items():
        if isinstance(v, Mapping):
            yield from _leaves(v, f"{prefix}{k}.")
        else:
            yield f"{prefix}{k}", v


def join_rows(out: str) -> dict[str, Any]:
    """Make the store of its parts, then delete them; the same call continues, or finds it done. Returns the summary.

    Raises ValueError naming the parts that are missing or unfinished, or that do not belong together.
    """
    kv = Kv(out)
    done = kv.read(SUMMARY)
    if done is None:
        summaries = _summaries(out, begun(kv))
        done = _join(out, kv, summaries)
    _delete(kv)
    return json.loads(done)


def _delete(kv: Kv) -> None:
    for name in _folders(kv):
        kv.delete(f"{PARTS}/{name}/")
    if not kv.folders(f"{PARTS}/"):
        kv.delete(f"{PARTS}/")


def _summaries(out: str, parts: Mapping[Part, dict[str, Any]]) -> dict[Part, dict[str, Any]]:
    """The summaries of all parts. Raises ValueError where one is missing, unfinished or of another job."""
    if not parts:
        raise ValueError(f"{out} has no parts to join; make them with --part I/N, or name a signal to join")
    first, about = next(iter(parts.items()))
    counts = sorted({p.count for p in parts})
    if len(counts) > 1:
        raise ValueError(f"{out} has parts of {' and of '.join(map(str, counts))}; delete those of one number below "
                         f"{PARTS}/")
    for part, there in parts.items():
        _require_same(out, part, there, about, f"part {first}")
    every = [Part(index=i, count=counts[0]) for i in range(counts[0])]
    found = {p: Kv(part_url(out, p)).read(SUMMARY) if p in parts else None for p in every}
    lacking = [f"{p} ({'unfinished' if p in parts else 'not begun'})" for p in every if found[p] is None]
    if lacking:
        more = f" and {len(lacking) - 8} more" if len(lacking) > 8 else ""
        raise ValueError(f"{out}: parts are missing or unfinished: {', '.join(lacking[:8])}{more}; run them again "
                         "with --part")
    return {p: json.loads(data) for p, data in found.items() if data is not None}


def _join(out: str, kv: Kv, summaries: Mapping[Part, dict[str, Any]]) -> bytes:
    first = next(iter(summaries))
    about = begun(kv)[first]
    summary = merged([{k: v for k, v in s.items() if k != "settings"} for s in summaries.values()])
    summary["settings"] = summaries[first]["settings"]
    if not summary["kept"]:
        _delete(kv)
        why = f"left after each op: {summary['after']}" if "after" in summary else f"rejected: {summary['rejected']}"
        raise ValueError(f"no trace kept of {summary['traces']:,} ({why}). No store was written")
    store = TraceStore.open_or_create(out, StoreHeader.from_json(about["header"]))
    with store.writer(about["shard_rows"]) as writer:
        before = 0
        for part in summaries:
            rows = TraceStore.open(part_url(out, part))
            for row in rows.rows(range(min(max(0, writer.next_row - before), len(rows)), len(rows))):
                writer.append(row)
            before += len(rows)
    rejects = [Kv(part_url(out, p)).read(REJECTS) or b"" for p in summaries]
    kv.write_many({REJECTS: b"".join(rejects)})
    data = json.dumps(summary, indent=1, ensure_ascii=False).encode()
    kv.write_many({SUMMARY: data})
    return data


def merged(values: Sequence[Any]) -> Any:
    """Summaries added up: numbers of the same name; of what is no number, the first."""
    first = values[0]
    if isinstance(first, Mapping):
        names = list(dict.fromkeys(k for v in values for k in v))
        names = names if len(names) == len(first) else sorted(names)
        return {k: merged([v[k] for v in values if k in v]) for k in names}
    if isinstance(first, list):
        return [merged(column) for column in zip(*values)]
    return sum(values) if isinstance(first, int | float) and not isinstance(first, bool) else first
