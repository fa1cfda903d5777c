"""`Trace`: one question with one reasoned answer, and everything known about where it came from.

A frozen record of plain Python values: it is what importers make, Ops map, and the store keeps as JSON beside
the tokens. Never imports jax.
"""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from distill_jax.core.roles import ANSWER, INJECTED, QUESTION, SYSTEM, THINK, TOOL, TOOL_CALL, Role

FLAG_MISSING_OPEN = "missing_open_think"  # `</think>` without `<think>`: the prompt opened it
FLAG_UNTERMINATED = "unterminated_think"  # thinking that never ends: there is no answer
FLAG_EMPTY_ANSWER = "empty_answer"
FLAG_TRUNCATED = "truncated"  # the generator hit its length limit
FLAGS = (FLAG_MISSING_OPEN, FLAG_UNTERMINATED, FLAG_EMPTY_ANSWER, FLAG_TRUNCATED)


@dataclass(frozen=True, kw_only=True)
class Segment:
    """A run of text with one role. Segments of a multi-turn trace follow each other in order.

    step   reasoning step from 1 (THINK segments that were split), 0 where steps are not known
    turn   number of the assistant turn it belongs to; prompts carry the number of the turn they lead to
    """

    role: Role
    text: str
    step: int = 0
    turn: int = 0


@dataclass(frozen=True, kw_only=True)
class Encoded:
    """Token ids as they were sampled. `tokenizer` is the hash of the tokenizer that made them.

    ids int32 [T] of prompt and completion; prompt_length; logprobs float32 [T] behaviour log-probs (0 on the
    prompt) or None; injected bool [T] (tokens not chosen by the model) or None.
    """

    tokenizer: str
    ids: np.ndarray
    prompt_length: int
    logprobs: np.ndarray | None = None
    injected: np.ndarray | None = None


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """Where a trace came from: file and row, who wrote it and how, which traces and Ops led to it."""

    source: str = ""
    row: int = -1
    teacher: str = ""
    sampling: Mapping[str, Any] = field(default_factory=dict)
    parents: tuple[str, ...] = ()
    ops: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Trace:
    """One question, its reasoning and answer.

    gold      reference answer, when known
    group     identity of the question: traces with one group answer the same question
    verdict   True/False when the answer was checked, None when not (no gold, or the check timed out)
    flags     recognised defects, from `FLAGS`
    scores    numbers by name (reward parts, lengths, engine log-probs)
    meta      JSON-able extras (domain, level, k, gold position, alternatives of gold under "golds")
    """

    segments: tuple[Segment, ...]
    gold: str | None = None
    group: str = ""
    verdict: bool | None = None
    flags: tuple[str, ...] = ()
    scores: Mapping[str, float] = field(default_factory=dict)
    meta: Mapping[str, Any] = field(default_factory=dict)
    provenance: Provenance = Provenance()
    encoded: Encoded | None = None

    def __post_init__(self) -> None:
        if not self.segments:
            raise ValueError("a Trace needs at least one segment")
        if not self.group:
            object.__setattr__(self, "group", question_key(self.prompt_text))

    def _join(self, *roles: Role, turn: int | None = None) -> str:
        return "".join(s.text for s in self.segments if s.role in roles and (turn is None or s.turn == turn))

    @property
    def last_turn(self) -> int:
        return max(s.turn for s in self.segments)

    @property
    def system(self) -> str:
        return self._join(SYSTEM)

    @property
    def question(self) -> str:
        """Text of the question of the last turn."""
        return self._join(QUESTION, turn=self.last_turn) or self._join(QUESTION)

    @property
    def thinking(self) -> str:
        """Thinking of the last turn."""
        return self._join(THINK, turn=self.last_turn)

    @property
    def answer(self) -> str:
        """Answer of the last turn: the text after the thinking."""
        return self._join(ANSWER, turn=self.last_turn)

    @property
    def prompt_text(self) -> str:
        """Everything before the first written segment: identity of the question."""
        out = []
        for s in self.segments:
            if s.role in (THINK, ANSWER, TOOL_CALL, INJECTED, TOOL):
                break
            out.append(s.text)
        return "\n".join(out)

    @property
    def id(self) -> str:
        """Content hash: the same text from the same question has the same id wherever it came from."""
        body = json.dumps([[int(s.role), s.text, s.turn] for s in self.segments] + [self.group], ensure_ascii=False)
        return hashlib.blake2b(body.encode("utf-8", "surrogatepass"), digest_size=12).hexdigest()

    def replace(self, **changes: Any) -> "Trace":
        """A changed copy. Changing `segments` drops `encoded`: edited text has no sampled ids."""
        if "segments" in changes and "encoded" not in changes and changes["segments"] != self.segments:
            changes["encoded"] = None
        return dataclasses.replace(self, **changes)

    def logged(self, op: str) -> "Trace":
        """The same trace with `op` appended to its provenance."""
        p = self.provenance
        return dataclasses.replace(self, provenance=dataclasses.replace(p, ops=(*p.ops, op)))

    def to_json(self) -> dict[str, Any]:
        """Plain JSON value; inverse of `from_json`."""
        out: dict[str, Any] = {
            "segments": [
                {"role": s.role.name.lower(), "text": s.text}
                | ({"step": s.step} if s.step else {}) | ({"turn": s.turn} if s.turn else {})
                for s in self.segments
            ],
            "gold": self.gold, "group": self.group, "verdict": self.verdict, "flags": list(self.flags),
            "scores": dict(self.scores), "meta": dict(self.meta),
            "provenance": dataclasses.asdict(self.provenance),
        }
        if self.encoded is not None:
            e = self.encoded
            out["encoded"] = {
                "tokenizer": e.tokenizer, "ids": np.asarray(e.ids).tolist(), "prompt_length": e.prompt_length,
                "logprobs": None if e.logprobs is None else [float(x) for x in e.logprobs],
                "injected": None if e.injected is None else [bool(x) for x in e.injected],
            }
        return out

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "Trace":
        """Inverse of `to_json`. Raises ValueError naming the missing or unknown part."""
        try:
            segments = tuple(
                Segment(role=Role[s["role"].upper()], text=s["text"], step=s.get("step", 0), turn=s.get("turn", 0))
                for s in value["segments"]
            )
        except KeyError as e:
            raise ValueError(f"not a trace: missing or unknown {e} in {str(value)[:120]!r}") from None
        p = dict(value.get("provenance") or {})
        p |= {k: tuple(p[k]) for k in ("parents", "ops") if k in p}
        e = value.get("encoded")
        opt = lambda x, dtype: None if x is None else np.asarray(x, dtype)
        return cls(
            segments=segments, gold=value.get("gold"), group=value.get("group", ""), verdict=value.get("verdict"),
            flags=tuple(value.get("flags", ())), scores=dict(value.get("scores") or {}),
            meta=dict(value.get("meta") or {}), provenance=Provenance(**p),
            encoded=None if not e else Encoded(
                tokenizer=e["tokenizer"], ids=np.asarray(e["ids"], np.int32), prompt_length=e["prompt_length"],
                logprobs=opt(e.get("logprobs"), np.float32), injected=opt(e.get("injected"), bool)),
        )


def question_key(text: str) -> str:
    """Identity of a question: hash of its text with case and white space folded."""
    folded = " ".join(text.lower().split())
    return hashlib.blake2b(folded.encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()


def simple_trace(question: str, thinking: str, answer: str, *, system: str = "", **kwargs: Any) -> Trace:
    """A one-turn trace from strings; empty system or thinking make no segment."""
    segs = [Segment(role=r, text=t) for r, t in ((SYSTEM, system), (QUESTION, question), (THINK, thinking)) if t]
    return Trace(segments=(*segs, Segment(role=ANSWER, text=answer)), **kwargs)
