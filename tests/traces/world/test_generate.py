import re
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distill_jax.traces.trace import Trace
from distill_jax.traces.world import compact, curriculum, facts, filler, rich
from distill_jax.traces.world.draw import Draw, digest
from distill_jax.traces.world.generate import KINDS, RENDERINGS, WorldSpec, split_of, symbols, trace, traces
from tests.traces.world import solvers

K = {"knights": 3, "arithmetic": 4}
COMPACT_SOLVER = {"kv": solvers.compact_kv, "knights": solvers.compact_knights,
                  "arithmetic": solvers.compact_arithmetic}


def spec_of(kind: str, **changes) -> WorldSpec:
    return WorldSpec(kind=kind, k=K.get(kind, 8), **changes)


@pytest.mark.parametrize("kind", KINDS)
def test_compact_answers_are_right(kind):
    """Every answer equals what a solver makes of the printed question."""
    solve = COMPACT_SOLVER.get(kind, solvers.compact_documents)
    for split in ("train", "eval"):
        for t in traces(spec_of(kind, split=split), 60):
            assert solve(t.question) == t.answer == t.gold, t.question


@pytest.mark.parametrize("k", [2, 3, 5, 16, 32])
def test_two_hop_is_right_at_every_k(k):
    for t in traces(WorldSpec(k=k, split="eval"), 20):
        assert solvers.compact_documents(t.question) == t.answer
        assert t.question.count("doc ") == k


@pytest.mark.parametrize("kind", ["lookup", "two_hop", "varied", "long_document"])
def test_rich_documents_are_right(kind):
    for t in traces(spec_of(kind, rendering="rich"), 25):
        path = list(symbols(spec_of(kind, rendering="rich"), t.meta["index"]).path)
        assert solvers.rich_documents(t.question, path) == t.answer, t.question


@pytest.mark.parametrize("kind", ["knights", "arithmetic"])
def test_rich_puzzles_are_right(kind):
    solve = getattr(solvers, f"rich_{kind}")
    for t in traces(spec_of(kind, rendering="rich"), 40):
        assert solve(t.question) == t.answer, t.question


def test_rich_conflicts_follow_the_stated_rule():
    for t in traces(spec_of("conflict", rendering="rich"), 40):
        q = symbols(spec_of("conflict", rendering="rich"), t.meta["index"])
        docs = re.findall(r"\(Title: ([^)]*)\) (.*)", t.question)
        subject = rich.name(q.subject)
        rivals = [text for title, text in docs if title == subject]
        assert len(rivals) >= 2
        if t.meta["rule"] == "latest":
            winner = max(rivals, key=lambda d: int(re.search(r"\b(1[89]\d\d|20[012]\d)\b", d)[1]))
        else:
            order = re.search(r"(?:order: |reliable: |list: )([^.]*)\.", t.question)[1].split(", ")
            winner = min(rivals, key=lambda d, order=order: min(i for i, s in enumerate(order) if s in d))
        assert t.answer in winner
        assert sum(t.answer in d for d in rivals) == 1


@pytest.mark.parametrize("rendering", RENDERINGS)
@pytest.mark.parametrize("kind", KINDS)
def test_thinking_holds_the_answer_and_extended_is_longer(rendering, kind):
    longer = []
    for i in range(12):
        short = trace(spec_of(kind, rendering=rendering), i)
        long = trace(spec_of(kind, rendering=rendering, style="extended"), i)
        assert (short.question, short.answer, short.group) == (long.question, long.answer, long.group)
        longer.append(len(long.thinking) > len(short.thinking) > 0)
        if not (rendering == "compact" and kind == "arithmetic"):  # there the digits come out column by column
            assert short.answer in short.thinking and long.answer in long.thinking
        if rendering == "compact" and "gold_position" in short.meta:
            assert " no" in long.thinking and "check" in long.thinking
    assert sum(longer) >= 6 if kind == "knights" else all(longer)  # a puzzle's first supposition may be the right one


def test_knights_try_none_to_two_wrong_suppositions():
    """Where a supposition stands does not say whether it holds."""
    wrong = [t.thinking.count("suppose") - 1 for t in traces(spec_of("knights", style="extended"), 300)]
    assert set(wrong) == {0, 1, 2} and min(wrong.count(n) for n in range(3)) > 70


def test_compact_arithmetic_thinking_writes_the_answer_digit_by_digit():
    for t in traces(spec_of("arithmetic"), 40):
        written = re.findall(r"write (\d) carry (\d)", t.thinking)
        value = int(t.answer.replace(" ", ""))
        digits = "".join(d for d, _ in reversed(written))
        assert int(written[-1][1] + digits) == value


@pytest.mark.parametrize("kind", KINDS)
def test_splits_cannot_overlap(kind):
    """Same seed, other seeds, other layouts: a train question is never an evaluation question."""
    groups = {split: {t.group for seed in range(3) for t in traces(spec_of(kind, split=split, seed=seed), 120)}
              for split in ("train", "eval")}
    assert not groups["train"] & groups["eval"]
    for split in ("train", "eval"):
        assert all(split_of(symbols(spec_of(kind, split=split), i)) == split for i in range(30))


def test_split_is_blind_to_order_names_and_wording():
    q = symbols(WorldSpec(split="eval"), 3)
    for position in range(8):
        assert split_of(facts.lay_out(q, Draw(position), position)) == "eval"
    puzzle = symbols(spec_of("knights", split="eval"), 0)
    assert split_of(replace(puzzle, people=(5, 1, 3))) == "eval"
    # people turned round: speaker i becomes speaker n-1-i everywhere
    turned = tuple(replace(s, a=2 - s.a, b=2 - s.b if s.b >= 0 else -1) for s in reversed(puzzle.says))
    assert replace(puzzle, says=turned).canonical() == puzzle.canonical()


def test_questions_hardly_repeat():
    groups = [t.group for t in traces(WorldSpec(k=8), 500)]
    assert len(set(groups)) == 500


@settings(max_examples=30, deadline=None)
@given(k=st.integers(2, 12), index=st.integers(0, 10_000), layout=st.sampled_from(facts.LAYOUTS),
       kind=st.sampled_from(["lookup", "two_hop", "conflict", "varied"]))
def test_position_is_kept_and_nothing_else_moves(k, index, layout, kind):
    hops = 2 if kind == "two_hop" else 1
    spec = WorldSpec(kind=kind, k=k, layout=layout, split="eval")
    allowed = facts.positions(k, hops, layout)
    seen = []
    for p in allowed:
        t = trace(replace(spec, position=p), index)
        docs = t.question.split(" rule ")[0].split(" ask ")[0].removeprefix("doc ").split(" doc ")
        assert t.meta["gold_position"] == p and t.answer in docs[p]
        where = t.meta["hop_positions"]
        if hops == 2:
            expected = {"adjacent": p - 1, "reversed": p + 1, "spread": 0}.get(layout, where[0])
            assert where == [expected, p]
        seen.append([d for i, d in enumerate(docs) if i not in where])
    assert all(s == seen[0] for s in seen), "the distractors changed their order"


def test_impossible_position_says_what_is_possible():
    with pytest.raises(ValueError, match=r"possible: \[1, 2, 3\]"):
        trace(WorldSpec(k=4, position=0, layout="adjacent"), 0)
    with pytest.raises(ValueError, match="no documents"):
        trace(WorldSpec(kind="arithmetic", k=2, position=0), 0)


@pytest.mark.parametrize("bad", [{"kind": "nope"}, {"rendering": "x"}, {"style": "x"}, {"split": "x"}, {"k": 0}])
def test_bad_spec(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        WorldSpec(**bad)


def test_too_many_documents_for_the_names():
    with pytest.raises(ValueError, match="rendering='rich'"):
        trace(WorldSpec(k=40), 0)


def test_oracle_and_closed_book_views():
    whole = trace(WorldSpec(k=8, rendering="rich", split="eval"), 4)
    gold = trace(WorldSpec(k=8, rendering="rich", split="eval", shown="gold"), 4)
    none = trace(WorldSpec(k=8, rendering="rich", split="eval", shown="none"), 4)
    assert whole.group == gold.group == none.group and whole.answer == gold.answer == none.answer
    lines = re.findall(r"\(Title.*", gold.question)
    assert len(lines) == 2 and all(line in whole.question for line in lines)
    assert "Document" not in none.question and none.question.startswith("Question: ") and not none.thinking
    assert trace(WorldSpec(k=8, shown="none"), 0).question.startswith("ask ")


def test_compact_rows_are_short():
    """At most about five tokens a document, and 64 to a two-hop row of eight documents with its thinking."""
    for t in traces(WorldSpec(k=8), 50):
        assert len(t.question.split()) == 8 * 4 + 4
        assert len(f"{t.question} {t.thinking} {t.answer}".split()) + 5 <= 64
    assert max(len(f"{t.question} {t.thinking}".split()) for t in traces(spec_of("conflict"), 50)) <= 91


def test_rich_has_words_and_entropy():
    made = [t for kind in KINDS for t in traces(spec_of(kind, rendering="rich", style="extended"), 60)]
    words = {w.lower() for t in made for w in re.findall(r"[A-Za-z]+", t.question + " " + t.thinking)}
    assert len(words) >= 1500
    assert min(t.scores["oracle_bits"] for t in made if t.meta["kind"] != "arithmetic") > 8
    again = trace(spec_of("two_hop", rendering="rich", seed=1), 0)
    assert again.thinking != trace(spec_of("two_hop", rendering="rich"), 0).thinking


@pytest.mark.parametrize("rendering", RENDERINGS)
def test_names_are_not_substrings_of_each_other(rendering):
    """Answers are matched as substrings, so no name may contain another that could stand in its place."""
    for type_, names in RENDERINGS[rendering].LEXICON.names.items():
        assert len(set(names)) == len(names)
        if type_ in ("person", "source", "year", "key", "value"):  # never answers, or all of one length
            continue
        low = [n.lower() for n in names]
        bad = [(a, b) for a in low for b in low if a != b and a in b]
        assert not bad, bad


def test_filler_holds_no_answers():
    names = RENDERINGS["rich"].LEXICON.names
    answers = {n for t in ("good", "job", "pet") for n in names[t]}
    assert not answers & filler.vocabulary()


def test_json_round_trip_and_pure_function():
    for kind in KINDS:
        t = trace(spec_of(kind), 7)
        assert Trace.from_json(t.to_json()) == t
        assert list(traces(spec_of(kind), 3, start=5))[2] == t


def test_world_is_frozen():
    """A change of the generated world changes every number measured on it: then change this digest knowingly."""
    made = [trace(spec_of(kind, rendering=r), i).id for kind in KINDS for r in RENDERINGS for i in range(3)]
    assert f"{digest(*made):016x}" == "aab866426a4c616b"


def test_lessons_are_look_ups_that_only_the_subject_decides():
    c = curriculum.Curriculum(seed=3)
    for number, lesson in enumerate(curriculum.LESSONS):
        made = list(c.lesson(number, 60))
        assert [t.id for t in made] == [t.id for t in c.lesson(number, 60)]
        assert {t.meta["k"] for t in made} == set(lesson.ks)
        for t in made:
            docs = [d.split() for d in t.question.partition(" ask ")[0].removeprefix("doc ").split(" doc ")]
            assert len(docs) == t.meta["k"] and len({d[0] for d in docs}) == 1, "one relation"
            assert all(len({d[i] for d in docs}) == len(docs) for i in (1, 2)), "different subjects and values"
            relation, subject = t.question.split()[-2:]
            assert [relation, subject, t.answer] in docs and t.thinking == f"{relation} {subject} {t.answer}"
        subjects = {relation: {t.question.split()[-1] for t in made if t.question.split()[-2] == relation}
                    for relation in ("lives", "grows")}
        assert all(len(s) <= lesson.names for s in subjects.values())


def test_curriculum_trains_on_no_question_it_is_evaluated_on():
    trained = {t.group for t in curriculum.Curriculum(seed=3).two_hop(300)}
    spec = WorldSpec(kind="two_hop", k=4, seed=3, split="eval")
    assert not trained & {t.group for t in traces(spec, 300)}


def test_names_limit_the_world():
    words = {w for t in traces(WorldSpec(kind="two_hop", k=4, names=3), 50) for w in t.question.split()}
    assert len(words - set(compact.WORDS)) == 9
    with pytest.raises(ValueError, match="names"):
        list(traces(WorldSpec(kind="two_hop", k=8, names=3), 1))
    with pytest.raises(ValueError, match="names must be at least 1"):
        WorldSpec(names=0)
