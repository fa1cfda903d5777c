"""Rewards of the answer and of its form: what nothing else should override."""

from distill_jax.rewards.check import choice_letter
from distill_jax.rewards.sample import Sample
from distill_jax.traces.formats.text import TAGS, last_boxed


def right(sample: Sample) -> bool:
    """Whether the answer is right: thinking ended and the checker said so. For `Where` and as a reward of 0 and 1
    (GRPO, Warm Up Before You Train 2505.13718; TFPI 2509.26226 rewards nothing else)."""
    return sample.correct


def wrong(sample: Sample) -> bool:
    return not sample.correct


def outcome(sample: Sample, right: float = 1.0, wrong: float = 0.0, unanswered: float | None = None) -> float:
    """Correctness as a number: `right`, `wrong`, and `unanswered` (default: `wrong`) where no answer was found.

    DAPO (2503.14476, sec. 2.4): 1 and -1. LASER's base (2505.15612, code): 1, -0.5, -1.
    """
    if sample.correct:
        return right
    return wrong if sample.answered or unanswered is None else unanswered


def boxed_letter(sample: Sample) -> float:
    """1 if the choice letter in the last `\\boxed{}` of the answer is the gold one, else 0; nothing else counts.

    AlphaMed (2505.17952): no format reward, no search outside of the box.
    """
    box = last_boxed(sample.answer) if sample.terminated else None
    return float(box is not None and bool(sample.gold) and choice_letter(box) == choice_letter(sample.gold))


def well_formed(sample: Sample, opened: bool = False, answer_tags: bool = False, empty: bool = False) -> float:
    """1 if the completion is `<think>` something `</think>` something, else 0.

    opened       the chat template wrote `<think>`: the completion begins inside, and may not open it again
    answer_tags  the text after the thinking must be `<answer>` something `</answer>`; the closing one may be missing
                 at the very end, being a stop string
    empty        a thinking block of white space is fine (methods that may skip the thinking)
    Any known pair of thinking tags counts, one pair per completion, once. Reads `Sample.text`: ValueError without it.
    """
    if not sample.text:
        raise ValueError("the format reward reads the completion as it was decoded: set Sample.text")
    body = sample.text.strip()
    tags = next((t for t in TAGS if t.close in body), None)
    if tags is None or body.count(tags.close) != 1:
        return 0.0
    if not opened:
        if not body.startswith(tags.open):
            return 0.0
        body = body[len(tags.open):]
    thinking, _, answer = body.partition(tags.close)
    if not (empty or thinking.strip()) or not answer.strip() or any(t.open in body for t in TAGS):
        return 0.0
    return float(not answer_tags or _in_answer_tags(answer.strip()))


def _in_answer_tags(answer: str) -> bool:
    if not answer.startswith("<answer>") or answer.count("<answer>") != 1:
        return False
    inner, close, rest = answer.removeprefix("<answer>").partition("</answer>")
    return bool(inner.strip()) and not rest.strip() and "</answer>" not in rest and (bool(close) or "</" not in inner)
