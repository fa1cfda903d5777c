"""The reading half of an import: files -> candidates, each a trace with its verdict or the reason why it is none."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from distill_jax.rewards.checker import Checker
from distill_jax.rewards.journal import RULES, Journal
from distill_jax.rewards.verify import verify
from distill_jax.traces.formats import (
    LOOK,
    BadRow,
    Fields,
    Format,
    Join,
    Reject,
    detect,
    iter_rows,
    load_join,
    parse_map,
)
from distill_jax.traces.trace import Trace

Keep = Literal["all", "correct", "not-wrong"]
KEEP: tuple[Keep, ...] = ("all", "correct", "not-wrong")
CHUNK = 512  # candidates verified at once: what is checked in parallel, and journalled with one sync


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """What is imported and how; decides the result.

    maps, joins   `--map` and `--join` options
    verify        check answers against the gold; otherwise the source's own flags stand
    keep          all; correct: found right; not-wrong: not found wrong (nobody could check, or there is no gold)
    max_rows      of each file, None for all
    """

    files: tuple[str, ...]
    maps: tuple[str, ...] = ()
    joins: tuple[str, ...] = ()
    verify: bool = True
    keep: Keep = "not-wrong"
    max_rows: int | None = None

    def __post_init__(self) -> None:
        if not self.files:
            raise ValueError("nothing to import: name at least one file")
        if self.keep not in KEEP:
            raise ValueError(f"--keep {self.keep}: expected one of {', '.join(KEEP)}")
        if self.max_rows is not None and self.max_rows < 1:
            raise ValueError(f"--max-rows must be at least 1, got {self.max_rows}")
        for file in self.files:
            if Path(file).is_dir():
                raise ValueError(f"{file} is a folder; name the files in it")

    def identity(self) -> dict[str, Any]:
        """What a store made from these inputs says about them: the content of the files, not their dates."""
        sides = [j.rpartition(":")[0] for j in self.joins]
        return {"files": [fingerprint(f) for f in self.files], "map": list(self.maps), "join": list(self.joins),
                "join_files": [fingerprint(f) for f in sides], "verify": self.verify, "keep": self.keep,
                "max_rows": self.max_rows, "rules": RULES}


def fingerprint(file: str) -> dict[str, Any]:
    """Name, size and content hash of a file. Raises ValueError where it cannot be read."""
    try:
        with open(file, "rb") as f:
            digest = hashlib.file_digest(f, lambda: hashlib.blake2b(digest_size=12)).hexdigest()
            return {"path": file, "bytes": f.tell(), "hash": digest}
    except OSError as e:
        raise ValueError(f"{file}: cannot be read: {e.strerror}") from None


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One sample of a row, or the row itself where it gives none.

    trace      None when rejected before there was one
    rejected   why it is not kept, None while nothing speaks against it
    sample     number of the sample within its row
    method     what the check went by (`Verdict.method`), "" where nothing was checked
    """

    file: str
    index: int
    row: Any
    trace: Trace | None = None
    rejected: str | None = None
    detail: str = ""
    method: str = ""
    sample: int = 0


@dataclass(frozen=True, kw_only=True)
class Source:
    """One input file with its detected format."""

    file: str
    format: Format
    joins: tuple[Join, ...]
    max_rows: int | None

    def candidates(self) -> Iterator[Candidate]:
        """Every row's samples in order."""
        for index, row in enumerate(islice(iter_rows(self.file), self.max_rows)):
            at = Candidate(file=self.file, index=index, row=row.text if isinstance(row, BadRow) else row)
            if isinstance(row, BadRow):
                yield replace(at, rejected=row.reason)
                continue
            try:
                found = self.format.records(joined(row, self.joins), self.file, index)
            except Reject as e:
                yield replace(at, rejected=e.reason, detail=e.detail)
                continue
            except (TypeError, AttributeError, LookupError, RecursionError) as e:  # one odd row must not end the import
                yield replace(at, rejected="malformed_row", detail=repr(e))
                continue
            for n, record in enumerate(found):
                here = replace(at, sample=n)
                if isinstance(record, Reject):
                    yield replace(here, rejected=record.reason, detail=record.detail)
                elif not encodable(record):
                    yield replace(here, rejected="not_unicode", detail="holds half of a surrogate pair")
                else:
                    yield replace(here, trace=record)


def joined(row: dict[str, Any], joins: Sequence[Join]) -> dict[str, Any]:
    for join in joins:
        row = join.apply(row)
    return row


def encodable(trace: Trace) -> bool:
    """Whether all text is Unicode that a file can hold; JSON escapes can smuggle in what is not."""
    try:
        for s in trace.segments:
            s.text.encode()
        json.dumps([trace.gold, dict(trace.meta)], ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


def open_source(file: str, fields: Fields, joins: tuple[Join, ...], max_rows: int | None) -> Source:
    """Detect the format of a file. Raises ValueError, in one line, for a file that gives no traces."""
    first: list[dict[str, Any]] = []
    missing: Reject | None = None
    for row in islice(iter_rows(file), 50 * LOOK):
        if isinstance(row, BadRow):
            continue
        try:
            first.append(joined(row, joins))
        except Reject as e:
            missing = missing or e
        if len(first) == LOOK:
            break
    if not first:
        raise ValueError(f"{file}: no row can be used" + (f": {missing}" if missing else ": all of them are malformed"))
    return Source(file=file, format=detect(first, fields, file), joins=joins, max_rows=max_rows)


def open_sources(inputs: Inputs) -> list[Source]:
    """All files, opened and detected, before anything is written. Raises ValueError for the first that is unfit."""
    fields = parse_map(inputs.maps)
    joins = tuple(load_join(j) for j in inputs.joins)
    return [open_source(f, fields, joins, inputs.max_rows) for f in inputs.files]


def judged(sources: Sequence[Source], inputs: Inputs, checker: Checker, journal: Journal | None) -> Iterator[Candidate]:
    """Candidates of all sources, verified and sorted into kept and rejected; the order is that of the files."""
    stream = (c for s in sources for c in s.candidates())
    while chunk := list(islice(stream, CHUNK)):
        having = [c.trace for c in chunk if c.trace is not None]
        results = iter(verify(having, checker, journal) if inputs.verify else [(t, None) for t in having])
        for c in chunk:
            if c.trace is None:
                yield c
                continue
            trace, verdict = next(results)
            method = verdict.method if verdict is not None else ""
            why = refusal(trace, method, inputs.keep)
            detail = "" if why is None or verdict is None else f"found {verdict.extracted!r}, gold {trace.gold!r}"
            yield replace(c, trace=trace, method=method, rejected=why, detail=detail)


UNDECIDED = {"timeout": "check_timed_out", "crash": "check_crashed", "unclear": "answer_unclear", "": "not_checked"}
FOUND_WRONG = {"unterminated": "unterminated_think", "no_answer": "no_answer_found", "no_gold": "source_says_wrong",
               "": "source_says_wrong", "wrong": "wrong_answer"}


def refusal(trace: Trace, method: str, keep: Keep) -> str | None:
    """Why a verified trace is not kept, None if it is."""
    if keep == "all" or trace.verdict is True:
        return None
    if trace.verdict is None:
        return UNDECIDED.get(method, "not_checked") if keep == "correct" else None
    return FOUND_WRONG.get(method, "wrong_answer")
