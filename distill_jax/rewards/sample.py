"""`Sample`: what a reward reads of one completion. Plain Python, made once per rollout, never changed."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from distill_jax.rewards.check import Verdict
from distill_jax.traces.trace import FLAG_EMPTY_ANSWER, FLAG_TRUNCATED, FLAG_UNTERMINATED, Trace

EXIT = "exit_position"
"""Score of a trace that is one of several exits of a full rollout: tokens of thinking before its exit."""
PASS_RATE = "reference_pass_rate"
"""Entry of `Trace.meta`: share of right answers that the frozen start gave to this question (`jobs.pass_rates`)."""


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One completion of one prompt.

    trace           where it came from; its prompt, gold and meta are read here
    thinking        text of the thinking without tags, "" where there is none
    answer          text after the thinking, "" where the thinking never ended
    text            the completion as it was decoded, tags included ("" where nobody kept it: no format reward then)
    think_tokens, answer_tokens, tokens   counts of sampled tokens; `tokens` is the whole completion, tags included
    truncated       the length limit ended it
    terminated      the thinking ended (always True where there is none): without that there is no answer
    verdict         what the checker found, None where nobody asked
    exit            order among the exits of one full rollout (S-GRPO), lowest first; -1 where there is one completion
    signals         numbers by name from elsewhere: `think_entropy`, `answer_entropy`, `reference_pass_rate`, ...
    """

    trace: Trace
    thinking: str = ""
    answer: str = ""
    text: str = ""
    think_tokens: int = 0
    answer_tokens: int = 0
    tokens: int = 0
    truncated: bool = False
    terminated: bool = True
    verdict: Verdict | None = None
    exit: int = -1
    signals: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def of(cls, trace: Trace, **changes: object) -> "Sample":
        """The sample of a trace: texts of its last turn, flags and scores as they stand there.

        changes   any field: token counts above all, which a trace knows only where it has `encoded`
        """
        rate = {PASS_RATE: float(trace.meta[PASS_RATE])} if PASS_RATE in trace.meta else {}
        known: dict[str, object] = {
            "thinking": trace.thinking, "answer": trace.answer, "signals": {**rate, **trace.scores},
            "exit": int(trace.scores.get(EXIT, -1)),
            "truncated": FLAG_TRUNCATED in trace.flags, "terminated": FLAG_UNTERMINATED not in trace.flags}
        if trace.encoded is not None:
            known["tokens"] = len(trace.encoded.ids) - trace.encoded.prompt_length
        if trace.verdict is not None:
            known["verdict"] = Verdict(correct=trace.verdict, method=str(trace.meta.get("check", "source")),
                                       extracted=trace.meta.get("extracted"))
        return cls(trace=trace, **{**known, **changes})  # type: ignore[arg-type]

    @property
    def group(self) -> str:
        """Identity of the prompt: samples with one group answer the same question."""
        return self.trace.group

    @property
    def gold(self) -> str:
        return self.trace.gold or ""

    @property
    def correct(self) -> bool:
        """Whether the answer counts as right. Undecided (time-out, no gold) and thinking that never ended do not."""
        return self.terminated and self.verdict is not None and self.verdict.correct is True

    @property
    def answered(self) -> bool:
        """Whether there is an answer at all, right or wrong."""
        if not self.terminated or FLAG_EMPTY_ANSWER in self.trace.flags or not self.answer.strip():
            return False
        return self.verdict is None or self.verdict.method != "no_answer"

    def replace(self, **changes: object) -> "Sample":
        return dataclasses.replace(self, **changes)  # type: ignore[arg-type]


def groups_of(samples: Sequence[Sample]) -> list[list[int]]:
    """Indices of the samples of each prompt, prompts in the order in which they first appear."""
    found: dict[str, list[int]] = {}
    for i, sample in enumerate(samples):
        found.setdefault(sample.group, []).append(i)
    return list(found.values())
