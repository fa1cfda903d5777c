"""`distill-jax store ingest`: log-probs that an engine has computed already become a signal of a store.

The engine's tokens must be the stored ones: a row is used up to its first token that differs, as everything behind it
was said of another text. Rows that differ are counted; many of them mean another tokenizer or template, and end it.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from distill_jax.core.roles import SUPERVISED, Role
from distill_jax.data.tokenizer import Tokenizer
from distill_jax.jobs.progress import Ticker
from distill_jax.traces.formats.logprobs import Said, Token, parse
from distill_jax.traces.formats.read import BadRow, iter_rows
from distill_jax.traces.store import RowArrays, SignalHeader, SignalRow, TokenRow, TopKRow, TraceStore, blank

SAMPLE = 256
"""Rows of the dump that are looked at before anything is written."""
ANCHOR = 8
"""Tokens by which a stretch (a completion without its prompt) finds its place in a row."""


@dataclass(frozen=True, kw_only=True)
class IngestJob:
    """store: folder or URL. dump: file that `traces.formats.logprobs` describes, a row a line, in the rows' order.

    name        of the signal; default: the kind and k, like `score`
    k           outcomes kept a token at most; 0: only the log-prob of the token that stands there (a token signal)
    teacher     who said it, for the header
    on          roles whose tokens are kept; None: all
    max_wrong   share of the dump's rows that may differ from the store's, or hold values that are not log-probs
    """

    store: str
    dump: str
    name: str = ""
    k: int = 64
    teacher: str = ""
    precision: str = ""
    on: tuple[Role, ...] | None = SUPERVISED
    max_wrong: float = 0.01

    @property
    def signal_name(self) -> str:
        return self.name or (f"topk{self.k}" if self.k else "token")


class Ids:
    """Ids of tokens that a dump names by their bytes."""

    def __init__(self, tok: Tokenizer | None) -> None:
        self.tok = tok

    @cached_property
    def _by_bytes(self) -> dict[bytes, int]:
        if self.tok is None:
            raise ValueError("the dump names tokens by their text; give --tokenizer to know their ids, or ask the "
                             "engine for token ids (vLLM: return_tokens_as_token_ids)")
        known: dict[bytes, int] = {}
        for i in range(self.tok.real):
            known.setdefault(self.tok.token_bytes(i), i)
        return known

    def __call__(self, token: Token) -> int:
        """The token's id, -1 for one that is not there."""
        return self._by_bytes.get(token, -1) if isinstance(token, bytes) else int(token)


def ingest(job: IngestJob, tok: Tokenizer | None = None, ticker: Ticker | None = None) -> dict[str, Any]:
    """Write the signal. Returns {"signal", "rows", "rows_with_signal", "tokens", "wrong": {why: rows},
    "unknown_outcomes"}. Raises ValueError when too many rows differ: before anything is written where the first ones
    tell."""
    store = TraceStore.open(job.store)
    header = SignalHeader(kind="topk" if job.k else "token", k=job.k, precision=job.precision, teacher=job.teacher,
                          params={"ingested": Path(job.dump).name,
                                  "on": None if job.on is None else [r.name.lower() for r in job.on]})
    ids = Ids(tok)
    trial = _State(job, header, ids)  # before anything is written
    for number, said in islice(_in_order(job.dump, len(store), trial.wrong), SAMPLE):
        trial.signal(number, store.read([number])[0], said)
    trial.check(final=True)
    state = _State(job, header, ids)
    with (ticker or Ticker("ingest", len(store))) as shown, store.signal_writer(job.signal_name, header) as writer:
        first = writer.next_row
        for number, said in _in_order(job.dump, len(store), state.wrong):
            while writer.next_row < number:
                state.absent(writer.next_row)
                writer.append(blank(header, int(store.lengths()[writer.next_row])))
            if number == writer.next_row:  # rows before it were written by an earlier start
                writer.append(state.signal(number, store.read([number])[0], said))
                shown.at(writer.next_row, f"{sum(state.wrong.values())} rows wrong")
        while writer.next_row < len(store):
            state.absent(writer.next_row)
            writer.append(blank(header, int(store.lengths()[writer.next_row])))
        state.check(final=True)
    return {"signal": job.signal_name, "rows": len(store) - first, "rows_with_signal": state.good,
            "tokens": state.tokens, "wrong": dict(state.wrong), "unknown_outcomes": state.unknown}


def _in_order(dump: str, rows: int, wrong: Counter[str]) -> Iterator[tuple[int, Said | None]]:
    """(row of the store, what was said of it); None where the line cannot be read."""
    last = -1
    for line, row in enumerate(iter_rows(dump)):
        if isinstance(row, BadRow):
            wrong[f"unreadable ({row.reason})"] += 1
            number, said = last + 1, None
        else:
            try:
                said = parse(row)
            except (ValueError, TypeError, KeyError, AttributeError, IndexError) as e:
                raise ValueError(f"{dump}: line {line + 1}: {e}") from None
            number = last + 1 if said.row is None else said.row
        if not last < number < rows:
            raise ValueError(f"{dump}: line {line + 1} is row {number} after row {last}, the store has {rows} rows: a "
                             "dump must be in the order of the store's rows, one line each")
        last = number
        yield number, said


class _State:
    """Counts of an ingestion, and the signal of each row."""

    def __init__(self, job: IngestJob, header: SignalHeader, ids: Ids) -> None:
        self.job, self.header, self.ids = job, header, ids
        self.wrong: Counter[str] = Counter()
        self.first = ""
        self.good = self.seen = self.tokens = self.unknown = 0

    def absent(self, number: int) -> None:
        self.wrong["not in the dump"] += 1

    def signal(self, number: int, row: RowArrays, said: Said | None) -> SignalRow:
        """The signal of a row; what cannot be used is counted and left out."""
        self.seen += 1
        if said is None:
            return blank(self.header, len(row))
        tokens = np.array([self.ids(t) for t in said.tokens], np.int64)
        start = _place(row, tokens)
        if start is None:
            return self._refuse("other tokens", number, row, f"none of its tokens {tokens[:6].tolist()}... stand in it")
        here = row.tokens[start:start + len(tokens)]
        differs = np.flatnonzero(tokens[:len(here)] != here)
        usable = int(differs[0]) if len(differs) else len(here)
        if len(differs) or len(tokens) > len(here):
            got = int(tokens[usable])
            want = int(here[usable]) if usable < len(here) else "the end of the row"
            self._refuse("differs from some token on", number, row,
                         f"token {start + usable} is {want} in the store and {got} in the dump")
        out = self._filled(row, start, said, usable)
        if out is None:
            return self._refuse("not finite", number, row, "a log-prob is NaN or above 0")
        self.good += bool(out.mask.any())
        self.tokens += int(out.mask.sum())
        return out

    def _refuse(self, why: str, number: int, row: RowArrays, detail: str) -> SignalRow:
        self.wrong[why] += 1
        self.first = self.first or f"row {number}: {detail}"
        self.check()
        return blank(self.header, len(row))

    def check(self, final: bool = False) -> None:
        """Raises ValueError when more rows are wrong than the job allows; before the end only when it is plain."""
        bad = sum(n for why, n in self.wrong.items() if why != "not in the dump")
        if bad > max(1, self.job.max_wrong * self.seen) and (final or bad >= 20):
            raise ValueError(f"{self.job.dump}: {bad} of {self.seen} rows do not fit the store ({dict(self.wrong)}); "
                             f"the first: {self.first}. Was it made with the store's tokenizer and template, of the "
                             "same rows in the same order? --max-wrong allows more")
        if final and not self.good:
            raise ValueError(f"{self.job.dump}: nothing of it could be used: {dict(self.wrong)}; {self.first}")

    def _filled(self, row: RowArrays, start: int, said: Said, usable: int) -> TopKRow | TokenRow | None:
        """The signal of tokens start ... start + usable; None when a value cannot be a log-prob."""
        arrays = blank(self.header, len(row)).arrays()
        on = np.ones(len(row), bool) if self.job.on is None else np.isin(row.roles, [int(r) for r in self.job.on])
        on[0] = False
        for t, outcomes in zip(range(start, start + usable), said.outcomes):
            known: dict[int, float] = {}
            for token, value in outcomes.items():
                known.setdefault(self.ids(token), value)
            self.unknown += -1 in known
            known.pop(-1, None)
            if not on[t] or not known:
                continue
            if not all(value <= 1e-3 for value in known.values()):  # NaN compares false
                return None
            if not self.job.k:
                if int(row.tokens[t]) in known:
                    arrays["logprobs"][t], arrays["mask"][t] = known[int(row.tokens[t])], True
                continue
            best = sorted(((v, i) for i, v in known.items() if v > -np.inf), reverse=True)[:self.job.k]
            arrays["ids"][t, :len(best)] = [i for _, i in best]
            arrays["logprobs"][t, :len(best)] = [v for v, _ in best]
            arrays["mask"][t] = True
        if not self.job.k:
            return TokenRow(**arrays)
        return TopKRow(ids=arrays["ids"], logprobs=arrays["logprobs"], mask=arrays["mask"])


def _place(row: RowArrays, tokens: np.ndarray) -> int | None:
    """Where the dump's tokens begin in the row: at 0 for a whole row; a completion where its first tokens stand, the
    supervised part first."""
    if not len(tokens):
        return None
    head = tokens[:ANCHOR]
    supervised = np.flatnonzero(np.isin(row.roles, [int(r) for r in SUPERVISED]))
    for start in [0, *supervised[:1].tolist()]:
        if np.array_equal(row.tokens[start:start + len(head)], head):
            return start
    if len(row) < len(head):
        return None
    windows = np.lib.stride_tricks.sliding_window_view(row.tokens, len(head))
    found = np.flatnonzero((windows == head).all(axis=1))
    if len(found):
        return int(found[0])
    return 0 if len(tokens) == len(row) else None
