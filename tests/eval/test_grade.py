"""The metric cases of the evaluation card, and what counts as an answer."""

import pytest

from distill_jax.eval.grade import best_subspan, contains, exact, grade_all, normalise, token_f1, usable_golds
from distill_jax.eval.records import Answer, Item
from distill_jax.eval.run import run


def item(kind="qa", golds=("oslo",), i=0, **kw):
    return Item(id=str(i), group=str(i), question="q", golds=golds, kind=kind, **kw)


def test_subspan():
    assert best_subspan("The Beatles!", ["beatles"])
    assert not best_subspan("x\nParis", ["Paris"]), "cut at the first newline"
    assert best_subspan("\n\n Paris is it", ["Paris"]), "leading newlines do not cut the answer away"
    assert not best_subspan("anything", ["*"]), "a gold that normalises to nothing matches nothing"
    assert best_subspan("It was an Apple, I think", ["pear", "the apple"])
    assert not best_subspan("", ["x"])


def test_copying_the_context_scores_nothing_with_the_cut():
    context = "Document [1](Title: a) x\nDocument [2](Title: b) the answer is Oslo"
    assert not best_subspan(context, ["Oslo"])
    assert best_subspan(context.replace("\n", " "), ["Oslo"])


def test_normalise_and_f1():
    assert normalise("  The  Cat's, a (big) hat. ") == "cats big hat"
    assert normalise("theatre anvil") == "theatre anvil", "articles only as whole words"
    assert token_f1("a b", ["b c"]) == pytest.approx(2 / 3), "`a` is an article and goes: {b} against {b, c}"
    assert token_f1("x b", ["b c"]) == 0.5
    assert token_f1("nothing", ["else", "nothing"]) == 1.0 and token_f1("", ["x"]) == 0.0
    assert usable_golds(["*", "the", "x"]) == ("x",)


def test_exact_and_contains():
    assert exact("The  cat.", ["cat"]) and not exact("cats", ["cat"])
    assert exact("So the answer is: **Paris**.", ["paris"]) and exact("Answer: yes", ["no", "yes"])
    assert contains("{'v': 'AB-1'}", ["ab-1"]) and not contains("ab 1", ["ab-1"])


def test_grades_only_finished_answers_and_sends_mathematics_to_the_checker():
    items = [item(), item(), item(), item("auto", ("72",)), item("auto", (r"\frac{1}{2}",)), item("auto", ("7",))]
    answers = [Answer(text="Oslo"), Answer(text="Oslo", finished=False), Answer(text="oslo", problem="prompt too long"),
               Answer(text="She sold 72 clips. The answer is 72."), Answer(text=r"\boxed{0.5}"), Answer(text="8")]
    assert grade_all(items, answers) == [True, False, False, True, True, False]


class Fixed:
    name = "fixed"

    def __init__(self, *items):
        self._items = list(items)

    def items(self):
        return self._items


def test_run_skips_nothing_and_chunks():
    asked = []

    def answerer(questions):
        asked.append(len(questions))
        return [Answer(text="Oslo"), Answer(text="", problem="prompt too long: 9 tokens")][:len(questions)]

    seen = []
    out = run(Fixed(item(i=0), item(i=1), item(i=2)), answerer, model="m", chunk=2,
              progress=lambda done, of: seen.append((done, of)))
    assert asked == [2, 1] and seen == [(2, 3), (3, 3)] and len(out) == 3
    assert [r.correct for r in out.rows] == [True, False, True] and out.rows[1].over_long
    assert all(r.seconds > 0 for r in out.rows) and (out.task, out.model) == ("fixed", "m")


def test_run_refuses_nonsense():
    with pytest.raises(ValueError, match="no items"):
        run(Fixed(), lambda q: [])
    with pytest.raises(ValueError, match="1 answers to 2"):
        run(Fixed(item(i=0), item(i=1)), lambda q: [Answer(text="")])
    with pytest.raises(ValueError, match="empty gold"):
        item(golds=("",))
