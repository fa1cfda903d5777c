"""Questions with a reference answer, GSM8K-style and every other form an importer reads, checked like rewards are."""

from dataclasses import dataclass

from distill_jax.eval.records import Item, Kind
from distill_jax.rewards.verify import golds_of
from distill_jax.traces.formats import Reject, parse_map
from distill_jax.traces.formats.questions import read_questions


@dataclass(frozen=True, kw_only=True)
class AnswerMatch:
    """data: a JSON, JSONL, Parquet or CSV file, gzipped or not. map: `FIELD=PATH` options as of `import`, for fields of
    other names. suffix: added to every question.

    The gold is what follows `####` in the answer where there is one, the boxed part of a solution, else the answer as
    it stands; aliases count. Rows without one cannot be graded and are left out.
    """

    data: str = ""
    questions: int = 500
    kind: Kind = "auto"
    map: tuple[str, ...] = ()
    suffix: str = ""

    @property
    def name(self) -> str:
        return "answer_match"

    def items(self) -> list[Item]:
        if not self.data:
            raise ValueError("answer_match needs a file of questions and answers: --data FILE")
        out: list[Item] = []
        why = ""
        for i, (row, trace) in enumerate(read_questions(self.data, parse_map(self.map))):
            if len(out) == self.questions:
                break
            golds = () if isinstance(trace, Reject) else tuple(g for g in golds_of(trace) if g.strip())
            if isinstance(trace, Reject) or not golds:
                found = f"{trace}" if isinstance(trace, Reject) else "no reference answer"
                fields = ", ".join(map(str, row)) if isinstance(row, dict) else str(row)[:80]
                why = why or f"row {i + 1}: {found}; fields: {fields}"
                continue
            out.append(Item(id=str(i), group=str(i), question=trace.question + self.suffix, golds=golds,
                            kind=self.kind))
        if not out:
            raise ValueError(f"{self.data}: no question with a reference answer ({why}); name the fields with "
                             "--set 'map=[question=FIELD, gold=FIELD]'")
        return out
