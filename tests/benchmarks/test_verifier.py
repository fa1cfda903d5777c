"""The fuzzer repeats itself and breaks nothing; metrics of the vectors by hand."""

import pytest

from benchmarks.verifier import Case, compare, fuzz, metric, strings
from distill_jax.rewards.checker import Checker


def test_strings_are_a_function_of_the_seed():
    assert list(strings(3, 40)) == list(strings(3, 40)) != list(strings(4, 40))
    texts = [t for t, _ in strings(0, 400)]
    assert any(len(t) > 1000 for t in texts) and any(not t.isascii() for t in texts) and len(set(texts)) > 300


def test_nothing_raises():
    with Checker(workers=1, timeout=1.0) as checker:
        *_, report = fuzz(7, 60, checker, first=20)
    assert report["strings"] == [20, 60] and report["exceptions"] == [] and sum(report["methods"].values()) == 40


def test_metrics():
    assert metric("avg_at_k", {"k": 2}, [True, False, True], []) == 0.5
    assert metric("pass_at_k", {"k": 2, "n": 4}, [True, False, False, False], []) == 0.5
    assert metric("maj_at_k", {"k": 3}, [False, True, True], ["a", "b", "b "]) == 1
    assert metric("exact_match", {}, [True], ["a"]) == 1


def test_disagreements_are_listed_and_unterminated_thinking_is_counted_apart():
    case = lambda text, said: Case(source="s", row=0, text=text, gold="18", said=said)
    with Checker(workers=1) as checker:
        found = compare([case("18", True), case("17", True), case("17", False), case("<think>18", True)], checker)
    assert (found["cases"], found["unterminated"], found["compared"], found["same"]) == (4, 1, 3, 2)
    assert found["agreement"] == pytest.approx(2 / 3)
    assert [d["method"] for d in found["differ"]] == ["number", "unterminated"]
