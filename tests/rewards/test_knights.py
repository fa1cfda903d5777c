import pytest

from distill_jax.rewards.knights import consistent, gold_roles, judge, roles_of, share_right, solutions
from distill_jax.traces.formats import read_rows
from tests.rewards.samples import sample

GOLD = "Zoey is a knight, Luke is a knave, and Ann is a knight."
RIGHT = {"Zoey": True, "Luke": False, "Ann": True}


@pytest.mark.parametrize("answer", [
    GOLD, GOLD.upper(), "(1) Zoey is a knight\n(2) Luke is a knave\n(3) Ann is a knight",
    "Zoey: knight\nLuke: knave\nAnn: knight", "- **Zoey** is a **knight**.\n- **Luke**: Knave\n- **Ann**: Knight",
    "zoey knight luke knave ann knight", "Zoey and Ann are knights, Luke is a knave",
    "Luke is not a knight; Zoey and Ann are knights",
    "Knights: Zoey, Ann\nKnaves: Luke",
    "**Knights:**\n- Zoey\n- Ann\n\n**Knaves:**\n- Luke\n", "Ann isn't a knave, Zoey is a knight, Luke is a knave.",
    "<answer>Zoey is a knight. Luke is a knave. Ann is a knight.</answer>",
    "I first said Zoey is a knave. <answer>(1) Zoey is a knight (2) Luke is a knave (3) Ann is a knight",
    "\\boxed{\\text{Zoey is a knight, Luke is a knave, Ann is a knight}}",
    "| Zoey | knight |\n| Luke | knave |\n| Ann | knight |", "Zoey is a saint, Luke is a sinner, Ann is a saint"])
def test_right(answer):
    s = sample(gold=GOLD, answer=answer)
    assert judge(s).correct is True, judge(s)
    assert share_right(s) == 1


@pytest.mark.parametrize("answer,method", [
    ("Zoey is a knight, Luke is a knight, and Ann is a knight", "roles"),
    ("Zoey is a knight, Luke is a knave", "roles"),  # one is missing
    ("Zoey is a knight, Luke is a knave, Ann is a knight, Ann is a knave", "roles"),  # both
    ("Zoey is a knight and a knave, Luke is a knave and a knight, Ann is a knight", "roles"),
    (GOLD + "\n<answer>I do not know</answer>", "no_answer"), ("", "no_answer"), ("knight knave knight", "no_answer"),
    ("<answer></answer>", "no_answer"), ("Zoey. Luke. Ann. Knights and knaves.", "no_answer"),
    ("<think>" + GOLD, "unterminated"), ("<answer>" + GOLD + "</answer><answer>Zoey is a knave</answer>", "roles"),
    ("Zоey is a knight, Luke is a knave, Ann is a knight", "roles"),  # a Cyrillic letter is another person
    ("Zoey is a knight or knave, Luke is a knight or knave, Ann is a knight or knave", "roles"),
    ("Zoey is a knight/knave, Luke is a knight/knave, Ann is a knight/knave", "roles")])
def test_wrong(answer, method):
    verdict = judge(sample(gold=GOLD, answer=answer))
    assert (verdict.correct, verdict.method) == (False, method)


def test_thinking_that_never_ends_is_wrong():
    assert judge(sample(gold=GOLD, answer=GOLD, terminated=False)).method == "unterminated"
    assert share_right(sample(gold=GOLD, answer=GOLD, terminated=False)) == 0


def test_share():
    assert share_right(sample(gold=GOLD, answer="Zoey is a knight, Luke is a knight")) == pytest.approx(1 / 3)


def test_names_and_roles_of_golds():
    assert gold_roles(GOLD) == RIGHT
    assert gold_roles("carl knight hugo knave") == {"carl": True, "hugo": False}
    assert gold_roles("Aria is an angel, and Sofia is a devil.") == {"Aria": True, "Sofia": False}
    assert roles_of("", ["Zoey"]) == {} and roles_of("Zoey is a knight", []) == {}
    with pytest.raises(ValueError, match="states no roles"):
        gold_roles("18")


def test_the_puzzle_of_the_card():
    """The first says that the second is a knave; the second that both are knights."""
    said = (("lying", 1), ("and", ("telling-truth", 0), ("telling-truth", 1)))
    assert solutions(said) == [(True, False)] and solutions(str(said)) == [(True, False)]
    assert consistent({"A": True, "B": False}, ["A", "B"], said) and not consistent({"A": True}, ["A", "B"], said)
    with pytest.raises(ValueError, match="unknown statement"):
        solutions((("maybe", 0),))


def test_megabytes():
    assert judge(sample(gold=GOLD, answer="Zoey is a " * 500_000)).correct is False
    assert judge(sample(gold=GOLD, answer="Zoey " * 500_000)).correct is False


@pytest.mark.parametrize("size", [3, 4, 5, 6])
def test_real_puzzles(data_dir, size):
    """Every gold is the puzzle's only solution, is read, and is right; any other assignment is wrong."""
    for row in read_rows(data_dir / f"4_logic/knights_knaves/kk_{size}ppl_test.jsonl.gz"):
        assert solutions(row["statements"]) == [tuple(row["solution"])]
        roles = dict(zip(row["names"], row["solution"]))
        assert gold_roles(row["solution_text"]) == gold_roles(row["solution_text_format"]) == roles
        gold = row["solution_text"]
        assert judge(sample(gold=gold, answer=f"<answer>{row['solution_text_format']}</answer>")).correct
        first = row["names"][0]
        other = f"{first} is a {'knave' if roles[first] else 'knight'}"
        turned = row["solution_text_format"].replace(f"{first} is a {'knight' if roles[first] else 'knave'}", other)
        assert not judge(sample(gold=gold, answer=turned)).correct


def test_real_verdicts(data_dir):
    """Three models on puzzles with other names for the roles: our verdict is the recorded score."""
    compared = 0
    for path in sorted((data_dir / "2_traces/reasoning_gym_groups").glob("*knights_knaves.json*")):
        for result in read_rows(path):
            for completion in result["completions"]:
                got = judge(sample(gold=result["expected_answer"], answer=completion["full_model_response"]))
                assert got.correct == (completion["score"] == 1), (result["expected_answer"], completion)
                compared += 1
    assert compared > 300
