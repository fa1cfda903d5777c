"""Where the written answers of a row are: found on the first rows of a file, then held for all of them.

Held, because a row whose answer is empty must be seen as such, and not be read from the next best field.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from distill_jax.traces.formats.base import Sample
from distill_jax.traces.formats.facts import REFERENCE, source_verdict
from distill_jax.traces.formats.fields import MODEL_FIELD, NAMES, Fields, blank, lookup
from distill_jax.traces.formats.read import Row
from distill_jax.traces.formats.text import as_text, has_close

_LATE = NAMES["response"][NAMES["response"].index("answer_text"):]
"""Response names that give way to `gemini_output`-like fields: beside one they hold the reference."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Fields that hold the written answers of a row.

    kind       text: one path, a text or a list of samples; models: `gemini_output`-like fields; flagged: fields like
               `6b_finetuning: {solution, is_correct}`; pair: `chosen` and `rejected`
    response   paths of the texts; thinking: path of the thinking that goes with them, None where they hold their own
    reference  the text is the reference answer: nobody else's is there
    """

    kind: Literal["text", "models", "flagged", "pair"]
    response: tuple[str, ...]
    thinking: str | None = None
    reference: bool = False

    def fits(self, row: Row) -> bool:
        """Whether the row has these fields, be they empty."""
        return all(path in row or head(path) in row for path in self.response)

    @property
    def paths(self) -> tuple[str, ...]:
        return self.response if self.thinking is None else (*self.response, self.thinking)


def head(path: str) -> str:
    return path.partition("+")[0].partition(".")[0]


def find_layout(row: Row, fields: Fields) -> Layout | None:
    """The layout of one row; None where nobody wrote anything."""
    mapped = "response" in fields.mapped
    if {"chosen", "rejected"} <= row.keys() and not mapped:
        return Layout(kind="pair", response=("chosen", "rejected"))
    path = fields.path(row, "response")
    if not mapped and (path is None or path.lower() in _LATE):
        models = tuple(k for k in row if is_model_field(k, row[k]))
        if models:
            return Layout(kind="models", response=models)
        flagged = tuple(k for k, v in row.items() if is_flagged(v))
        if flagged:
            return Layout(kind="flagged", response=flagged)
        several = next((k for k in row if is_several(row, k, fields)), None)
        if several is not None:
            return Layout(kind="text", response=(several,), thinking=find_thinking(row, fields, several, False))
    gold = fields.path(row, "gold")
    if path is None and gold is None:
        return None
    if path == "generated" and not blank(row.get("executed")) and not mapped:  # a program, and what it printed
        return Layout(kind="text", response=("executed",), thinking="generated")
    if path is None:
        assert gold is not None
        return Layout(kind="text", response=(gold,), thinking=find_thinking(row, fields, gold, True), reference=True)
    reference = path.lower() in REFERENCE
    return Layout(kind="text", response=(path,), thinking=find_thinking(row, fields, path, reference),
                  reference=reference)


def is_model_field(key: Any, value: Any) -> bool:
    return (isinstance(key, str) and bool(MODEL_FIELD.match(key)) and isinstance(value, str) and bool(value)
            and key not in NAMES["response"])


def is_flagged(value: Any) -> bool:
    return isinstance(value, dict) and bool(Fields().path(value, "correct")) and bool(text_path(value))


def text_path(sample: dict[str, Any]) -> str | None:
    """Path of the text of a sample that is an object; `text` is a name for it here, if not in a row."""
    return Fields().path(sample, "response") or ("text" if isinstance(sample.get("text"), str) else None)


def is_several(row: Row, key: Any, fields: Fields) -> bool:
    """Whether a field of any name holds samples: a list of flagged ones, or of texts that the row flags in parallel."""
    value = row[key]
    if not isinstance(key, str) or not isinstance(value, list) or not value:
        return False
    if all(isinstance(x, dict) for x in value):
        return all(is_flagged(x) or (isinstance(x.get("label"), bool) and is_flagged(x | {"correct": x["label"]}))
                   for x in value)
    flags = fields.get(row, "correct")
    return (isinstance(flags, list) and len(flags) == len(value) and all(isinstance(x, str) and x for x in value)
            and key not in (fields.path(row, "correct"), fields.path(row, "gold"), fields.path(row, "question")))


def by_model(value: Any) -> bool:
    """Whether this is `{"model a": "its text", "model b": ...}`."""
    return (isinstance(value, dict) and len(value) > 1 and all(isinstance(x, str) for x in value.values())
            and text_path(value) is None and not {"message", "body", "response"} & value.keys())


def find_thinking(row: Row, fields: Fields, response: str, reference: bool) -> str | None:
    """Path of thinking that is kept apart from `response`, None where the response holds its own."""
    if "thinking" in fields.mapped:
        return fields.mapped["thinking"]
    if any(isinstance(x, str) and has_close(x) for x in as_list(lookup(row, response))):
        return None
    rest = {k: v for k, v in row.items() if k != response}
    path = fields.path(rest, "thinking")
    if path is None and reference:
        path = fields.path(rest, "rationale")
    if path is None and row.get("thinking") == "":  # a model that was asked not to think
        path = "thinking"
    return path


def common_layout(rows: Sequence[Row], fields: Fields) -> Layout | None:
    """The layout most rows have; of equally many the first."""
    counts = Counter(x for row in rows if (x := find_layout(row, fields)) is not None)
    return counts.most_common(1)[0][0] if counts else None


def samples(row: Row, layout: Layout, fields: Fields) -> Iterator[Sample]:
    """The written answers of a row, in order."""
    if layout.kind == "pair":
        for key in layout.response:
            yield Sample(text=as_text(row[key]), correct=key == "chosen", meta={"preference": key})
        return
    if layout.kind in ("models", "flagged"):
        for key in layout.response:
            found = MODEL_FIELD.match(key) if layout.kind == "models" else None
            yield from read_sample(row[key], None, {"teacher": found["model"] if found else key})
        return
    (path,) = layout.response
    value = lookup(row, path)
    if by_model(value):
        for model, text in value.items():
            yield from read_sample(text, None, {"teacher": model})
        return
    values = value if isinstance(value, list) and not layout.reference else [value]
    if layout.reference and isinstance(value, list):  # answers that all count: the first is learnt
        values = value[:1]
    thoughts = as_list(lookup(row, layout.thinking)) if layout.thinking else []
    for i, item in enumerate(values):
        parent = {what: nth(fields.get(row, what), i, len(values)) for what in ("correct", "finish", "teacher")}
        thought = thoughts[i] if len(thoughts) == len(values) else None
        if isinstance(item, str) and has_close(item):
            thought = None  # the verbatim text has it all
        yield from read_sample(item, thought, parent)


def read_sample(value: Any, thought: Any, parent: dict[str, Any]) -> Iterator[Sample]:
    """Samples of one entry of a response: a text, an object with text and flag, or an API's answer with choices."""
    if isinstance(value, dict):
        inner = Fields()
        for envelope in ("response", "body", "message"):  # of a batch file, of an API's choice
            if isinstance(value.get(envelope), dict):
                value = {k: v for k, v in value.items() if k != envelope} | value[envelope]
        path = text_path(value) or next((k for k in NAMES["response"] if k in value), None)
        if path is None:
            return
        below = {what: inner.get(value, what) for what in ("correct", "finish", "teacher")}
        if below["correct"] is None and isinstance(value.get("label"), bool):
            below["correct"] = value["label"]
        think = find_thinking(value, inner, path, False)
        for item in as_list(value[path]) or [""]:
            yield from read_sample(item, value.get(think) if think else thought,
                                   parent | {k: v for k, v in below.items() if v is not None})
        return
    correct, scores = source_verdict(parent.get("correct"))
    yield Sample(text="" if blank(value) else as_text(value), thinking=None if thought is None else as_text(thought),
                 correct=correct, scores=scores, finish=as_text(parent.get("finish") or ""),
                 teacher=as_text(parent.get("teacher") or ""))


def as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]


def nth(value: Any, i: int, count: int) -> Any:
    """Entry i of a list that runs parallel to `count` samples; a value that is no such list goes to all of them."""
    if isinstance(value, list):
        return value[i] if len(value) == count else None
    return value
