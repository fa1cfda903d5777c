"""Rows with one question and one or several written answers: every format that is not a conversation."""

from dataclasses import dataclass

from distill_jax.traces.formats.base import Style, make_trace, only_traces, prompt_segments
from distill_jax.traces.formats.facts import row_facts
from distill_jax.traces.formats.fields import Fields, blank
from distill_jax.traces.formats.layout import Layout, find_layout, samples
from distill_jax.traces.formats.read import Row
from distill_jax.traces.formats.text import Reject, as_text
from distill_jax.traces.trace import Trace


@dataclass(frozen=True, kw_only=True)
class RowFormat:
    """`name` says which of the known formats the first rows have; all are read by the same rules.

    layout   where the answers of most rows are; a row without these fields is looked at by itself
    """

    name: str
    fields: Fields = Fields()
    style: Style = Style()
    layout: Layout | None = None

    def records(self, row: Row, source: str, index: int) -> list[Trace | Reject]:
        row = merge_question(row)
        question = self.fields.get(row, "question")
        if question is None:
            raise Reject("no_question", f"fields: {', '.join(map(str, row))}")
        layout = self.layout if self.layout is not None and self.layout.fits(row) else find_layout(row, self.fields)
        found = [] if layout is None else list(samples(row, layout, self.fields))
        if layout is None or not found:
            raise Reject("no_response", f"fields: {', '.join(map(str, row))}")
        facts = row_facts(row, self.fields, source, index, layout.response[0],
                          (self.fields.path(row, "question"), *layout.paths))
        prompt = prompt_segments(as_text(question), as_text(self.fields.get(row, "system") or ""), earlier(row))
        out: list[Trace | Reject] = []
        for sample in found:
            try:
                out.append(make_trace(prompt, sample, facts, self.style))
            except Reject as e:
                out.append(e)
        return out

    def traces(self, row: Row, source: str, index: int) -> list[Trace]:
        return only_traces(self.records(row, source, index))


def earlier(row: Row) -> list[tuple[str, str]]:
    """Earlier turns of an Alpaca-style row, `history: [[question, answer], ...]`. Raises Reject for one of another
    form, which cannot be left out: the last question may not be understood without it."""
    history = row.get("history")
    if blank(history):
        return []
    if not isinstance(history, list) or not all(
            isinstance(p, list) and len(p) == 2 and all(isinstance(t, str) for t in p) for p in history):
        raise Reject("malformed_history", str(history)[:80])
    return [(question, answer) for question, answer in history]


def merge_question(row: Row) -> Row:
    """One question where the source spreads it: body + question, passage + question, instruction + input, options;
    and the parts of a line `question||steps #### answer`."""
    text = row.get("text")
    if isinstance(text, str) and "||" in text and not {"question", "prompt"} & row.keys():
        question, _, rest = text.partition("||")
        steps, mark, answer = rest.partition("####")
        parts = {"thinking": steps.strip(), "answer": answer.strip()} if mark else {"answer": rest.strip()}
        return {k: v for k, v in row.items() if k != "text"} | {"question": question} | parts
    lower = {k.lower(): k for k in row if isinstance(k, str)}
    texts = {name: row[key] for name, key in lower.items() if isinstance(row[key], str)}
    question = texts.get("question")
    for before in ("body", "passage"):
        if before in texts and question is not None:
            question = f"{texts[before].rstrip()} {question}"
            spent = (lower[before], lower["question"])
            row = {k: v for k, v in row.items() if k not in spent} | {"question": question}
            lower["question"] = "question"
    if "instruction" in texts and texts.get("input"):
        row = {k: v for k, v in row.items() if k != lower["input"]} | {
            lower["instruction"]: f"{texts['instruction']}\n{texts['input']}"}
    options = row.get("options")
    if question is not None and isinstance(options, list) and options and all(isinstance(o, str) for o in options):
        row = row if options[0] in question else {**row, lower["question"]: "\n".join([question, *options])}
    return row
