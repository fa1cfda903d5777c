"""What a stage can name as its source: a store (`Store`, `Pairs`), several at once (`Mix`) or in turn (`Phases`).

Frozen specs without any reading; `data.sources.open_source` opens them.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from distill_jax.data.pack import OverLong
from distill_jax.data.render import Style
from distill_jax.traces.pairing import Builder, RightWrong


@dataclass(frozen=True, kw_only=True)
class Prefix:
    """The first part of every row: tokens after it are neither read by the model nor trained on.

    What is kept has the context it had, so teacher signals stay valid, and rows take less of a packed sequence.

    share  part that is kept, in (0, 1]; of n tokens max(1, floor(share * n)) stay
    of     "row": of the whole rendered row, prompt included (2512.21002); "written": the prompt and everything up to
           the first token the model writes stay, then this share of the rest
    whole  share of the questions whose rows stay whole, by a hash: a cut row has no end of its thinking and no answer
    """

    share: float
    of: Literal["row", "written"] = "row"
    whole: float = 0.0

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1 or not 0 <= self.whole <= 1:
            raise ValueError(f"Prefix needs 0 < share <= 1 and 0 <= whole <= 1, got {self.share} and {self.whole}")


@dataclass(frozen=True, kw_only=True)
class Store:
    """Rows of a trace store as training batches.

    path       store, local or URL
    signals    names of teacher signals to read beside the tokens
    rows       sequences in a global batch; seq_len: tokens of each
    pack       several rows in a sequence (they never see each other); False: one each, padded
    split      "train" or "heldout": whole questions, by a hash, so the split depends on nothing else
    holdout    share of the questions that is held out
    verdict    "correct" (checked and right), "not_wrong" (also unchecked), "any"
    over_long  rows longer than seq_len, and traces cut by their generator: "drop" them, or "cut": keep what there is
               of them. Only "cut" trains on traces without the end of their answer
    max_rows   keep at most so many rows, chosen by a hash (the same ones for every seed)
    ops        operators on the traces; rows whose text they change are rendered again and lose their signal
    style      how the supervised turn is written (think tags)
    prefix     keep only the first part of every row
    bad_shards what to do about rows whose stored bytes are damaged: "stop" with an error that names them, or "skip"
               them: they are left out of their sequences, the order of all others stays, and each shard is reported
               once. A store of which more than half is lost is an error all the same
    """

    path: str
    signals: tuple[str, ...] = ()
    rows: int = 8
    seq_len: int = 1024
    pack: bool = True
    split: Literal["train", "heldout", "all"] = "train"
    holdout: float = 0.0
    verdict: Literal["correct", "any", "not_wrong"] = "any"
    over_long: OverLong = "drop"
    max_rows: int | None = None
    ops: tuple[Any, ...] = ()
    style: Style = Style()
    prefix: Prefix | None = None
    bad_shards: Literal["stop", "skip"] = "stop"

    def __post_init__(self) -> None:
        if self.bad_shards not in ("stop", "skip"):
            raise ValueError(f"bad_shards is 'stop' or 'skip', got {self.bad_shards!r}")
        if self.rows < 1 or self.seq_len < 2:
            raise ValueError(f"rows must be at least 1 and seq_len at least 2, got {self.rows} and {self.seq_len}")
        if not 0 <= self.holdout < 1:
            raise ValueError(f"holdout is a share of the questions in [0, 1), got {self.holdout}")
        if self.split == "heldout" and self.holdout == 0:
            raise ValueError("split='heldout' needs holdout > 0")


@dataclass(frozen=True, kw_only=True)
class Pairs(Store):
    """Preference pairs, or single judged answers, of a store that holds several answers to a question: what
    `distill-jax generate --keep all` or a round of RL writes.

    build      which answers are compared (`traces.pairing`)
    max_rows   keep at most so many pairs
    over_long  "cut": answers that their generator cut take part. Either way a pair is read whole or not at all: one
               that is longer than seq_len, both sides together, is left out

    The two sides of a pair are two segments of the same sequence. Stream fields: `pair_ids`, `chosen`, `rejected` (1
    on that side of a pair) and `apart` (0 up to where the two answers of a pair first differ): what a term may name as
    `where=`. With `Singles(measure=True)` also `mismatched`, 1 on answers to other questions, which the other fields
    leave out.
    """

    build: Builder = RightWrong()

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.prefix is not None:
            raise ValueError("Pairs compares whole answers: drop prefix=, or leave a common beginning out of the loss "
                             "with where='apart'")


@dataclass(frozen=True, kw_only=True)
class Retokenised:
    """A view of the same rows as another model reads them: its tokenizer, its template. Sequence, order and segment
    numbers are those of `main`; tokens, and so positions, are its own.

    reader   provider whose tokenizer it is, e.g. a teacher with another vocabulary
    seq_len  tokens of a sequence of this view; None: as many as `main`
    Rows too long for either view are left out (none is cut: that would part the two sides), and sequences are packed
    so that they fit both.
    """

    reader: str = field(kw_only=False)
    seq_len: int | None = None

    def __post_init__(self) -> None:
        if self.seq_len is not None and self.seq_len < 2:
            raise ValueError(f"seq_len of a view must be at least 2, got {self.seq_len}")


@dataclass(frozen=True, kw_only=True)
class Several:
    """What is made of several sources of one seq_len."""

    sources: tuple[Any, ...]

    @property
    def seq_len(self) -> int:
        return self.sources[0].seq_len

    @property
    def signals(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(n for s in self.sources for n in s.signals))


@dataclass(frozen=True, kw_only=True)
class DomainGap:
    """Steers the shares of a `Mix` by how far the student is behind its teacher on each source (DDK, 2407.16154).

    every    updates between two measurements; the first is made before the first update
    alpha    share of the measured mixture; 1 - alpha is spread evenly, so that no source dies out
    teacher  signal of kind `token`: the teacher's log-probabilities of the held-out tokens
    batches  held-out batches of each source that are measured
    """

    every: int = 1000
    alpha: float = 0.5
    teacher: str = "token"
    batches: int = 8

    def __post_init__(self) -> None:
        if self.every < 1 or self.batches < 1 or not 0 <= self.alpha <= 1:
            raise ValueError(f"DomainGap needs every >= 1, batches >= 1 and alpha in [0, 1], got {self}")


@dataclass(frozen=True, kw_only=True)
class Mix(Several):
    """Sequences of several stores in fixed shares. Every batch is as near to the shares as whole sequences allow.

    rows: sequences in a global batch (the sources' own `rows` do not count); all sources have one seq_len.
    controller: what changes the shares during the run; `weights` are then only what is read before it measures.
    """

    sources: tuple[Store, ...]
    weights: tuple[float, ...]
    rows: int = 8
    controller: DomainGap | None = None

    def __post_init__(self) -> None:
        c = self.controller
        if c and (bad := [s.path for s in self.sources if s.holdout == 0 or c.teacher not in s.signals]):
            raise ValueError(f"a DomainGap measures held-out rows with the teacher's signal {c.teacher!r}: give "
                             f"holdout > 0 and signals=({c.teacher!r}, ...) to the sources {bad}")
        if len(self.sources) != len(self.weights) or not self.sources:
            raise ValueError(f"a Mix needs one weight for each source, got {len(self.sources)} sources and "
                             f"{len(self.weights)} weights")
        if min(self.weights) < 0 or sum(self.weights) <= 0:
            raise ValueError(f"weights of a Mix must not be negative and not all zero, got {self.weights}")
        if len({s.seq_len for s in self.sources}) > 1:
            raise ValueError(f"the sources of a Mix must have one seq_len, got {[s.seq_len for s in self.sources]}")


@dataclass(frozen=True, kw_only=True)
class Phases(Several):
    """Sources one after the other, a curriculum: each for its number of updates, the last one to the end.

    steps   updates of each source but the last. All sources have the same rows and seq_len
    """

    sources: tuple[Store | Mix, ...]
    steps: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.sources or len(self.steps) != len(self.sources) - 1:
            raise ValueError(f"Phases need the updates of every source but the last, got {len(self.sources)} sources "
                             f"and {len(self.steps)} numbers of updates")
        if any(s < 1 for s in self.steps):
            raise ValueError(f"every phase needs at least one update, got steps={self.steps}")
        if any(isinstance(s, Mix) and s.controller for s in self.sources):
            raise ValueError("the shares of a Mix inside Phases cannot be steered: make it the stage's source")
        if len({(s.rows, s.seq_len) for s in self.sources}) > 1:
            shapes = [(s.rows, s.seq_len) for s in self.sources]
            raise ValueError(f"the sources of Phases must agree in (rows, seq_len), got {shapes}")

    @property
    def rows(self) -> int:
        return self.sources[0].rows


Source = Store | Mix | Phases
"""What a stage can name as its source."""


def stores(source: Source) -> Iterator[Store]:
    """Every store of a source, in order."""
    return iter((source,)) if isinstance(source, Store) else (s for part in source.sources for s in stores(part))


def map_stores(source: Source, fn: Callable[[Store], Store]) -> Any:
    """The same source with `fn` applied to every store."""
    if isinstance(source, Store):
        return fn(source)
    return replace(source, sources=tuple(map_stores(s, fn) for s in source.sources))
