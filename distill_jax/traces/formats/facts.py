"""What all samples of a row share: gold answer, teacher, sampling settings, extras."""

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from distill_jax.traces.formats.fields import SAMPLING, Fields, blank, flag, lookup, scalars
from distill_jax.traces.formats.read import Row
from distill_jax.traces.formats.text import as_text, final_answer, last_boxed

REFERENCE = ("answer", "answers", "solution", "target", "label", "correct")
"""Fields that hold a reference answer even where it is also the text to train on: their own end is the gold."""

MAX_GOLD = 200  # characters; a longer reference without a recognisable end is no answer to compare with


@dataclass(frozen=True, kw_only=True)
class RowFacts:
    source: str
    index: int
    gold: str | None
    teacher: str
    finish: str
    sampling: dict[str, Any]
    meta: dict[str, Any]


def row_facts(row: Row, fields: Fields, source: str, index: int, response: str | None,
              used: Iterable[str | None] = ()) -> RowFacts:
    """Facts of a row. `response`: path of the text to train on; `used`: other paths that became segments."""
    gold, gold_path = find_gold(row, fields, response)
    read = {what: fields.path(row, what) for what in ("teacher", "finish", "correct", "system", "tools")}
    paths = [*used, *read.values(), response, gold_path]
    spent = {part.partition(".")[0] for path in paths if path for part in path.split("+")}
    meta = dict(scalars(row, spent | set(SAMPLING)))
    others = other_golds(row, fields, gold_path) if gold is not None else []
    if others:
        meta["golds"] = others
    tools = parse_tools(fields.get(row, "tools"))
    if tools:
        meta["tools"] = tools
    finish = fields.get(row, "finish")
    return RowFacts(
        source=source, index=index, gold=gold, meta=meta,
        teacher=as_text(fields.get(row, "teacher") or ""), finish=finish if isinstance(finish, str) else "",
        sampling={k: row[k] for k in SAMPLING if isinstance(row.get(k), int | float)})


def find_gold(row: Row, fields: Fields, response: str | None) -> tuple[str | None, str | None]:
    """(reference answer, its path); (None, None) where the row has none.

    A field other than the text to train on is preferred. A reference solution is cut to what it ends with (`####`,
    boxed, "the answer is"); a long text that ends with none of these is no gold.
    """
    rest = {k: v for k, v in row.items() if k != response}
    path = fields.path(rest, "gold")
    if path is None and response is not None and response.lower() in REFERENCE:
        path = response
    value = None if path is None else lookup(row, path)
    if path is None or blank(value):
        return None, path
    text = as_text(value[0] if isinstance(value, list) else value).strip()
    if text == "None":  # Python's None, written as text by many scripts
        return None, path
    end = final_answer(text)
    if end is None:
        end = text.lstrip("#").strip()
        end = end if 0 < len(end) <= MAX_GOLD else None
    solution = row.get("solution")
    if end is not None and path != "solution" and isinstance(solution, str):
        # some sources cut `\\boxed{\\frac{1}{2}}` at the first brace: the reference solution has the rest
        boxed = last_boxed(solution)
        end = boxed if boxed is not None and boxed.startswith(end) else end
    return end, path


def other_golds(row: Row, fields: Fields, gold_path: str | None) -> list[str]:
    """Further answers that count: the rest of a list of golds, and the fields for aliases."""
    value = lookup(row, gold_path) if gold_path else None
    aliases = fields.get(row, "golds")
    lists = [value[1:] if isinstance(value, list) else [], aliases if isinstance(aliases, list) else []]
    return list(dict.fromkeys(as_text(v) for items in lists for v in items))


def parse_tools(value: Any) -> list[Any]:
    """Tool schemas, which some sources write as a JSON string."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            return []
    return value if isinstance(value, list) else []


def source_verdict(value: Any) -> tuple[bool | None, dict[str, float]]:
    """(right or wrong, scores) of a flag or score of the source: a score in [0, 1] is right only when it is 1."""
    value = value if flag(value) is None else flag(value)
    if isinstance(value, bool):
        return value, {}
    if isinstance(value, int | float) and math.isfinite(value):
        return (value >= 1.0 if 0.0 <= value <= 1.0 else None), {"source": float(value)}
    return None, {}
