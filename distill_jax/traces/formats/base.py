"""What every importer shares: the `Format` protocol, and a `Sample` of a row turned into a `Trace`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

from distill_jax.core.roles import ANSWER, INJECTED, QUESTION, SYSTEM, THINK
from distill_jax.traces.formats.facts import RowFacts
from distill_jax.traces.formats.read import Row
from distill_jax.traces.formats.text import (
    Reject,
    split_rationale,
    split_response,
    strip_answer,
    strip_thinking,
    unwrap_json,
)
from distill_jax.traces.trace import (
    FLAG_EMPTY_ANSWER,
    FLAG_TRUNCATED,
    FLAG_UNTERMINATED,
    Provenance,
    Segment,
    Trace,
)


@runtime_checkable
class Format(Protocol):
    """An importer for one way of writing traces down."""

    @property
    def name(self) -> str: ...

    def records(self, row: Row, source: str, index: int) -> list[Trace | Reject]:
        """Every sample of the row, in order: a trace, or why it is none. Raises Reject for the row as a whole.

        source, index   file and number of the row in it, for the provenance
        """
        ...

    def traces(self, row: Row, source: str, index: int) -> list[Trace]:
        """The traces of the row. Raises Reject if there are none."""
        ...


@dataclass(frozen=True, kw_only=True)
class Style:
    """What the first rows of a file say about all its responses.

    prompt_opens   the prompt ended with the opening tag: a response without any tag is unfinished thinking
    rationale      responses end with `#### 18` or "The answer is 18": what comes before is the thinking
    json           responses are objects `{"reasoning": ..., "answer": ...}`
    """

    prompt_opens: bool = False
    rationale: bool = False
    json: bool = False


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One written turn of a row, before it is split. `thinking` is None unless the source keeps it apart."""

    text: str
    thinking: str | None = None
    correct: bool | None = None
    scores: Mapping[str, float] = field(default_factory=dict)
    finish: str = ""
    teacher: str = ""
    meta: Mapping[str, Any] = field(default_factory=dict)


def written_segments(sample: Sample, style: Style, turn: int = 0) -> tuple[list[Segment], list[str]]:
    """THINK, ANSWER (and INJECTED) segments of a turn, with its flags. Raises Reject where nothing was written."""
    cut = is_cut(sample.finish)
    flags: list[str] = []
    thinking, answer = sample.thinking, sample.text
    if not answer.strip() and not (thinking or "").strip():
        raise Reject("empty_response", repr(sample.text[:40]))
    if thinking is not None:
        thinking, answer = strip_thinking(thinking), strip_answer(answer) if thinking else answer
        if not answer.strip():
            flags += [FLAG_UNTERMINATED, FLAG_EMPTY_ANSWER] if cut and thinking.strip() else [FLAG_EMPTY_ANSWER]
    elif style.json:
        thinking, answer = unwrap_json(answer)
    elif style.rationale and (rationale := split_rationale(answer)) is not None:
        thinking, answer = rationale
    else:
        split = split_response(answer, style.prompt_opens)
        thinking, answer = split.thinking, split.answer or ""
        flags += split.flags
    if cut:
        flags.append(FLAG_TRUNCATED)
    if not answer.strip() and not (thinking or "").strip():
        raise Reject("empty_response", repr(sample.text[:40]))
    segments = [Segment(role=THINK, text=thinking, turn=turn)] if thinking else []
    if FLAG_UNTERMINATED not in flags:
        segments += answer_segments(answer, turn)
    return segments, flags


def is_cut(finish: str) -> bool:
    """Whether a finish reason says that the length limit was hit."""
    return finish.lower() in ("length", "max_tokens", "max_length")


def answer_segments(answer: str, turn: int) -> list[Segment]:
    """The answer; where a program ran inside it, each ```output block is INJECTED: the model did not write it."""
    opening, closing = "```output\n", "```"
    segments: list[Segment] = []
    rest = answer
    while "```python" in answer and opening in rest:
        before, _, after = rest.partition(opening)
        shown, mark, tail = after.partition(closing)
        if not mark:
            break
        segments.append(Segment(role=ANSWER, text=before, turn=turn))
        segments.append(Segment(role=INJECTED, text=opening + shown + mark, turn=turn))
        rest = tail
    segments.append(Segment(role=ANSWER, text=rest, turn=turn))
    return [s for s in segments if s.text] or segments[-1:]


def make_trace(prompt: Sequence[Segment], sample: Sample, facts: RowFacts, style: Style) -> Trace:
    """The trace of one sample. Its verdict is the source's own flag until the gold answer is checked."""
    segments, flags = written_segments(sample, style, prompt[-1].turn)
    meta = {**facts.meta, **sample.meta}
    if sample.correct is not None:
        meta["source_correct"] = sample.correct
    return Trace(
        segments=(*prompt, *segments), gold=facts.gold, verdict=sample.correct, flags=tuple(dict.fromkeys(flags)),
        scores=sample.scores, meta=meta,
        provenance=Provenance(source=facts.source, row=facts.index, teacher=sample.teacher or facts.teacher,
                              sampling=facts.sampling))


def prompt_segments(question: str, system: str, earlier: Sequence[tuple[str, str]] = ()) -> list[Segment]:
    """SYSTEM, the (question, answer) turns before, and QUESTION of a row. Raises Reject for a blank question."""
    if not question.strip():
        raise Reject("no_question", "the question is empty")
    out = [Segment(role=SYSTEM, text=system)] if system else []
    for turn, (asked, answered) in enumerate(earlier):
        out += [Segment(role=QUESTION, text=asked, turn=turn), Segment(role=ANSWER, text=answered, turn=turn)]
    return [*out, Segment(role=QUESTION, text=question, turn=len(earlier))]


def only_traces(records: Sequence[Trace | Reject]) -> list[Trace]:
    """The traces among `records`; raises the first Reject if there are none."""
    out = [r for r in records if isinstance(r, Trace)]
    if not out:
        raise next((r for r in records if isinstance(r, Reject)), Reject("no_response"))
    return out
