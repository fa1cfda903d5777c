"""What a policy finds when its reward has a hole: every row is a completion that must not be paid for, or must be."""

import time

import pytest

from distill_jax.core.roles import ANSWER, QUESTION, THINK
from distill_jax.rewards.algebra import Product, Reward, Sum, Where
from distill_jax.rewards.check import check
from distill_jax.rewards.checker import Checker
from distill_jax.rewards.judges import judge_answers
from distill_jax.rewards.knights import judge
from distill_jax.rewards.outcome import boxed_letter, outcome, right, well_formed
from distill_jax.rewards.repetition import ngram_penalty
from distill_jax.rewards.sample import Sample
from distill_jax.rewards.shaping import cosine, efficiency, min_max_length, soft_overlong
from distill_jax.traces.formats.text import split_response
from distill_jax.traces.trace import FLAG_UNTERMINATED, Segment, Trace, simple_trace
from tests.rewards.samples import sample


@pytest.fixture(scope="module")
def checker():
    with Checker(workers=1, timeout=2.0) as checker:
        yield checker


def rollout(completion: str, gold: str, prompt: str = "What is it?", opened: bool = True) -> Sample:
    """A completion as the trainer sees it: split at `</think>`, which the template's `<think>` makes due."""
    split = split_response(completion, prompt_opens=opened)
    segments = (Segment(role=QUESTION, text=prompt), Segment(role=THINK, text=split.thinking or ""),
                Segment(role=ANSWER, text=split.answer or ""))
    return Sample.of(Trace(segments=segments, gold=gold, flags=split.flags), text=completion,
                     tokens=len(completion) // 4)


def paid(sample: Sample, checker: Checker) -> bool:
    judged = judge_answers([sample], checker)[0]
    assert (outcome(judged) == 1) == right(judged)
    return right(judged)


@pytest.mark.parametrize("completion", ["", " \n", "</think>", "</think>\n\n", "so 18</think>", "so 18</think>\n\n \n",
                                        "so</think>\\boxed{}", "so</think>\\boxed{ }", "so</think><answer></answer>",
                                        "so</think>$$", "so</think>The answer is", "so</think>The answer is \\boxed{"])
def test_empty_answers(checker, completion):
    s = rollout(completion, "18")
    assert not paid(s, checker)
    assert well_formed(s.replace(text=completion or " "), opened=True) == 0 or s.answered


@pytest.mark.parametrize("gold", ["", " ", "$", "\\boxed{}", "{}", "."])
def test_a_gold_that_says_nothing_is_met_by_nothing(checker, gold):
    for answer in ("", " ", "$", "\\boxed{}", "x", "18", ".", "the"):
        if answer.strip() != gold.strip():
            assert not paid(rollout(f"so</think>{answer}", gold), checker), (answer, gold)


@pytest.mark.parametrize("answer,gold,value", [
    ("\\boxed{17}\\boxed{18}", "18", True), ("\\boxed{18}\\boxed{17}", "18", False),  # the last one counts
    ("\\boxed{17} \\boxed{18} \\boxed{19} \\boxed{20}", "18", False),
    ("\\boxed{17, 18, 19}", "18", False), ("\\boxed{17 or 18}", "18", False), ("17 or 18", "18", False),
    ("\\boxed{\\{17, 18\\}}", "18", False), ("either \\boxed{18} or \\boxed{17}", "18", False),
    ("Answer: A, B, C or D", "B", False), ("\\boxed{A}\\boxed{B}\\boxed{C}", "B", False),
    ("yes or no", "yes", False), ("Yes and no.", "yes", False), ("\\boxed{ABCD}", "B", False),
    ("<answer>17</answer><answer>18</answer>", "18", True), ("<answer>18</answer><answer>17</answer>", "18", False),
    ("#### 18\n#### 17", "18", False), ("\\boxed{18 \\text{ or } 17}", "18", False), ("[0, 1000]", "18", False),
    ("\\boxed{1 \\le x \\le 1000}", "18", False), ("x", "18", False), ("18 = 17", "18", False),
    ("\\boxed{18 = x = 17}", "18", False)])
def test_several_answers(checker, answer, gold, value):
    assert paid(rollout(f"so</think>{answer}", gold), checker) == value


def test_several_boxes_where_letters_are_asked_for():
    assert boxed_letter(sample(gold="B", answer="\\boxed{A}\\boxed{B}\\boxed{C}\\boxed{D}")) == 0
    assert boxed_letter(sample(gold="B", answer="\\boxed{A, B, C, D}")) == 0
    assert boxed_letter(sample(gold="B", answer="\\boxed{B or C}")) == 0


@pytest.mark.parametrize("completion", [
    "Is it red or blue?", "so</think>Is it red or blue?", "so</think>Answer with red or blue: red or blue",
    "so</think>You said: \"red\" is one of the options", "so</think>red, blue"])
def test_the_prompt_is_no_answer(checker, completion):
    """The gold stands in the prompt: copying the prompt's choices is not choosing."""
    assert not paid(rollout(completion, "red", prompt="Is it red or blue?"), checker)


@pytest.mark.parametrize("kept", ["(A) 17 (B) 18 (C) 19 (D) 20", "A) 17\nB) 18\nC) 19\nD) 20", "A, B, C, D"])
def test_copied_options_choose_nothing_but_the_last(checker, kept):
    """Echoing all options is paid at most as often as always saying the last one."""
    assert [paid(rollout(f"so</think>{kept}", g), checker) for g in "ABC"] == [False] * 3


@pytest.mark.parametrize("completion", [
    "The answer is \\boxed{18}", "The answer is \\boxed{18}</think>", "The answer is \\boxed{18}</think>I do not know.",
    "<answer>18</answer>", "\\boxed{18}</think>\\boxed{17}", "\\boxed{18} < /think>",
    "\\boxed{18}</thinking>\\boxed{17}",
    "\\boxed{18}</think>17</think>"])
def test_answers_inside_the_thinking(checker, completion):
    assert not paid(rollout(completion, "18"), checker)


def test_a_second_end_of_thinking_hides_nothing(checker):
    """The first `</think>` ends the thinking; a text that ends it again is read after its last one."""
    assert not paid(rollout("x</think>\\boxed{18} wait</think>\\boxed{17}", "18"), checker)
    assert well_formed(sample(text="x</think>\\boxed{18} wait</think>\\boxed{17}"), opened=True) == 0


@pytest.mark.parametrize("completion", ["I think 18", "<think>18", "<think>\n\\boxed{18}"])
def test_thinking_that_never_ends(completion, checker):
    s = rollout(completion, "18")
    assert not s.terminated and FLAG_UNTERMINATED in s.trace.flags
    assert not paid(s, checker) and well_formed(s, opened=True) == 0
    assert judge(s.replace(trace=s.trace.replace(gold="A is a knight"))).method == "unterminated"


@pytest.mark.parametrize("answer,gold,value", [
    ("А", "A", False), ("Β", "B", False), ("\\boxed{С}", "C", False),  # Cyrillic and Greek capitals
    ("１８", "18", True), ("−3", "-3", True), ("Ａ", "A", True),  # full width and typographic: the same signs
    ("l8", "18", False), ("1О", "10", False), ("٣", "3", False), ("³", "3", False), ("Ⅲ", "3", False),
    ("①", "1", False),
    ("1\u200b8", "18", False), ("\u202e81", "18", False), ("1\u03018", "18", False), ("уes", "yes", False),
    ("tr\u200bue", "true", False), ("ｙｅｓ", "yes", True), ("x²", "x^2", True), ("½", "1/2", True)])
def test_look_alikes(checker, answer, gold, value):
    assert paid(rollout(f"so</think>{answer}", gold), checker) == value


@pytest.mark.parametrize("text", [
    "18 " * 1_000_000, "\\boxed{" * 300_000, "\\boxed{17}" * 200_000, "(" * 2_000_000, "<answer>" * 300_000,
    "$" * 2_000_000, "9" * 2_000_000, "the answer is " * 150_000, "\\frac{1}{" * 200_000, "</think>" * 200_000,
    "答案是" * 300_000, "a\n" * 1_000_000, "- " * 1_000_000, "\x00" * 1_000_000, "\\" * 2_000_000, "1," * 1_000_000],
    ids=range(16))
def test_megabytes(checker, text):
    start = time.process_time()
    for s in (sample(gold="18", answer=text), sample(gold="\\sqrt{2}", answer=text), sample(gold="C", answer=text)):
        verdict = checker.check(s.answer, s.gold)
        assert verdict.correct is not True or text.startswith("18 "), (text[:40], s.gold)
    ngram_penalty(sample(text=text))
    well_formed(sample(text=text))
    judge(sample(gold="Zoey is a knight, Luke is a knave", answer=text))
    assert time.process_time() - start < 20  # linear; a quadratic one takes hours


@pytest.mark.parametrize("answer", [
    "\\boxed{" + "\\frac{1}{" * 200 + "2" + "}" * 200 + "}", "\\boxed{" + "{" * 400 + "18" + "}" * 400 + "}",
    "\\boxed{" + "\\sqrt{" * 100 + "18" + "}" * 100 + "}", "$" + "(" * 300 + "18" + ")" * 300 + "$",
    "\\boxed{" + "2^{" * 60 + "2" + "}" * 60 + "}", "\\boxed{9^{9^{9^{9^{9}}}}}", "\\boxed{10^{10^{10}}!}",
    "\\boxed{\\int_0^1" * 40 + "}", "\\boxed{\\left" * 50 + "}" * 50, "\\boxed{18" + "!" * 60 + "}",
    "\\boxed{\\sum_{i=1}^{10^{12}} i}", "\\boxed{" + "x^{2}+" * 60 + "x}"])
@pytest.mark.parametrize("gold", ["18", "\\frac{\\sqrt{2}}{3}"])
def test_deep_latex(checker, answer, gold):
    start = time.monotonic()
    assert checker.check(answer, gold).correct is not True
    assert time.monotonic() - start < 60


def test_answers_that_program_the_checker(checker):
    for answer in ("\\boxed{__import__('os').system('true')}", "\\boxed{\\text{exit()}}", "\\boxed{nan}", "\\boxed{oo}",
                   "\\boxed{\\infty}", "\\boxed{0/0}", "\\boxed{1/0}", "\\boxed{gold}", "\\boxed{x = x}",
                   "\\boxed{True}", "\\boxed{18!}", "\\boxed{18!!}"):
        assert checker.check(answer, "18").correct is not True, answer


def test_length_rewards_do_not_pay_for_saying_nothing():
    """The shortest wrong answer of a group never earns more than a right one, nor more than nothing."""
    group = [sample(correct=False, tokens=1), sample(correct=True, tokens=400), sample(correct=True, tokens=800)]
    assert min_max_length(group)[0] == 0 and efficiency(group)[0] == 0
    assert cosine(group[0], limit=1000) < cosine(sample(correct=False, tokens=500), limit=1000) < 0
    assert soft_overlong(group[0], limit=1000, cache=100) == 0
    both = Sum(parts={"right": Reward(fn=outcome), "short": Where(reward=Reward(fn=min_max_length), on=right)})
    values = both.score(group, {}).values
    assert values[0] == 0 < values[2] < values[1]


def test_format_gates_correctness():
    gate = Product(parts={"right": Reward(fn=outcome), "form": Reward(fn=well_formed, kwargs={"opened": True})})
    good, bad = sample(correct=True, text="a</think>18"), sample(correct=True, text="18")
    assert gate.score([good, bad, sample(correct=True)], {}).values.tolist() == [1, 0, 0]


def test_repetition_is_seen_however_it_is_spaced():
    assert ngram_penalty(sample(text="wait so\n" * 400)) < -0.9
    assert ngram_penalty(sample(text="Wait SO " * 400)) < -0.9


def test_a_trace_without_gold_is_never_paid(checker):
    trace = simple_trace("q", "", "18")
    assert not paid(Sample.of(trace), checker) and check("18", "").correct is None
