"""Tasks: exact prompts, one gold at its place, no leaks, the same question at every position."""

import gzip
import json
import random
import re

import pytest

from distill_jax.eval.grade import normalise
from distill_jax.eval.tasks import TASKS, find, make
from distill_jax.eval.tasks.ctxs import Passage, borrowed, read_questions
from distill_jax.eval.tasks.multihop import last_hop_places, slots
from distill_jax.eval.tasks.positions import spaced
from distill_jax.traces.world.generate import WorldSpec, traces


def test_spaced():
    assert spaced(list(range(8)), 5) == [0, 2, 4, 5, 7]
    assert spaced([0, 1], 5) == [0, 1] and spaced([3], 0) == [3] and spaced(list(range(9)), 1) == [0]
    with pytest.raises(ValueError):
        spaced([0], -1)


@pytest.mark.parametrize("name", [t for t in TASKS if t != "answer_match"])
def test_world_tasks_pair_questions_and_stay_out_of_training(name):
    items = make(name, k=(2, 4), questions=6).items()
    assert len({i.id for i in items}) == len(items)
    groups = {}
    for i in items:
        groups.setdefault(i.group, []).append(i)
        assert i.golds and i.axes["k"] in (2, 4)
    if name != "puzzles":  # a puzzle is the same under other names, and of two people there are few
        assert len(groups) == 12
        assert all(len({i.golds for i in g}) == 1 for g in groups.values())
    kind = {"multidoc_qa": "two_hop", "multihop": "two_hop", "conflicts": "conflict", "varied_length": "varied",
            "long_document": "long_document", "kv_retrieval": "kv", "puzzles": "knights"}[name]
    trained = {t.group for k in (2, 4) for t in traces(WorldSpec(kind=kind, k=k), 300)}
    assert not trained & set(groups)


def test_multidoc_positions_and_settings():
    items = make("multidoc_qa", k=(4, 8), questions=3, positions=0).items()
    assert sum(i.axes["k"] == 4 for i in items) == 3 * 4 and sum(i.axes["k"] == 8 for i in items) == 3 * (8 + 2)
    for i in items:
        docs = i.question.split(" ask ")[0].removeprefix("doc ").split(" doc ")
        if i.axes["setting"] == "all":
            said = docs[i.axes["position"]]
            assert said.startswith("grows ") and said.endswith(f" {i.golds[0]}")
        elif i.axes["setting"] == "gold":
            assert len(docs) == 2 and i.golds[0] in i.question
        else:
            assert i.question.startswith("ask ")


def test_unknown_task_and_option():
    with pytest.raises(ValueError, match="multidoc_qa"):
        find("multidoc")
    with pytest.raises(ValueError, match=r"unknown task .zzz.; known: answer_match, conflicts"):
        find("zzz")
    with pytest.raises(ValueError, match="no field 'layouts'"):
        make("conflicts", layouts=())


def oracle_rows(n=12):
    rows = [{"question": f"where is thing {i}", "answers": [f"Place{i}"],
             "ctxs": [{"title": f"T{i}", "text": f"Thing {i} is in Place{i}.", "isgold": True, "hasanswer": True}]}
            for i in range(n)]
    rows[3]["answers"] = ["*"]
    rows[4]["ctxs"][0]["text"] += " So is Place5."  # leaks the answer of question 5
    return rows


@pytest.fixture
def oracle(tmp_path):
    path = tmp_path / "nq.jsonl.gz"
    with gzip.open(path, "wt") as f:
        f.writelines(json.dumps(r) + "\n" for r in oracle_rows())
    return path


def test_what_was_left_out_is_counted(oracle):
    out = make("multidoc_qa", data=str(oracle), k=(2, 9), questions=20).left_out()
    assert out["rows without a usable answer"] == 1 and out["distractors refused for holding an answer"] >= 1
    assert make("multidoc_qa", k=(2,)).left_out() == {}


def test_oracle_file_builds_the_exact_prompt(oracle):
    items = make("multidoc_qa", data=str(oracle), k=(2, 5), questions=20).items()
    assert not any("thing 3\n" in i.question for i in items), "the gold `*` normalises to nothing"
    first = next(i for i in items if i.axes == {"k": 2, "position": 1, "setting": "all"})
    head, docs, tail = re.fullmatch(r"(.*?)\n\n(.*)\n\n(.*)", first.question, re.S).groups()
    assert head == ("Write a high-quality answer for the given question using only the provided search results "
                    "(some of which might be irrelevant).")
    assert docs.split("\n")[1] == "Document [2](Title: T0) Thing 0 is in Place0."
    assert re.fullmatch(r"Document \[1\]\(Title: T\d+\) .*", docs.split("\n")[0])
    assert tail == "Question: where is thing 0\nAnswer:"
    closed = [i for i in items if i.axes["setting"] == "none"]
    assert closed[0].question == "Question: where is thing 0\nAnswer:" and len(closed) == 11
    for i in items:
        if i.axes["setting"] == "all":
            lines = i.question.split("\n\n")[1].split("\n")
            assert [n for n, line in enumerate(lines) if i.golds[0] in line] == [i.axes["position"]], "leak or no gold"
            assert len(lines) == i.axes["k"]


def test_growing_k_only_adds_documents_and_the_seed_decides(oracle):
    small, _ = read_questions(oracle, 3, 5, 0)
    large, dropped = read_questions(oracle, 8, 5, 0)
    assert all(b.distractors[:2] == a.distractors for a, b in zip(small, large, strict=True))
    assert read_questions(oracle, 8, 5, 0)[0] == large != read_questions(oracle, 8, 5, 1)[0]
    assert dropped.empty_gold == 1 and dropped.leaks >= 0
    with pytest.raises(ValueError, match="largest k of this file is 11"):
        read_questions(oracle, 40, 5, 0)


def test_leaks_are_refused():
    pool = [Passage(title="Own", text="x"), Passage(title="B", text="It is a New, york!"),
            Passage(title="New York", text="z"), Passage(title="Own", text="other part"), Passage(title="C", text="y")]
    got, refused = borrowed(["new york", "x"], pool[0], pool, 4, random.Random(0))
    assert [p.title for p in got] == ["C"] and refused == 2


def test_ctxs_file_keeps_retrieval_order(tmp_path):
    ctxs = [{"title": f"T{i}", "text": f"t{i}", "isgold": i == 2} for i in range(5)]
    path = tmp_path / "ten.jsonl"
    path.write_text(json.dumps({"question": "q", "answers": ["t2"], "ctxs": ctxs}))
    items = make("multidoc_qa", data=str(path), k=(4,), floor_and_ceiling=False).items()
    at_1 = next(i for i in items if i.axes["position"] == 1)
    assert re.findall(r"Title: (T\d)", at_1.question) == ["T0", "T2", "T1", "T3"]
    with pytest.raises(ValueError, match="largest k of this file is 5"):
        make("multidoc_qa", data=str(path), k=(6,)).items()
    path.write_text(json.dumps({"x": 1}))
    with pytest.raises(ValueError, match="expected question, answers, ctxs"):
        make("multidoc_qa", data=str(path)).items()


def test_kv_file(tmp_path):
    pairs = [[f"k{i}", f"v{i}"] for i in range(6)]
    path = tmp_path / "kv.jsonl"
    path.write_text(json.dumps({"ordered_kv_records": pairs, "key": "k3", "value": "v3"}))
    items = make("kv_retrieval", data=str(path), k=(3,)).items()
    assert [i.axes["position"] for i in items] == [0, 1, 2] and items[0].kind == "contains"
    assert items[1].question == (
        "Extract the value corresponding to the specified key in the JSON object below.\n\nJSON data:\n"
        '{"k0": "v0",\n "k3": "v3",\n "k1": "v1"}\n\nKey: "k3"\nCorresponding value:')
    with pytest.raises(ValueError, match="fewer than k=9"):
        make("kv_retrieval", data=str(path), k=(9,)).items()


def test_slots_of_three_hops():
    assert slots("adjacent", 10, 3, 4) == [2, 3, 4] and slots("reversed", 10, 3, 4) == [6, 5, 4]
    assert slots("spread", 10, 3, 9) == [0, 4, 9]
    for layout in ("adjacent", "reversed", "spread"):
        for p in last_hop_places(layout, 6, 2):
            s = slots(layout, 6, 2, p)
            assert s[-1] == p and len(set(s)) == 2 and all(0 <= i < 6 for i in s)


def test_answer_match(tmp_path):
    path = tmp_path / "g.jsonl"
    rows = [{"question": "2+2?", "answer": "It is 4.\n#### 4"}, {"problem": "x", "solution": r"so \boxed{\frac12}"},
            {"question": "y", "answer": "blue"}]
    path.write_text("\n".join(map(json.dumps, rows)))
    items = make("answer_match", data=str(path), suffix=" Think.").items()
    assert [i.golds[0] for i in items] == ["4", r"\frac12", "blue"] and items[0].question == "2+2? Think."
    path.write_text(json.dumps({"q": "2+2?", "a": 4}))
    with pytest.raises(ValueError, match=r"row 1: no_question.*fields: q, a.*map=\["):
        make("answer_match", data=str(path)).items()
    mapped = make("answer_match", data=str(path), map=["question=q", "gold=a"]).items()
    assert [(i.question, i.golds) for i in mapped] == [("2+2?", ("4",))]


def test_answer_match_reads_what_importers_read(tmp_path):
    rows = [{"Body": "Two.", "Question": "And two?", "Answer": 4.0}, {"question": "q", "answer": ""},
            {"question": "Which?", "options": ["A) 1", "B) 2"], "correct": "B"}, {"input": "i", "target": 7},
            {"prompt": "p", "answer": "x", "accept": ["y"]}]
    path = tmp_path / "g.json"
    path.write_text(json.dumps(rows))
    items = make("answer_match", data=str(path)).items()
    assert [(i.question, i.golds) for i in items] == [
        ("Two. And two?", ("4",)), ("Which?\nA) 1\nB) 2", ("B",)), ("i", ("7",)), ("p", ("x", "y"))]
    assert len(make("answer_match", data=str(path), questions=2).items()) == 2


def test_real_files(data_dir):
    root = data_dir / "3_multidoc_qa"
    items = make("multidoc_qa", data=str(root / "lost_in_the_middle/nq-open-oracle.jsonl.gz"), k=(10,), questions=60,
                 positions=3).items()
    assert len(items) == 60 * (3 + 2)
    for i in items:
        if i.axes["setting"] == "all":
            lines = i.question.split("\n\n")[1].split("\n")
            held = [n for n, line in enumerate(lines) if any(normalise(g) in normalise(line) for g in i.golds)]
            assert i.axes["position"] in held and len(lines) >= 10
    kv = make("kv_retrieval", data=str(root / "lost_in_the_middle/kv-retrieval-75_keys.jsonl.gz"), k=(75,),
              questions=5).items()
    assert len(kv) == 25 and all(i.golds[0] in i.question for i in kv)
    hop = make("multihop", data=str(root / "hotpot_distractor_100/hotpot_dev_distractor_100.json.gz"), k=(10, 14),
               questions=10).items()
    assert {i.axes["layout"] for i in hop} == {"adjacent", "reversed", "spread"}
    assert all(i.question.count("\nDocument [") + 1 >= i.axes["k"] for i in hop)
    long = make("long_document", data=str(root / "lost_in_the_middle/nq-open-oracle.jsonl.gz"), k=(4,),
                questions=3).items()
    assert long[0].question.startswith("Read the document") and "Document [" not in long[0].question


def test_real_gsm8k(data_dir):
    items = make("answer_match", data=str(data_dir / "1_math/gsm8k/train.jsonl.gz"), questions=20).items()
    assert all(re.fullmatch(r"-?[\d,.]+", i.golds[0]) for i in items)
