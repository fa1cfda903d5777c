"""Rows of a file as dicts: JSONL, a JSON list, an object that holds a list, Parquet, CSV, lines; each also gzipped.

The kind is told from the content, not from the name (except CSV and plain text, which have no signature).
"""

import csv
import gzip
import io
import json
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

Row = dict[str, Any]

_GZIP, _PARQUET = b"\x1f\x8b", b"PAR1"
_KINDS = "JSONL, JSON (a list, or an object holding a list), Parquet, CSV or .txt, each also as .gz"


@dataclass(frozen=True, kw_only=True)
class BadRow:
    """A row that could not be read, where the ones around it can: `reason` is a short code, `text` its beginning."""

    reason: str
    text: str


def read_rows(path: str | Path) -> Iterator[Row]:
    """Rows of `path` in order. Raises ValueError naming file (and line) if it is unreadable, empty or malformed."""
    for number, row in enumerate(iter_rows(path), start=1):
        if isinstance(row, BadRow):
            raise ValueError(f"{path}: row {number}: {row.reason}: {row.text[:80]!r}")
        yield row


def iter_rows(path: str | Path) -> Iterator[Row | BadRow]:
    """Like `read_rows`, but a malformed row comes as `BadRow`, so that the rest is not lost."""
    path = Path(path)
    empty = True
    try:
        for row in _rows(path):
            empty = False
            yield row if isinstance(row, dict | BadRow) else BadRow(reason="not_an_object", text=str(row)[:200])
    except (OSError, EOFError, zlib.error) as e:  # gzip.BadGzipFile is an OSError
        reason = e.strerror if isinstance(e, OSError) and e.strerror else (str(e) or type(e).__name__)
        raise ValueError(f"{path}: cannot be read: {reason}") from None
    if empty:
        raise ValueError(f"{path}: holds no rows; expected {_KINDS}")


def _rows(path: Path) -> Iterator[Any]:
    with _open(path) as f:
        if f.read(4) == _PARQUET:
            f.seek(0)
            yield from _parquet_rows(path, f)
            return
        f.seek(0)
        stem = path.name.lower().removesuffix(".gz")
        newline = "" if stem.endswith(".csv") else None
        with io.TextIOWrapper(f, encoding="utf-8-sig", errors="surrogateescape", newline=newline) as text:
            if stem.endswith(".csv"):
                yield from _csv_rows(path, text)
            elif stem.endswith(".txt"):
                yield from ({"text": line.rstrip("\n")} for line in _checked(path, text) if line.strip())
            else:
                yield from _json_rows(path, text, lines=stem.endswith((".jsonl", ".ndjson")))


def _open(path: Path) -> IO[bytes]:
    f = open(path, "rb")  # noqa: SIM115 (handed to the caller, who closes it)
    packed = f.read(2) == _GZIP
    f.seek(0)
    return gzip.open(f, "rb") if packed else f  # type: ignore[return-value]


def _parquet_rows(path: Path, f: IO[bytes]) -> Iterator[Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        source = pq.ParquetFile(path if not isinstance(f, gzip.GzipFile) else pa.BufferReader(f.read()))
        for batch in source.iter_batches(batch_size=256):
            yield from batch.to_pylist()
    except pa.ArrowException as e:
        raise ValueError(f"{path}: not readable as Parquet: {str(e).splitlines()[0]}") from None


def _checked(path: Path, lines: Iterable[str]) -> Iterator[str]:
    """The lines of a file that has to be UTF-8 as a whole. Raises ValueError where it is not."""
    for number, line in enumerate(lines, start=1):
        if _not_utf8(line):
            raise ValueError(f"{path}: not UTF-8 text (line {number}); expected {_KINDS}")
        yield line


def _csv_rows(path: Path, text: IO[str]) -> Iterator[Any]:
    csv.field_size_limit(1 << 30)  # a trace is longer than the default of 128 KiB
    try:
        for row in csv.DictReader(_checked(path, text)):
            yield BadRow(reason="bad_csv", text=str(row)[:200]) if None in row or None in row.values() else row
    except csv.Error as e:
        raise ValueError(f"{path}: not readable as CSV: {e}") from None


def _json_rows(path: Path, text: IO[str], lines: bool) -> Iterator[Any]:
    """Decides by the first line that is not blank: JSONL if it is a whole object and more lines follow.

    lines   the name says JSONL, which settles what a single object on a single line is: one row.
    """
    first = ""
    for first in text:
        if first.strip():
            break
    if not first.strip():
        return
    try:
        head = None if _not_utf8(first) else _loads(first)
    except ValueError:
        head = None
    if head is None:
        rest = text.read()
        if first.lstrip()[0] == "{" and _has_json_line(rest):  # a JSONL file whose first line is broken
            yield _line(first)
            yield from (_line(x) for x in rest.split("\n") if x.strip())
            return
        yield from _unpack(path, _whole(path, "".join(_checked(path, (first + rest).splitlines(keepends=True)))))
        return
    following = (line for line in text if line.strip())
    second = next(following, None)
    if second is None:
        yield from [head] if lines else _unpack(path, head)
        return
    yield head
    yield _line(second)
    yield from (_line(x) for x in following)


def _not_utf8(text: str) -> bool:
    """Whether bytes that are no UTF-8 were met (they are kept as lone surrogates, which UTF-8 cannot hold)."""
    return not text.isascii() and any("\udc80" <= c <= "\udcff" for c in text)


def _loads(text: str) -> Any:
    """JSON, with null for NaN and infinities: what Python and pandas write where a value is missing."""
    return json.loads(text, parse_constant=lambda _: None)


def _line(line: str) -> Any:
    if _not_utf8(line):
        return BadRow(reason="not_utf8", text=line[:200].encode(errors="replace").decode().strip())
    try:
        return _loads(line)
    except (ValueError, RecursionError):
        return BadRow(reason="bad_json", text=line[:200].strip())


def _has_json_line(text: str) -> bool:
    """Whether one of the next lines is a whole object, which a pretty-printed JSON value does not have at depth 0."""
    for line in text[:1_000_000].split("\n")[:5]:
        if line.startswith("{"):
            try:
                return isinstance(json.loads(line), dict)
            except ValueError:
                continue
    return False


def _whole(path: Path, text: str) -> Any:
    try:
        return _loads(text)
    except RecursionError:
        raise ValueError(f"{path}: JSON nested too deeply") from None
    except ValueError as e:
        where = f"line {e.lineno}, column {e.colno}: {e.msg}" if isinstance(e, json.JSONDecodeError) else str(e)
        raise ValueError(f"{path}: neither JSON nor JSONL ({where}); expected {_KINDS}") from None


def _unpack(path: Path, value: Any) -> Iterator[Any]:
    """Rows of one JSON value: a list; the longest list of objects in an object; an object of objects; or itself."""
    if isinstance(value, list):
        yield from value
        return
    if not isinstance(value, dict):
        raise ValueError(f"{path}: holds a JSON {type(value).__name__}, not rows; expected {_KINDS}")
    lists = {k: v for k, v in value.items() if isinstance(v, list) and v and all(isinstance(x, dict) for x in v)}
    chats = {k for k, v in lists.items() if all({"role", "from"} & x.keys() for x in v)}  # one conversation, not rows
    if chats:
        yield value
    elif lists:
        key = max(lists, key=lambda k: len(lists[k]))
        # what the file says about all its rows (a system prompt, a name) belongs to each
        shared = {k: v for k, v in value.items() if isinstance(v, str)}
        yield from (shared | row for row in lists[key])
    elif len(value) > 1 and all(isinstance(v, dict) for v in value.values()):
        yield from ({"id": k} | v for k, v in value.items())
    else:
        yield value
