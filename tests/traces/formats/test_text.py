import pytest
from hypothesis import given
from hypothesis import strategies as st

from distill_jax.traces.formats.text import (
    Reject,
    final_answer,
    last_boxed,
    split_rationale,
    split_response,
    strip_answer,
    strip_thinking,
    unwrap_json,
)

FREE = st.text(alphabet=st.sampled_from("ab \n.<>"), max_size=12)


@given(thinking=FREE, answer=FREE)
def test_what_is_taken_away_is_what_the_renderer_puts_back(thinking, answer):
    """Rendering adds the newlines around the tags only where the text has none: the sum is the source again."""
    source = f"<think>\n{thinking}\n</think>\n\n{answer}"
    split = split_response(source)
    t, a = split.thinking, split.answer
    top_up = "\n\n"[min(2, len(a) - len(a.lstrip("\n"))):]
    before, after = "" if t.startswith("\n") else "\n", "" if t.endswith("\n") else "\n"
    if t:
        assert f"<think>{before}{t}{after}</think>{top_up}{a}" == source
    else:
        assert f"<think>\n\n</think>{top_up}{a}".replace("\n", "") == source.replace("\n", "")


@given(thinking=FREE, answer=FREE)
def test_text_inside_is_verbatim(thinking, answer):
    split = split_response(f"<think>{thinking}</think>{answer}")
    assert split.thinking.strip("\n") == thinking.strip("\n") and split.answer.strip("\n") == answer.strip("\n")
    assert split.thinking in thinking and split.answer in answer


@pytest.mark.parametrize("text,thinking,answer,flags", [
    ("<think>\nhm\n</think>\n\n4", "hm", "4", ()),
    ("<think>hm</think>4", "hm", "4", ()),
    (" \n<think> hm \n\n</think>\n4 \n", " hm \n\n", "4 \n", ()),
    ("hm\n</think>\n\n4", "hm", "4", ("missing_open_think",)),
    ("\nhm</think>4", "hm", "4", ("missing_open_think",)),
    ("<think>\nhm, and", "hm, and", None, ("unterminated_think", "empty_answer")),
    ("<think>\nhm\n</think>\n\n", "hm", "", ("empty_answer",)),
    ("<think>\n\n</think>\n\n4", "", "4", ()),  # a model that was asked not to think
    ("just an answer", None, "just an answer", ()),
    ("<think>a</think>b</think>c", "a", "b</think>c", ()),  # the first closing tag ends the thinking
    ("<Thought>\nhm\n\n</Thought>\n<Output>\nyes\n</Output>", "hm\n\n", "yes", ()),
    ("<Thought>\nhm\n</Thought>\n<Output>\nyes", "hm", "yes", ()),  # its end was the stop string
    ("<|begin_of_thought|>\nhm<|end_of_thought|>\n<|begin_of_solution|>4<|end_of_solution|>", "hm", "4", ()),
    ("[THINK]hm[/THINK]4", "hm", "4", ()),
])
def test_split(text, thinking, answer, flags):
    split = split_response(text)
    assert (split.thinking, split.answer, split.flags) == (thinking, answer, flags)


def test_no_tag_at_all_where_the_prompt_opens():
    split = split_response("hm, and", prompt_opens=True)
    assert (split.thinking, split.answer) == ("hm, and", None)
    assert split.flags == ("missing_open_think", "unterminated_think", "empty_answer")


def test_text_before_the_opening_tag_is_refused():
    with pytest.raises(Reject, match="text_before_think"):
        split_response("Sure! <think>hm</think>4")


def test_strips_are_exact():
    assert strip_thinking("\na\n") == "a" and strip_thinking("\n\na\n\n") == "\n\na\n\n" and strip_thinking("\n") == ""
    assert strip_answer("\n\na") == "a" and strip_answer("\na") == "a" and strip_answer("\n\n\na") == "\n\n\na"


@pytest.mark.parametrize("text,rationale,end", [
    ("48/2 = <<48/2=24>>24\n#### 24", "48/2 = <<48/2=24>>24", "#### 24"),
    ("so 3\nA: 3", "so 3", "A: 3"),
    ("290/2. The answer is 145", "290/2.", "The answer is 145"),
    ("290/2=145The answer is 145", "290/2=145", "The answer is 145"),
    ("The answer is no. Wait. The answer is yes.\n", "The answer is no. Wait.", "The answer is yes.\n"),
    ("#### 5", "", "#### 5"),
])
def test_rationale(text, rationale, end):
    assert split_rationale(text) == (rationale, end)


@pytest.mark.parametrize("text", ["no marker", "The answer is 5. But then I went on.\nAnd on.", "x" * 3000])
def test_no_rationale(text):
    assert split_rationale(text) is None


@pytest.mark.parametrize("text,answer", [
    ("x\n#### 1,200", "1,200"), ("A: 26", "26"), (r"so $\boxed{\frac{1}{2}}$.", r"\frac{1}{2}"),
    ("The answer is True.", "True"), ("nothing", None),
])
def test_final_answer(text, answer):
    assert final_answer(text) == answer


@pytest.mark.parametrize("text,answer", [
    ("the answers are $\\boxed{-2}$ and $\\boxed{1}$.", "-2, 1"),
    ("$x =\\boxed{ -\\tfrac32}$ and $x = \\boxed{-\\tfrac34},$ respectively", "-\\tfrac32, -\\tfrac34"),
    ("First $\\boxed{2}$, which is not it and so $\\boxed{3}$.", "3"),
    ("\\boxed{2}\n\\boxed{3}", "3"), ("\\boxed{2} and \\boxed{}", "2"), ("\\boxed{2} and \\boxed{3", "2"),
])
def test_an_answer_in_several_boxes(text, answer):
    assert final_answer(text) == answer


@pytest.mark.parametrize("text,inside", [
    (r"\boxed{5} or \boxed{18}", "18"), (r"\boxed{\{1,2\}}", r"\{1,2\}"), (r"$\boxed 5$", "5"), (r"\fbox{a}", "a"),
    (r"\boxed{5} and \boxed{cut", "5"), (r"\boxed{", None), ("none", None),
    (r"\boxed{\text{(A) }\frac{a}{b}}", r"\text{(A) }\frac{a}{b}"),
])
def test_last_boxed(text, inside):
    assert last_boxed(text) == inside


def test_json_response():
    assert unwrap_json('```json\n{"reasoning": "a\nb", "answer": 5}\n```') == ("a\nb", "5")
    assert unwrap_json(r'{"reasoning": "\( \frac{3}{4} \times 8 \)\nso", "answer": "6"}') == (
        "\\( \\frac{3}{4} \\times 8 \\)\nso", "6")
    with pytest.raises(Reject, match="broken_json_response"):
        unwrap_json('{"reasoning": "he said "no"", "answer": 1}')
