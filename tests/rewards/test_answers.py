from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distill_jax.rewards.answers import after_thinking, extract, kind_of, normalise, number


@pytest.mark.parametrize("text,kind,found", [
    (r"\boxed{5} or \boxed{18} or \boxed{7}", "number", "7"),  # the last one counts
    (r"It is \boxed{3\sqrt{13}}.", "math", r"3\sqrt{13}"),
    (r"<think>\boxed{1}</think>so \boxed{2}", "number", "2"),  # after the thinking only
    (r"\boxed{1}</think>so 2", "number", "2"),
    (r"<answer> \boxed{18}", "number", "18"), ("<answer>18</answer> or <answer>19</answer>", "number", "19"),
    ("48/2 = 24\n#### 24", "number", "24"), ("so\nA: 26", "number", "26"),
    ("The answer is 5. Then again, the answer is 6.", "number", "6"),
    ("**Final Answer:**\n\n670 boxes", "number", "670 boxes"), ("so **Answer: 670**", "number", "670"),
    ("The answer is $3,000. I hope it is correct.", "number", "$3,000"),
    ("The answer is 141 * 71 = 10011", "number", "10011"),
    ("She makes 9*2=18 dollars. The total is 1,800.50.", "number", "1,800.50"),
    ("Sum: \\( 3 + \\frac{5}{3} = \\frac{14}{3} \\).", "number", r"\frac{14}{3}"),
    ("we get\n\\[\n\\sqrt{117} = 3\\sqrt{13}\n\\]", "math", r"\sqrt{117} = 3\sqrt{13}"),
    ("Area = \\pi r^2 = 144\\pi.", "math", r"144\pi"),
    ("The answer is (B).", "letter", "B"), ("Answer: \"C\"", "letter", "C"), ("So (A) is wrong, (D)", "letter", "D"),
    ("The answer is C.\n\nAnswer: A", "letter", "A"), ("A: Rodrigo.", "letter", "A"),
    ("A dog has a tail", "letter", None), ("I think so", "letter", None),
    ("So the answer is no, it is not", "bool", "no"), ("Yes.", "bool", "Yes"),
    ("The answer is Hanoi.", "text", "Hanoi"), ("It is\nHanoi", "text", "Hanoi"),
    ("<think>no end \\boxed{5}", "number", None), ("", "number", None), ("no number", "number", None),
    ("x" * 5000, "text", None),  # nobody's final answer
])
def test_extract(text, kind, found):
    assert extract(text, kind) == found


@pytest.mark.parametrize("text,value", [
    ("18", 18), ("$1,234.50", Fraction(2469, 2)), (r"\frac{14}{3}", Fraction(14, 3)), ("14/3", Fraction(14, 3)),
    (r"-\dfrac12", Fraction(-1, 2)), ("2 1/2", Fraction(5, 2)), (r"2\frac{1}{2}", Fraction(5, 2)),
    ("2½", Fraction(5, 2)),
    ("−3", -3), ("１８", 18), (".5", Fraction(1, 2)), ("1.", 1), ("1e3", 1000), ("5%", 5), (r"50\%", 50),
    (r"56^\circ", 56), ("18 dollars", 18), (r"7 \text{ hours}", 7), ("6th", 6), ("x = 5", 5), (r"10{,}000", 10000),
    ("2x", None), ("5 or 9", None), ("1,2,3", None), ("1/0", None), ("3√13", None), ("10!", None), ("", None),
    ("٣", None), ("9" * 500, None), ("1e999999", None), ("2 pi", None),
])
def test_number(text, value):
    assert number(text) == value


@given(st.integers(-10**12, 10**12))
def test_number_reads_what_python_writes(n):
    assert number(str(n)) == number(f"{n:,}") == number(f"${n:,}") == n


@pytest.mark.parametrize("gold,kind", [
    ("18", "number"), ("B", "letter"), ("(C)", "letter"), (r"\text{(E)}", "letter"), ("True", "bool"), ("no", "bool"),
    (r"3\sqrt{13}", "math"), ("(1,2)", "math"), ("x^2+1", "math"), ("x", "math"), ("Paris", "text"),
    (r"\text{Evelyn}", "text"), ("Olivia is a knight, and Lily is a knave.", "text"), ("{'a': 1}", "text"),
])
def test_kind_of(gold, kind):
    assert kind_of(gold) == kind


def test_normalise():
    assert normalise(r" $\left( 3, \dfrac{\pi}{2} \right)$. ") == normalise(r"(3,\frac{\pi}{2})")
    assert normalise("**The  Answer**") == "answer" and normalise(r"\text{Evelyn}") == "evelyn"
    assert normalise("A") != normalise("А")  # a Cyrillic look-alike is another letter


@given(st.text())
def test_nothing_raises(text):
    for kind in ("auto", "number", "math", "letter", "bool", "text"):
        extract(text, kind)
    number(text), normalise(text), kind_of(text), after_thinking(text)
