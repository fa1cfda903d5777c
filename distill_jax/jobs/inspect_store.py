"""What is in a trace store: its manifest, counts, histograms, signals, and one row token by token."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from distill_jax.core.batch import FOREIGN
from distill_jax.core.roles import ROLE_STYLE, SUPERVISED, Role
from distill_jax.data.tokenizer import Tokenizer, load_tokenizer
from distill_jax.traces.store import HiddenRow, Row, SignalReader, TokenRow, TopKRow, TraceStore

BAR = 40
SAMPLE = 128
"""Rows whose retained mass is looked at."""
MASS_EDGES = (0.0, 0.5, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.999, 0.9999, 1.0)


def summary(store: TraceStore) -> dict[str, Any]:
    """Counts of a store as plain JSON values; reads only commits, and a sample of each signal."""
    index = store.index()
    roles: Counter[str] = Counter()
    for commit in store.shards:
        roles.update(commit.body["roles"])
    verdicts = Counter({1: "right", 0: "wrong", -1: "unchecked"}[int(v)] for v in index.verdicts)
    return {
        "url": store.url, "rows": len(store), "tokens": int(index.lengths.sum(dtype=np.int64)),
        "shards": len(store.shards), "complete": store.complete, "bytes": stored_bytes(store.shards),
        "questions": len(set(index.groups)), "header": store.header.to_json(),
        "state": store.shards[-1].body["state"] if store.shards else {},
        "by_role_tokens": {r.name.lower(): roles[r.name.lower()] for r in Role if roles[r.name.lower()]},
        "verdicts": dict(verdicts), "flags": dict(Counter(f for row in index.flags for f in row)),
        "lengths": histogram(index.lengths, length_edges(index.lengths)),
        "signals": {name: signal_summary(store.signal(name)) for name in store.signals()},
    }


def stored_bytes(shards: Sequence[Any]) -> dict[str, int]:
    """Bytes on disk of each array over all shards."""
    out: Counter[str] = Counter()
    for commit in shards:
        for name, meta in commit.arrays.items():
            out[name] += sum(size for size, _ in meta.files.values())
    return dict(out)


def signal_summary(signal: SignalReader) -> dict[str, Any]:
    """Header, coverage, and over a sample of rows for topk the histogram of the retained mass, for token the mean
    log-prob, for sampled the mean number of distinct outcomes a token, for hidden the mean norm of the states."""
    out: dict[str, Any] = {"header": signal.header.to_json(), "rows": len(signal),
                           "bytes": stored_bytes(signal.shards)}
    ids = np.unique(np.linspace(0, max(len(signal) - 1, 0), min(SAMPLE, len(signal)), dtype=np.int64))
    name, measure = _MEASURES[signal.header.kind]
    values = np.concatenate([np.zeros(0), *(measure(row)[row.mask] for row in signal.read(ids))])
    if len(values):
        out[f"mean_{name}"] = float(values.mean())
        if name == "retained_mass":
            out[name] = histogram(values, MASS_EDGES)
    return out


_MEASURES: dict[str, tuple[str, Callable[[Any], np.ndarray]]] = {
    "topk": ("retained_mass", lambda row: 1.0 - row.tail),
    "token": ("logprob", lambda row: row.logprobs),
    "sampled": ("distinct_outcomes", lambda row: (row.ids >= 0).sum(axis=1)),
    "hidden": ("norm", lambda row: np.linalg.norm(row.states.astype(np.float32), axis=1) * row.scales)}
"""What a token of a signal is summed up by: [T] of a row."""


def length_edges(lengths: np.ndarray) -> list[int]:
    """0 and powers of two that cover the lengths."""
    top = int(lengths.max(initial=1))
    return [0, *(1 << i for i in range(int(np.log2(max(int(lengths.min(initial=1)), 1))), top.bit_length() + 1))]


def histogram(values: np.ndarray, edges: Sequence[float]) -> list[tuple[float, float, int]]:
    """(low, high, count) of the bins up to the last that holds something; the last bin includes its upper edge."""
    counts = np.histogram(values, bins=np.asarray(edges, np.float64))[0]
    found = np.flatnonzero(counts)
    if not len(found):
        return []
    return [(edges[i], edges[i + 1], int(counts[i])) for i in range(found[0], found[-1] + 1)]


def open_tokenizer(store: TraceStore, source: str | None) -> tuple[Tokenizer | None, str]:
    """(tokenizer, "") or (None, why not). `source` None: the one the header names, if it can be had."""
    name = source or str(store.header.tokenizer.get("name") or "")
    if not name:
        return None, "the header names no tokenizer"
    try:
        tok = load_tokenizer(name)
    except (ValueError, OSError, ImportError) as e:
        return None, f"cannot load tokenizer {name!r} ({str(e).splitlines()[0][:120]})"
    if tok.hash != store.header.tokenizer.get("hash"):
        return None, f"{name!r} is not the tokenizer that made this store (another hash)"
    return tok, ""


def print_summary(facts: Mapping[str, Any], console: Console) -> None:
    """The counts and histograms of `summary`."""
    tok = facts["header"]["tokenizer"]
    table = Table.grid(padding=(0, 2))
    total = max(facts["tokens"], 1)
    lines = [
        ("store", facts["url"]),
        ("rows", f"{facts['rows']:,} in {facts['shards']} shards, {facts['questions']:,} questions, "
                 + ("complete" if facts["complete"] else "NOT complete: its writer was interrupted or still runs")),
        ("tokens", f"{facts['tokens']:,}"),
        ("bytes/token", ", ".join(f"{n} {b / total:.2f}" for n, b in facts["bytes"].items()) or "-"),
        ("tokenizer", f"{tok.get('name', '?')}  {tok.get('real', '?')} ids  hash {tok.get('hash', '?')}"),
        ("template", facts["header"]["template"]),
        ("extra", str(facts["header"]["extra"])), ("writer state", str(facts["state"])),
        ("verdicts", ", ".join(f"{n:,} {k}" for k, n in sorted(facts["verdicts"].items())) or "-"),
        ("flags", ", ".join(f"{n:,} {k}" for k, n in sorted(facts["flags"].items())) or "none"),
    ]
    for name, value in lines:
        table.add_row(Text(name, style="bold"), Text(value))
    console.print(table)
    if facts["rows"]:
        console.print(Text("\ntokens by role", style="bold"))
        for role, count in facts["by_role_tokens"].items():
            style = ROLE_STYLE[Role[role.upper()]]
            console.print(Text(f"  {role:<10} {count:>12,}  {count / total:6.1%}  ") + _bar(count / total, style))
        console.print(Text("\ntokens a row", style="bold"))
        _print_histogram(facts["lengths"], lambda x: f"{int(x):,}", console)
    for name, signal in facts["signals"].items():
        _print_signal(name, signal, facts, console)


def _print_signal(name: str, signal: Mapping[str, Any], facts: Mapping[str, Any], console: Console) -> None:
    header = signal["header"]
    covered = "all rows" if signal["rows"] == facts["rows"] else f"{signal['rows']:,} of {facts['rows']:,} rows"
    kind = f"{header['kind']}:{header['k']}" if header["k"] else header["kind"]
    used = sum(signal["bytes"].values()) / max(facts["tokens"] * signal["rows"] / max(facts["rows"], 1), 1)
    console.print(Text.assemble(
        ("\nsignal ", "bold"), (name, "bold"), f"  {kind}, {header['precision']}, {covered}, about "
        f"{used:.1f} bytes/token\n  teacher {header['teacher']}\n  params {dict(header['params'])}"))
    if "retained_mass" in signal:
        console.print(Text(f"  retained mass, mean {signal['mean_retained_mass']:.4f}"))
        _print_histogram(signal["retained_mass"], lambda x: f"{x:g}", console)
    for key, title in (("mean_logprob", "log-prob"), ("mean_norm", "norm of the states"),
                       ("mean_distinct_outcomes", "distinct outcomes a token")):
        if key in signal:
            console.print(Text(f"  mean {title} {signal[key]:.4f}"))


def _print_histogram(bins: Sequence[tuple[float, float, int]], show: Callable[[float], str],
                     console: Console) -> None:
    most = max((n for _, _, n in bins), default=1)
    for low, high, count in bins:
        console.print(Text(f"  {show(low):>8} to {show(high):<8} {count:>10,}  ") + _bar(count / most, "blue"))


def _bar(share: float, style: str) -> Text:
    eighths = round(share * BAR * 8)
    return Text("█" * (eighths // 8) + ("", *"▏▎▍▌▋▊▉")[eighths % 8], style=style)


def token_bytes(row: Row, tok: Tokenizer | None) -> list[bytes]:
    """Bytes of every token: what it stands for, or without a tokenizer its slice of the segment (or row text) it came
    from."""
    if tok is not None:
        return [_bytes_of(tok, int(i)) for i in row.tokens]
    sources = [text.encode("utf-8", "surrogatepass") for text in (row.text, *(s.text for s in row.trace.segments))]
    return [sources[int(part) + 1][a:b] for part, (a, b) in zip(row.parts, row.spans)]


def _bytes_of(tok: Tokenizer, token: int) -> bytes:
    if token >= FOREIGN:
        return f"<teacher's {token - FOREIGN}>".encode()
    return tok.token_bytes(token) if 0 <= token < tok.real else f"<{token}?>".encode()


def running_text(raw: Sequence[bytes], roles: Sequence[Role]) -> Text:
    """The tokens as text, coloured by role; characters cut across tokens are put together again."""
    out, begin = Text(), 0
    for end in range(1, len(raw) + 1):
        if end == len(raw) or roles[end] != roles[begin]:
            out.append(_visible(b"".join(raw[begin:end]).decode("utf-8", "replace")), style=ROLE_STYLE[roles[begin]])
            begin = end
    return out


def print_row(store: TraceStore, number: int, tok: Tokenizer | None, console: Console, *, tokens: int = 32,
              start: int | None = None) -> None:
    """A row as running text coloured by role, then `tokens` of its tokens one a line with what the teacher said, from
    `start`, or from just before the first that a loss is taken on."""
    if not 0 <= number < len(store):
        raise ValueError(f"no row {number}; rows run from 0 to {len(store) - 1}")
    row = store.row(number)
    raw, roles = token_bytes(row, tok), [Role(int(r)) for r in row.roles]
    trace = row.trace
    console.print(Text.assemble((f"\nrow {number}", "bold"), f"  {len(row)} tokens, group {trace.group}, gold "
                                f"{trace.gold!r}, verdict {trace.verdict}, flags {list(trace.flags)}"))
    console.print(Text("roles: ") + Text(" ").join(
        Text(r.name.lower(), style=ROLE_STYLE[r]) for r in dict.fromkeys(roles)))
    console.print(running_text(raw, roles), soft_wrap=True)
    readers = {name: store.signal(name) for name in store.signals()}
    signals = {name: r.read([number])[0] for name, r in readers.items() if number < len(r)}
    table = Table(box=None, pad_edge=False)
    for name in ("t", "id", "token", "role", "step", "segment", *signals):
        table.add_column(name, justify="right" if name in ("t", "id", "step") else "left", no_wrap=True)
    if start is None:
        supervised = np.flatnonzero(np.isin(row.roles, [int(r) for r in SUPERVISED]))
        start = max(0, int(supervised[0]) - 4) if len(supervised) else 0
    for t in range(max(0, start), min(start + tokens, len(row))):
        style, part = ROLE_STYLE[roles[t]], int(row.parts[t])
        place = "-" if part < 0 else f"{part}[{row.spans[t, 0]}:{row.spans[t, 1]}]"
        cells = [Text(str(t)), Text(str(row.tokens[t])), Text(_shown(raw[t]), style=style),
                 Text(roles[t].name.lower(), style=style), Text(str(row.steps[t])), Text(place)]
        table.add_row(*cells, *(Text(_said(s, t, tok)) for s in signals.values()))
    console.print(table)
    if tokens < len(row):
        console.print(Text(f"{tokens} of {len(row)} tokens; --start and --tokens show others", style="dim"))


def _visible(text: str) -> str:
    """Keep line breaks and tabs, show other control characters."""
    return "".join(c if c in "\n\t" or c.isprintable() else repr(c)[1:-1] for c in text)


def _shown(raw: bytes) -> str:
    """One token on one line: its text in quotes, or its bytes where they are a part of a character."""
    try:
        return repr(raw.decode("utf-8"))
    except UnicodeDecodeError:
        return repr(raw)


def _said(signal: Any, t: int, tok: Tokenizer | None) -> str:
    """What the teacher said at token t: its three most probable outcomes, or the log-prob of the token there, or the
    norm of its state."""
    if not signal.mask[t]:
        return "-"
    if isinstance(signal, TokenRow):
        return f"{signal.logprobs[t]:.3f}"
    if isinstance(signal, HiddenRow):
        assert signal.scales is not None
        return f"norm {np.linalg.norm(signal.states[t].astype(np.float32)) * signal.scales[t]:.4g}"
    shares = np.exp(signal.logprobs[t, :3]) if isinstance(signal, TopKRow) else signal.weights[t, :3]
    name = lambda i: str(i) if tok is None else _shown(_bytes_of(tok, i))
    tail = signal.tail if isinstance(signal, TopKRow) else None
    rest = [f"tail {tail[t]:.3g}"] if tail is not None else [f"{(signal.ids[t] >= 0).sum()} drawn"]
    return "  ".join([f"{name(int(i))} {p:.3f}" for i, p in zip(signal.ids[t, :3], shares) if i >= 0] + rest)
