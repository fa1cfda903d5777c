"""One batch, token by token: what the student will see, what it is trained on, what the teacher said."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from distill_jax.core.batch import FOREIGN, Batch, HiddenStates, TokenLogprob, TopK
from distill_jax.core.roles import ROLE_STYLE, SUPERVISED, Role
from distill_jax.data.assemble import by_role
from distill_jax.data.sources import BatchSource, PhasedSource
from distill_jax.data.tokenizer import Tokenizer


def show_batch(source: BatchSource | PhasedSource, step: int, tok: Tokenizer, console: Console, *,
               rows: Sequence[int] = (0,), tokens: int = 64, start: int | None = None) -> None:
    """Print the batch of a step: totals, then each of `rows` as text coloured by role and `tokens` of its tokens one a
    line (from `start`, or from just before the first supervised one)."""
    batch = source.batch(step)
    main: Any = batch.main
    for info in source.describe():
        console.print(Text(", ".join(f"{k} {v}" for k, v in info.items())))
    used = main.segment_ids > 0
    weighted = np.isin(main.roles, [int(r) for r in SUPERVISED]) & (main.weights > 0)
    console.print(Text(f"step {step}: {main.tokens.shape[0]} x {main.tokens.shape[1]}, {used.mean():.1%} filled, "
                       f"{int(main.segment_ids.max(axis=1).sum())} rows, {int(weighted.sum()):,} supervised tokens"))
    console.print(_legend(main.roles))
    for view, reading in source.readings.items():
        other: Any = batch.views[view]
        console.print(Text(f"view {view}, in the tokens of {reading.tokenizer.name}: "
                           f"{other.tokens.shape[0]} x {other.tokens.shape[1]}, "
                           f"{(other.segment_ids > 0).mean():.1%} filled"))
    for b in rows:
        if not 0 <= b < main.tokens.shape[0]:
            raise ValueError(f"no row {b}; the batch has rows 0 to {main.tokens.shape[0] - 1}")
        console.print(Text(f"\nrow {b}", style="bold"))
        console.print(_running(main, b, tok), soft_wrap=True)
        for view, reading in source.readings.items():
            console.print(Text(f"\nrow {b}, view {view}", style="bold"))
            console.print(_running(batch.views[view], b, reading.tokenizer), soft_wrap=True)
        console.print(_token_table(batch, b, tok, tokens, start))


def _running(stream: Any, b: int, tok: Tokenizer) -> Text:
    """The text of a row, coloured by role."""
    out = Text()
    for role, text in by_role(stream.tokens[b], stream.roles[b], tok):
        out.append(f"[{text}]" if role is Role.PAD else text, style=ROLE_STYLE[role])
    return out


def _legend(roles: np.ndarray) -> Text:
    counts = np.bincount(np.asarray(roles).ravel(), minlength=len(Role))
    return Text("  ").join(Text(f"{r.name.lower()} {counts[r]:,}", style=ROLE_STYLE[r]) for r in Role if counts[r])


def _token_table(batch: Batch, b: int, tok: Tokenizer, count: int, start: int | None) -> Table:
    main: Any = batch.main
    table = Table(box=None, pad_edge=False)
    for name in ("t", "segment", "position", "row", "id", "token", "role", "step", "weight", *main.fields,
                 *batch.signals):
        table.add_column(name, justify="left" if name in ("token", "role", *batch.signals) else "right", no_wrap=True)
    if start is None:
        first = np.flatnonzero(np.isin(main.roles[b], [int(r) for r in SUPERVISED]))
        start = max(0, int(first[0]) - 4) if len(first) else 0
    for t in range(start, min(start + count, main.tokens.shape[1])):
        role = Role(int(main.roles[b, t]))
        numbers = [main.segment_ids, main.positions, main.row_ids, main.tokens]
        cells = [Text(str(t)), *(Text(str(a[b, t])) for a in numbers),
                 Text(_shown(tok, int(main.tokens[b, t])), style=ROLE_STYLE[role]),
                 Text(role.name.lower(), style=ROLE_STYLE[role]), Text(str(main.step_ids[b, t])),
                 *(Text(f"{a[b, t]:g}") for a in (main.weights, *main.fields.values()))]
        table.add_row(*cells, *(Text(_said(s, b, t, tok)) for s in batch.signals.values()))
    return table


def _shown(tok: Tokenizer, token: int) -> str:
    if token >= FOREIGN:
        return f"<teacher's {token - FOREIGN}>"
    raw = tok.token_bytes(token) if 0 <= token < tok.real else f"<{token}?>".encode()
    try:
        return repr(raw.decode())
    except UnicodeDecodeError:
        return repr(raw)


def _said(signal: Any, b: int, t: int, tok: Tokenizer) -> str:
    """The teacher's three most probable outcomes and what is left, or the log-prob of the token that stands there, or
    the norm of its state."""
    if not signal.mask[b, t]:
        return "-"
    if isinstance(signal, TokenLogprob):
        return f"{signal.logprobs[b, t]:.3f}"
    if isinstance(signal, HiddenStates):
        return f"norm {np.linalg.norm(signal.states[b, t].astype(np.float32)) * signal.scales[b, t]:.4g}"
    p = np.exp(signal.logprobs[b, t]) if isinstance(signal, TopK) else signal.weights[b, t]
    order = np.argsort(-p, kind="stable")[:3]
    top = [f"{_shown(tok, int(signal.ids[b, t, j]))} {p[j]:.3f}" for j in order if signal.ids[b, t, j] >= 0]
    return "  ".join([*top, f"tail {max(0.0, 1.0 - p.sum()):.3f}"])
