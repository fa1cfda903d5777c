"""The generated world's entry point: `WorldSpec` says which questions, `traces` makes them.

Trace i of a spec is a pure function of the spec and i. Train and evaluation questions cannot meet: a hash of the
question's canonical form (documents as a set, people of a puzzle up to renaming) decides which split it belongs to,
and a draw that falls into the other one is drawn again.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from distill_jax.traces.trace import Provenance, Trace, simple_trace
from distill_jax.traces.world import compact, facts, puzzles, rich
from distill_jax.traces.world.draw import Draw, digest
from distill_jax.traces.world.facts import DocumentQuestion, Layout
from distill_jax.traces.world.thoughts import PUZZLING, STYLES, Style, think

Question = DocumentQuestion | puzzles.Knights | puzzles.Arithmetic
KINDS = (*facts.BUILDERS, "knights", "arithmetic")
RENDERINGS: dict[str, ModuleType] = {"compact": compact, "rich": rich}
SPLITS = ("train", "eval")
SHOWN = ("all", "gold", "none")
EVAL_SHARE = 8
"""One question in this many belongs to the evaluation split."""


@dataclass(frozen=True, kw_only=True)
class WorldSpec:
    """Which questions.

    kind       one of `KINDS`
    k          documents (sentences of a long document, key-value pairs, people, digits)
    rendering  `compact` (one word, one token) or `rich` (paraphrased running text)
    style      oracle trace: `minimal`, `extended` (re-reading, checking, a wrong branch and its correction), and for
               `knights` also `careful` and `varied` (`thoughts`)
    split      `train` or `eval`
    position   of the document that holds the answer, from 0; None: drawn
    layout     where the first hop's document stands: `random`, `adjacent` (just before), `reversed` (just after),
               `spread` (first and last)
    names      use only the first so many names of each type (None: all): what a beginner starts with
    shown      documents in the prompt: `all`, `gold` (oracle setting) or `none` (closed book; no thinking either)
    """

    kind: str = "two_hop"
    k: int = 8
    rendering: str = "compact"
    style: Style = "minimal"
    split: str = "train"
    seed: int = 0
    position: int | None = None
    layout: Layout = "random"
    names: int | None = None
    shown: str = "all"

    def __post_init__(self) -> None:
        known = {"kind": KINDS, "rendering": tuple(RENDERINGS), "style": STYLES, "split": SPLITS, "shown": SHOWN,
                 "layout": facts.LAYOUTS}
        for field, values in known.items():
            if getattr(self, field) not in values:
                got = getattr(self, field)
                raise ValueError(f"unknown {field} {got!r} of a generated world; known: {list(values)}")
        if self.style in PUZZLING and self.kind != "knights":
            raise ValueError(f"style {self.style!r} is for kind='knights', got kind={self.kind!r}; take 'extended'")
        if self.k < 1:
            raise ValueError(f"k must be at least 1, got {self.k}")
        if self.names is not None and self.names < 1:
            raise ValueError(f"names must be at least 1, got {self.names}")


def split_of(question: Question) -> str:
    """The split a question belongs to, by its identity alone."""
    return "eval" if digest("split", question.canonical()) % EVAL_SHARE == 0 else "train"


def symbols(spec: WorldSpec, index: int) -> Question:
    """Question `index` of the spec before it is put into words."""
    sizes = RENDERINGS[spec.rendering].LEXICON.sizes
    if spec.names is not None:
        sizes = {type_: min(size, spec.names) for type_, size in sizes.items()}
    for attempt in range(10_000):
        draw = Draw("facts", spec.seed, spec.kind, spec.k, spec.split, index, attempt)
        if spec.kind == "knights":
            q: Question = puzzles.knights(draw, sizes["first"], spec.k)
        elif spec.kind == "arithmetic":
            q = puzzles.arithmetic(draw, spec.k)
        else:
            q = facts.BUILDERS[spec.kind](draw, sizes, spec.k)
        if split_of(q) == spec.split:
            return q
    raise ValueError(f"{spec.kind} with k={spec.k} has no {spec.split} questions: choose a larger k")


def trace(spec: WorldSpec, index: int) -> Trace:
    """Question `index` of the spec with its oracle trace."""
    q = symbols(spec, index)
    style_key = (spec.seed, spec.kind, spec.k, spec.split, index)
    meta: dict[str, Any] = {"kind": spec.kind, "k": spec.k, "rendering": spec.rendering, "split": spec.split,
                            "style": spec.style, "shown": spec.shown, "index": index, "seed": spec.seed}
    group = f"{digest('group', spec.rendering, q.canonical()):016x}"
    if isinstance(q, DocumentQuestion):
        q = facts.lay_out(q, Draw("layout", *style_key), spec.position, spec.layout)
        meta |= {"gold_position": q.gold[-1], "hop_positions": list(q.gold), "hops": len(q.gold),
                 "layout": spec.layout}
        if spec.kind == "varied":
            meta["gold_length"] = len(q.documents[q.gold[-1]])
        if q.rule:
            meta["rule"] = q.rule.name
    elif spec.position is not None:
        raise ValueError(f"{spec.kind} has no documents, so position={spec.position} means nothing")
    return _print(spec, q, meta, group, style_key)


def _print(spec: WorldSpec, q: Question, meta: dict[str, Any], group: str, key: tuple[Any, ...]) -> Trace:
    text = RENDERINGS[spec.rendering]
    shown = q
    if isinstance(q, DocumentQuestion) and spec.shown == "gold":
        q = shown = facts.only_gold(q)
    elif isinstance(q, DocumentQuestion) and spec.shown == "none":
        shown = facts.without_documents(q)
    question = text.question(shown, Draw("question", *key))
    wording = Draw("thinking", spec.style, *key)
    thinking = "" if spec.shown == "none" else text.thinking(q, think(q, spec.style, wording), wording)
    answer = text.answer(q)
    return simple_trace(
        question, thinking, answer, gold=answer, group=group, verdict=True, meta=meta,
        scores={"oracle_bits": round(wording.bits, 3)},
        provenance=Provenance(source=f"world:{spec.kind}", row=meta["index"], teacher=f"oracle-{spec.style}",
                              sampling={"seed": spec.seed}))


def traces(spec: WorldSpec, n: int, start: int = 0) -> Iterator[Trace]:
    """Traces `start` to `start + n` of the spec."""
    return (trace(spec, i) for i in range(start, start + n))

