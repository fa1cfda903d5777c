"""Which importer fits the rows of a file, and what to tell the user where none does."""

from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import islice
from typing import Any

from distill_jax.traces.formats.base import Format, Sample, Style
from distill_jax.traces.formats.chat import WRITTEN, ChatFormat, conversation, last_text, speaker
from distill_jax.traces.formats.facts import find_gold
from distill_jax.traces.formats.fields import Fields, blank, lookup
from distill_jax.traces.formats.layout import Layout, common_layout, find_layout, samples
from distill_jax.traces.formats.own import TraceFormat, is_trace
from distill_jax.traces.formats.read import Row
from distill_jax.traces.formats.rows import RowFormat, merge_question
from distill_jax.traces.formats.text import has_close, is_json_response, lacks_open, opens, split_rationale

LOOK = 64
"""Rows looked at to detect the format."""


def detect(rows: Iterable[Row], fields: Fields | None = None, where: str = "input") -> Format:
    """The format of the first rows of a file. Raises ValueError that names the fields seen and how to map them.

    rows    at least one; the first `LOOK` are looked at
    fields  the user's `--map`
    where   what to call the input in the error
    """
    fields = fields or Fields()
    first = list(islice(rows, LOOK))
    if not first:
        raise ValueError(f"{where}: holds no readable rows")
    if not fields.mapped and 2 * sum(map(is_trace, first)) >= len(first):
        return TraceFormat()
    nowhere = [f"{what}={path}" for what, path in fields.mapped.items() if all(blank(lookup(r, path)) for r in first)]
    if nowhere:
        raise ValueError(f"{where}: --map {' '.join(nowhere)} leads nowhere in the first {len(first)} rows; fields of "
                         f"the first row: {', '.join(map(str, first[0]))}")
    chats = [c for row in first if (c := written_conversation(row, fields))]
    sampled = [row for row in first if is_sampled(row, fields)]
    if 2 * len(chats) >= len(first) > 2 * len(sampled) and "response" not in fields.mapped:
        name = "sharegpt" if any("from" in m for m in chats[0]) else "messages"
        return ChatFormat(name=name, fields=fields, style=style_of([last_text(messages) for messages in chats]))
    merged = [merge_question(row) for row in first]
    asked = [row for row in merged if fields.get(row, "question") is not None]
    layout = common_layout(asked, fields)
    if layout is None:
        raise ValueError(explain(merged[0], fields, where, has_question=bool(asked)))
    pinned = fields.pin({
        "question": most([fields.path(row, "question") for row in asked]),
        "gold": most([find_gold(row, fields, layout.response[0])[1] for row in asked])})
    found = [s for row in asked if layout.fits(row) for s in samples(row, layout, pinned)]
    return RowFormat(name=name_of(layout, found, asked[0]), fields=pinned, layout=layout,
                     style=style_of([s.text for s in found if s.thinking is None]))


def written_conversation(row: Row, fields: Fields) -> list[dict[str, Any]]:
    """The messages of a row in which a model speaks; [] for any other row."""
    messages = conversation(row, fields)[1]
    speaks = {"chosen", "rejected"} <= row.keys() or any(speaker(m) in WRITTEN for m in messages)
    return messages if speaks else []


def is_sampled(row: Row, fields: Fields) -> bool:
    """Whether a row has flagged samples of its question: a conversation beside them is but one of these."""
    layout = find_layout(row, fields)
    if fields.get(row, "question") is None or layout is None or layout.kind != "text":
        return False
    texts, flags = lookup(row, layout.response[0]), fields.get(row, "correct")
    return isinstance(texts, list) and isinstance(flags, list) and len(flags) == len(texts) > 0 and all(
        isinstance(t, str) for t in texts)


def most(paths: Sequence[str | None]) -> str | None:
    counts = Counter(p for p in paths if p is not None)
    return counts.most_common(1)[0][0] if counts else None


def style_of(texts: Sequence[str]) -> Style:
    """What the responses have in common: see `Style`."""
    if not texts:
        return Style()
    half = len(texts) / 2
    tagged = sum(has_close(t) or opens(t) for t in texts)
    return Style(
        prompt_opens=sum(lacks_open(t) for t in texts) >= half,
        rationale=sum(split_rationale(t) is not None for t in texts) >= half and tagged == 0,
        json=sum(is_json_response(t) for t in texts) >= half)


def name_of(layout: Layout, found: Sequence[Sample], row: Row) -> str:
    """Name of the format, for the log: it decides nothing."""
    text = found[0].text if found else ""
    if layout.kind == "pair":
        return "chosen and rejected"
    if layout.reference and layout.thinking is None and "\n#### " not in text:
        return "question and reference answer"
    if len(found) > 1 and isinstance(row.get(layout.response[0]), list | dict):
        return "several answers per question"
    if layout.thinking is not None:
        return "separate thinking and answer"
    if has_close(text) or opens(text):
        return "tagged thinking"
    if "\n#### " in text:
        return "gsm8k"
    return "alpaca" if any(str(k).lower() == "instruction" for k in row) else "prompt and completion"


def explain(row: Row, fields: Fields, where: str, has_question: bool) -> str:
    """One line on why these rows are no traces, with the option that would make them so."""
    seen = ", ".join(map(str, row)) or "none"
    if has_question:
        texts = {str(k): v for k, v in row.items() if isinstance(v, str) and k != fields.path(row, "question")}
        return (f"{where}: found a question but nothing anyone answered (fields: {seen}); name the answer with "
                f"--map response={max(texts, key=lambda k: len(texts[k])) if texts else 'FIELD'}, or take it from "
                "another file with --join FILE:KEY=ROW_KEY")
    path = conversation(row, fields)[0]
    if path is not None:
        return f"{where}: the conversations in {path!r} hold no assistant turn (fields: {seen}); nothing to learn from"
    key = fields.path(row, "id")
    return (f"{where}: found no question (fields: {seen}); name it with --map question=FIELD, or take it from "
            f"another file with --join FILE:{'id=' + key if key else 'KEY=ROW_KEY'}")
