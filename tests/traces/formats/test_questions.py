"""Questions out of files of any format, answered or not."""

import json

import pytest

from distill_jax.traces.formats import Reject
from distill_jax.traces.formats.fields import Fields, load_join
from distill_jax.traces.formats.questions import prompt_only, question_of, read_questions
from distill_jax.traces.trace import simple_trace

U, A = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "<think>hm</think>\n\nyo"}

ROWS = [  # row, (system, question, gold)
    ({"question": "1+1?", "answer": "One and one.\n#### 2"}, ("", "1+1?", "2")),
    ({"question": "1+1?"}, ("", "1+1?", None)),
    ({"problem": "1+1?", "answer": 2, "level": "easy"}, ("", "1+1?", "2")),
    ({"input": "1+1?", "target": 2.0}, ("", "1+1?", "2")),
    ({"question": "1+1?", "response": "<think>a</think>3", "ground_truth": "2", "system": "s"}, ("s", "1+1?", "2")),
    ({"Body": "Ann has 1.", "Question": "And 1 more?", "Answer": 2.0}, ("", "Ann has 1. And 1 more?", "2")),
    ({"instruction": "Add", "input": "1 1", "output": "2"}, ("", "Add\n1 1", None)),
    ({"messages": [U]}, ("", "hi", None)),
    ({"messages": [{"role": "system", "content": "s"}, U, A], "answer": "yo"}, ("s", "hi", "yo")),
    ({"prompt": [U], "answer": "yo"}, ("", "hi", "yo")),
    (simple_trace("1+1?", "a", "2", gold="2", verdict=True, system="s").to_json(), ("s", "1+1?", "2")),
]


@pytest.mark.parametrize("row, want", ROWS, ids=lambda x: ",".join(x) if isinstance(x, dict) else "")
def test_rows(row, want):
    q = question_of(row, Fields(), "file", 3)
    assert (q.system, q.question, q.gold) == want
    assert q.thinking == q.answer == "" and q.verdict is None and not q.flags
    assert (q.provenance.source, q.provenance.row) == ("file", 3)


def test_extras_stay_and_what_was_said_of_an_answer_goes():
    q = question_of({"problem": "1+1?", "answer": "2", "level": "easy"}, Fields(), "f", 0)
    assert q.meta == {"level": "easy"}
    told = simple_trace("q", "t", "a", meta={"k": 3, "check": "math", "extracted": "7"}, scores={"x": 1.0})
    assert prompt_only(told).meta == {"k": 3} and prompt_only(told).group == told.group and not prompt_only(told).scores


def test_earlier_turns_are_context():
    row = {"messages": [U, {"role": "assistant", "content": "yo"}, {"role": "user", "content": "more"}, A]}
    q = question_of(row, Fields(), "f", 0)
    assert [s.text for s in q.segments] == ["hi", "yo", "more"] and q.question == "more"
    assert q.segments == question_of({"messages": row["messages"][:-1]}, Fields(), "f", 0).segments


def test_files(tmp_path):
    file, side = tmp_path / "q.jsonl", tmp_path / "side.json"
    file.write_text('{"question": "a?", "id": 1}\n{"id": 2}\n{broken\n{"question": "", "id": 1}\n')
    side.write_text(json.dumps([{"id": 1, "gold": "7"}]))
    found = [q for _, q in read_questions(file, joins=[load_join(f"{side}:id=id")])]
    assert found[0].gold == "7"
    assert [q.reason for q in found[1:]] == ["join_missing", "bad_json", "no_question"]
    assert all(isinstance(q, Reject) for q in found[1:])
    with pytest.raises(Reject, match="no_question"):
        question_of({"text": 3}, Fields(), "f", 0)


@pytest.mark.parametrize("name, count", [("1_math/gsm8k/train.jsonl.gz", 7473), ("1_math/svamp/SVAMP.json.gz", 1000),
                                         ("1_math/competition/amc23.jsonl", 40)])
def test_real_files(data_dir, name, count):
    found = [q for _, q in read_questions(data_dir / name)]
    assert len(found) == count and not any(isinstance(q, Reject) for q in found)
    assert all(q.question.strip() and q.gold for q in found)
