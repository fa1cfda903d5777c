import pytest

from distill_jax.rewards.outcome import well_formed
from tests.rewards.samples import sample


@pytest.mark.parametrize("text,plain,opened", [
    ("<think>a</think>b", 1, 0),
    ("\n<think>\na\n</think>\n\nb", 1, 0),
    ("a</think>b", 0, 1),  # the template wrote <think>
    ("<think>a", 0, 0), ("a", 0, 0), ("<think>a</think>", 0, 0), ("<think>a</think> \n", 0, 0),
    ("<think></think>b", 0, 0), ("</think>b", 0, 0),
    ("<think>a</think>b</think>c", 0, 0), ("<think>a<think>b</think>c", 0, 0), ("<think>a</think>b<think>", 0, 0),
    ("<reasoning>a</reasoning>b", 1, 0), ("<reasoning>a</think>b", 0, 0), ("b<think>a</think>b", 0, 0),
    ("＜think＞a＜/think＞b", 0, 0)])
def test_tags(text, plain, opened):
    assert well_formed(sample(text=text)) == plain
    assert well_formed(sample(text=text), opened=True) == opened


def test_empty_thinking_where_it_is_allowed():
    assert well_formed(sample(text="<think>\n\n</think>b"), empty=True) == 1
    assert well_formed(sample(text="</think>b"), opened=True, empty=True) == 1
    assert well_formed(sample(text="<think></think>"), empty=True) == 0


@pytest.mark.parametrize("answer,value", [
    ("<answer>b</answer>", 1), ("<answer>b", 1), ("b", 0), ("<answer></answer>", 0), ("<answer>b</answer> and more", 0),
    ("<answer>b</answer><answer>c</answer>", 0), ("so <answer>b</answer>", 0), ("<answer>b</ans", 0)])
def test_answer_tags(answer, value):
    assert well_formed(sample(text=f"<think>a</think>{answer}"), answer_tags=True) == value


def test_without_text_there_is_nothing_to_look_at():
    with pytest.raises(ValueError, match=r"Sample\.text"):
        well_formed(sample())
