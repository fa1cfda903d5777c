"""Questions with a reference answer, GSM8K-style: `{"question", "answer"}` rows, checked like rewards are."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from distill_jax.eval.records import Item, Kind
from distill_jax.rewards.answers import extract
from distill_jax.traces.formats import read_rows

QUESTION_FIELDS = ("question", "problem", "prompt", "Problem", "query")
ANSWER_FIELDS = ("answer", "gold", "target", "solution", "Answer", "final_answer")


@dataclass(frozen=True, kw_only=True)
class AnswerMatch:
    """data: a JSON, JSONL or Parquet file, gzipped or not. suffix: added to every question.

    The gold is what follows `####` in the answer where there is one, the boxed part of a solution, else the answer as
    it stands.
    """

    data: str = ""
    questions: int = 500
    kind: Kind = "auto"
    suffix: str = ""

    @property
    def name(self) -> str:
        return "answer_match"

    def items(self) -> list[Item]:
        if not self.data:
            raise ValueError("answer_match needs a file of questions and answers: --data FILE")
        out = []
        for i, row in enumerate(read_rows(self.data)):
            if i == self.questions:
                break
            question, answer = _field(row, QUESTION_FIELDS, self.data), _field(row, ANSWER_FIELDS, self.data)
            out.append(Item(id=str(i), group=str(i), question=question + self.suffix, golds=(gold(answer),),
                            kind=self.kind))
        return out


def gold(answer: str) -> str:
    """The reference answer out of a reference solution."""
    if "####" in answer or "\\boxed" in answer:
        return extract(answer) or answer.strip()
    return answer.strip()


def _field(row: Mapping[str, Any], names: tuple[str, ...], path: str) -> str:
    for name in names:
        if name in row and row[name] is not None:
            return str(row[name])
    raise ValueError(f"{path}: no field of {list(names)} in a row with {sorted(row)}")
