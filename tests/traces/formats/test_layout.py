"""Where the written answers of a row are, when nobody uses the names we would have chosen."""

import json

import pytest

from distill_jax.core.roles import ANSWER, QUESTION, THINK
from distill_jax.traces.formats import BadRow, Fields, Reject, detect, iter_rows
from distill_jax.traces.formats.questions import question_of
from distill_jax.traces.trace import FLAG_TRUNCATED, Provenance, simple_trace

R1 = "<think>\nhm\n</think>\n\nIt is \\boxed{4}."


def traces(row, rows=2):
    fmt = detect([row] * rows)
    return fmt, fmt.records(row, "f", 0)


@pytest.mark.parametrize("row", [
    {"question": "q", "answers": [{"text": "4", "correct": True}, {"text": "5", "correct": False}], "gold": "4"},
    {"question": "q", "responses": ["4", "5"], "labels": [1, 0], "answer": "4"},
    {"question": "q", "solutions": [{"solution": "4", "label": True}, {"solution": "5", "label": False}],
     "answer": "4"},
    {"problem": "q", "model_outputs": ["4", "5"], "is_correct": [True, False], "gold_answer": "4"},
    {"question": "q", "generation": ["4", "5"], "correctness": ["correct", "incorrect"], "answer": "4"},
    {"problem": "q", "generations": ["4", "5"], "correctness_math_verify": [True, False], "answer": "4",
     "messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "4"}]},
])
def test_several_answers_with_flags(row):
    fmt, found = traces(row)
    assert fmt.name == "several answers per question"
    assert [t.answer for t in found] == ["4", "5"] and [t.verdict for t in found] == [True, False]
    assert {t.gold for t in found} == {"4"} and {t.question for t in found} == {"q"}


@pytest.mark.parametrize("word,right", [("True", True), ("0", False), ("incorrect", False), ("maybe", None)])
def test_flags_in_words(word, right):
    (t,) = traces({"question": "q", "response": "a", "is_correct": word})[1]
    assert t.verdict is right


def test_answers_by_model_and_in_an_api_envelope():
    row = {"question": "q", "responses": {"a-7b": "4", "b-8b": "5"}, "answer": "4"}
    assert [(t.provenance.teacher, t.answer) for t in traces(row)[1]] == [("a-7b", "4"), ("b-8b", "5")]
    choice = {"message": {"role": "assistant", "content": "4", "reasoning_content": "hm"}, "finish_reason": "length"}
    (t,) = traces({"question": "q", "response": {"status_code": 200, "body": {"model": "m", "choices": [choice]}}})[1]
    assert (t.thinking, t.answer, t.provenance.teacher, t.flags) == ("hm", "4", "m", (FLAG_TRUNCATED,))


def test_an_answer_is_not_its_own_gold():
    row = {"input": [{"role": "user", "content": "q"}], "output": R1, "generator": "R1"}
    (t,) = traces(row)[1]
    assert t.answer == "It is \\boxed{4}." and t.gold is None
    assert question_of(row, Fields(), "f", 0).gold is None


def test_conversation_written_as_json_text():
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": R1}]
    fmt, (t,) = traces({"messages": json.dumps(messages), "answer": "4"})
    assert fmt.name == "messages" and (t.question, t.thinking, t.gold) == ("q", "hm", "4")


def test_history_of_an_alpaca_row_is_context():
    row = {"instruction": "and 3+3?", "input": "", "output": "6", "history": [["2+2?", "4"]]}
    (t,) = traces(row)[1]
    assert [(s.role, s.text, s.turn) for s in t.segments] == [
        (QUESTION, "2+2?", 0), (ANSWER, "4", 0), (QUESTION, "and 3+3?", 1), (ANSWER, "6", 1)]
    assert [s.text for s in question_of(row, Fields(), "f", 0).segments] == ["2+2?", "4", "and 3+3?"]
    with pytest.raises(Reject, match="malformed_history"):
        detect([row]).records(row | {"history": "2+2? 4"}, "f", 0)


def test_our_own_traces_come_back_as_they_are():
    trace = simple_trace("q", "hm", "4", system="s", gold="4", meta={"k": 2}, provenance=Provenance(source="w"))
    fmt = detect([trace.to_json()] * 2)
    assert fmt.traces(trace.to_json(), "f", 0) == [trace]
    for broken in ({"segments": [{"role": "owl", "text": "q"}]}, {"question": "q", "answer": "4"}):
        with pytest.raises(Reject, match="not_a_trace"):
            fmt.records(broken, "f", 0)


@pytest.mark.parametrize("text", [
    "<thought>hm</thought>4", "<seed:think>hm</seed:think>4", "◁think▷hm◁/think▷4",
    "<thought>hm</thought><output>4</output>", "<Think>\nhm\n</Think>\n\n4"])
def test_tags_of_other_models(text):
    (t,) = traces({"prompt": "q", "response": text})[1]
    assert [(s.role, s.text) for s in t.segments[1:]] == [(THINK, "hm"), (ANSWER, "4")]


def test_text_before_the_thinking_does_not_mean_that_the_prompt_opens_it():
    rows = [{"prompt": "q", "response": "Sure. " + R1}] * 2 + [{"prompt": "q", "response": "4"}]
    fmt = detect(rows)
    assert not fmt.style.prompt_opens
    assert [type(fmt.records(r, "f", 0)[0]) is Reject for r in rows] == [True, True, False]


def test_missing_values_and_bytes_that_are_no_text(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"question": "q", "answer": NaN}\n{"question": "\xff", "answer": "4"}\n'
                     b'{"question": "q", "answer": "4"}\n')
    first, broken, last = iter_rows(path)
    assert first == {"question": "q", "answer": None} and isinstance(broken, BadRow) and broken.reason == "not_utf8"
    broken.text.encode()
    table = {"question": "q", "answer": float("nan")}  # as Parquet has it
    records = detect([last, last]).records(table, "f", 0)
    assert isinstance(records[0], Reject) and records[0].reason == "empty_response"
