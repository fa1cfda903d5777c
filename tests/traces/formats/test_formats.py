"""One small table per format: rows in, segments out."""

import pytest

from distill_jax.core.roles import ANSWER, INJECTED, QUESTION, SYSTEM, THINK, TOOL, TOOL_CALL
from distill_jax.traces.formats import Format, Reject, detect, load_join, parse_map, read_rows


def run(rows, *maps):
    """Records of all rows, flat, by the format of the first ones."""
    rows = rows if isinstance(rows, list) else [rows]
    fmt = detect(rows, parse_map(maps))
    assert isinstance(fmt, Format)
    return [t for i, r in enumerate(rows) for t in fmt.records(r, "file", i)]


def shape(trace):
    return [(s.role, s.text, s.turn) for s in trace.segments]


def test_thinking_kept_apart():
    rows = [{"prompt": "q", "thinking": "hm\n", "content": "4", "done_reason": "stop", "model": "m",
             "temperature": 0.0},
            {"prompt": "q", "thinking": "hm, and", "content": "", "done_reason": "length"},
            {"prompt": "q", "thinking": "hm", "content": "", "done_reason": "stop"},
            {"prompt": "q", "thinking": "", "content": "4", "done_reason": "length"},
            {"prompt": "q", "thinking": "", "content": "", "done_reason": "stop"}]
    a, cut, empty, short, nothing = run(rows)
    assert shape(a) == [(QUESTION, "q", 0), (THINK, "hm", 0), (ANSWER, "4", 0)] and a.flags == ()
    assert a.provenance.teacher == "m" and a.provenance.sampling == {"temperature": 0.0}
    assert (a.provenance.source, a.provenance.row, cut.provenance.row) == ("file", 0, 1)
    assert shape(cut) == [(QUESTION, "q", 0), (THINK, "hm, and", 0)]
    assert cut.flags == ("unterminated_think", "empty_answer", "truncated")
    assert empty.flags == ("empty_answer",) and short.flags == ("truncated",) and short.thinking == ""
    assert isinstance(nothing, Reject) and nothing.reason == "empty_response"


def test_an_empty_answer_is_never_filled_from_the_gold():
    """The answers of a file are in one field; a row where it is empty must not be read from the next best one."""
    rows = [{"prompt": "q", "thinking": "t", "content": "4", "answer": "4"}] * 3
    rows += [{"prompt": "q", "thinking": "t", "content": "", "answer": "4"}]
    last = run(rows)[-1]
    assert last.answer == "" and last.gold == "4" and "empty_answer" in last.flags


def test_full_response_wins_over_its_parts():
    row = {"problem": "q", "full_response": "<think>\nhm\n</think>\n\nIt is \\boxed{4}", "reasoning_trace": "hm!",
           "answer_text": "4", "ground_truth": "4", "is_correct": False, "extracted_answer": "3"}
    (t,) = run(row)
    assert (t.thinking, t.answer, t.gold) == ("hm", "It is \\boxed{4}", "4")
    assert t.verdict is False and t.meta["source_correct"] is False


def test_missing_opening_tag_and_a_row_that_lost_both():
    rows = [{"prompt": "q", "response": "hm\n</think>\n\n4"}] * 3 + [{"prompt": "q", "response": "hm and so on"}]
    out = run(rows)
    assert out[0].flags == ("missing_open_think",) and out[0].thinking == "hm"
    assert out[3].flags == ("missing_open_think", "unterminated_think", "empty_answer") and out[3].answer == ""


def test_untagged_rows_among_tagged_ones_are_answers():
    out = run([{"prompt": "q", "response": "<think>hm</think>4"}] * 3 + [{"prompt": "q", "response": "plain"}])
    assert shape(out[3]) == [(QUESTION, "q", 0), (ANSWER, "plain", 0)] and out[3].flags == ()


def test_gsm8k():
    (t,) = run({"question": "Clips?", "answer": "48/2 = <<48/2=24>>24 clips.\n#### 24"})
    assert shape(t) == [(QUESTION, "Clips?", 0), (THINK, "48/2 = <<48/2=24>>24 clips.", 0), (ANSWER, "#### 24", 0)]
    assert t.gold == "24" and t.verdict is None


def test_alpaca_and_its_input():
    a, b = run([{"instruction": "Translate.", "input": "Hallo", "output": "Hello"},
                {"instruction": "Count.", "input": "", "output": "1 2 3"}])
    assert a.question == "Translate.\nHallo" and b.question == "Count." and a.gold is None
    assert a.answer == "Hello"


def test_rationales_that_end_with_the_answer():
    rows = [{"instruction": f"q{i}", "output": f" Add {i}. The answer is {i}"} for i in range(4)]
    rows.append({"instruction": "q", "output": "It went on and on"})
    out = run(rows)
    assert (out[1].thinking, out[1].answer, out[1].gold) == (" Add 1.", "The answer is 1", None)
    assert (out[4].thinking, out[4].answer) == ("", "It went on and on")


def test_a_model_beside_the_reference():
    row = {"problem": "q", "solution": "ref $\\boxed{\\frac{1}{2}}$.", "output": "\\frac{1}",
           "gemini_output": "x. The answer is 1/2"}
    (t,) = run([row])
    assert t.answer == "The answer is 1/2" and t.provenance.teacher == "gemini"
    assert t.gold == "\\frac{1}{2}"  # its source cut the gold at the first brace


def test_several_answers_in_a_list_with_scores():
    row = {"question": "q", "expected_answer": "15", "system_prompt": "Think.", "best_full_model_response": "x",
           "completions": [{"full_model_response": "a <answer>15</answer>", "score": 1.0, "model_answer": "15"},
                           {"full_model_response": "b", "score": 0.25}, {"full_model_response": "", "score": 0.0}]}
    a, b, c = run([row])
    assert [t.role for t in a.segments] == [SYSTEM, QUESTION, ANSWER] and a.answer == "a <answer>15</answer>"
    assert (a.verdict, b.verdict) == (True, False) and b.scores == {"source": 0.25} and a.group == b.group
    assert c.reason == "empty_response"


def test_several_answers_in_parallel_lists():
    row = {"question": "q", "code": ["x", "y"], "score": [True, False], "gt": "4", "pred": ["4", "5"]}
    a, b = run([row])
    assert (a.answer, a.verdict, b.answer, b.verdict, b.gold) == ("x", True, "y", False, "4")


def test_several_answers_in_named_fields():
    row = {"question": "q", "ground_truth": "2/2=1\nA: 3", "6b": {"is_correct": False, "solution": "so\nA: 2"},
           "175b": {"is_correct": True, "solution": "hm\nA: 3"}}
    a, b = run([row])
    assert (a.thinking, a.answer, a.gold, a.verdict, a.provenance.teacher) == ("so", "A: 2", "3", False, "6b")
    assert b.verdict is True and b.provenance.teacher == "175b"


def test_chain_completion_and_gold():
    a, b = run([{"input": "q", "chain": "c", "completion": "25.0", "answer": "32", "initial_correct": False},
                {"input": "q", "chain": "c", "completion": "32", "answer": "32", "initial_correct": True}])
    assert (a.thinking, a.answer, a.gold, a.verdict) == ("c", "25.0", "32", False) and b.verdict is True
    (t,) = run({"input": "q", "chain": "c", "answer": "32", "initial_correct": True})
    assert (t.thinking, t.answer, t.gold) == ("c", "32", "32")


def test_multiple_choice_with_a_rationale():
    (t,) = run({"question": "Which?", "options": ["A)1", "B)2"], "rationale": "because", "correct": "B"})
    assert (t.question, t.thinking, t.answer, t.gold) == ("Which?\nA)1\nB)2", "because", "B", "B")


def test_programs_and_what_they_printed():
    (t,) = run({"question": "q", "generated": ["ans = 1"], "executed": 1.0, "answer": 2.0})
    assert (t.thinking, t.answer, t.gold) == ("ans = 1", "1", "2")


def test_tool_output_inside_an_answer_is_injected():
    text = "```python\nprint(2)\n```\n```output\n2\n```\nIt is \\boxed{2}."
    (t,) = run({"question": "q", "code": [text], "gt": "2"})
    assert [s.role for s in t.segments] == [QUESTION, ANSWER, INJECTED, ANSWER]
    assert "".join(s.text for s in t.segments[1:]) == text and t.segments[2].text == "```output\n2\n```"


def test_json_wrapped_responses():
    rows = [{"question": "q", "output": ['```json\n{"reasoning": "hm", "answer": "4"}\n```'], "answer": "# 4"}] * 2
    rows.append({"question": "q", "output": ["I cannot"], "answer": "# 4"})
    a, _, c = run(rows)
    assert (a.thinking, a.answer, a.gold) == ("hm", "4", "4") and c.reason == "broken_json_response"


def test_body_and_question_and_lines():
    (t,) = run({"Body": "Two and two.", "Question": "Sum?", "Answer": 4.0})
    assert (t.question, t.answer, t.gold) == ("Two and two. Sum?", "4", "4")
    (t,) = run({"text": "Sum?||<<2+2=4>> #### 4"})
    assert (t.question, t.thinking, t.answer, t.gold) == ("Sum?", "<<2+2=4>>", "4", "4")


def test_openai_messages_with_reasoning_and_tools():
    row = {"messages": [
        {"role": "system", "content": "s"}, {"role": "user", "content": "q"},
        {"role": "assistant", "content": None, "reasoning_content": "look it up",
         "tool_calls": [{"id": "1", "function": {"name": "f", "arguments": '{"x": 1.0}'}}]},
        {"role": "tool", "tool_call_id": "1", "content": "42"},
        {"role": "assistant", "content": "<think>\nhm\n</think>\n\nIt is 42."},
        {"role": "user", "content": "thanks"}], "tools": '[{"name": "f"}]', "reward": 1.0}
    (t,) = run(row)
    assert shape(t) == [
        (SYSTEM, "s", 0), (QUESTION, "q", 0), (THINK, "look it up", 0),
        (TOOL_CALL, '{"name": "f", "arguments": {"x": 1.0}}', 0), (TOOL, "42", 1), (THINK, "hm", 1),
        (ANSWER, "It is 42.", 1)]
    assert t.meta["tools"] == [{"name": "f"}] and t.meta["messages_dropped"] == 1 and t.verdict is True
    assert (t.thinking, t.answer, t.flags) == ("hm", "It is 42.", ())


def test_typed_parts():
    row = {"messages": [
        {"role": "user", "content": [{"type": "text", "text": "q"}]},
        {"role": "assistant", "content": [{"type": "reasoning", "value": "hm"},
                                          {"type": "tool_call", "value": '{"name": "f"}'}]},
        {"role": "tool", "content": [{"type": "text", "value": "7"}]},
        {"role": "assistant", "content": [{"type": "thinking", "thinking": "ok"}, {"type": "text", "text": "7"}]}]}
    (t,) = run(row)
    assert [(s.role, s.text) for s in t.segments] == [
        (QUESTION, "q"), (THINK, "hm"), (TOOL_CALL, '{"name": "f"}'), (TOOL, "7"), (THINK, "ok"), (ANSWER, "7")]
    row["messages"][0]["content"].append({"type": "image_url", "image_url": "x"})
    assert run([row])[0].reason == "unsupported_part"


def test_sharegpt():
    row = {"system": "s", "conversations": [
        {"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}, {"from": "human", "value": "c"},
        {"from": "function_call", "value": "{}"}, {"from": "observation", "value": "o"}, {"from": "gpt", "value": "d"}]}
    (t,) = run(row)
    assert shape(t) == [(SYSTEM, "s", 0), (QUESTION, "a", 0), (ANSWER, "b", 0), (QUESTION, "c", 1),
                        (TOOL_CALL, "{}", 1), (TOOL, "o", 2), (ANSWER, "d", 2)]


def test_preference_pairs():
    a, b = run({"conversations": [{"from": "human", "value": "q"}], "chosen": {"from": "gpt", "value": "good"},
                "rejected": {"from": "gpt", "value": "bad"}})
    assert (a.answer, a.verdict, b.answer, b.verdict) == ("good", True, "bad", False) and a.group == b.group
    a, b = run({"prompt": "q", "chosen": "good", "rejected": "bad"})
    assert (a.answer, a.meta["preference"], b.answer) == ("good", "chosen", "bad")


def test_prompt_as_messages_with_a_completion_and_an_api_response():
    (t,) = run({"prompt": [{"role": "user", "content": "q"}], "completion": [{"role": "assistant", "content": "a"}]})
    assert shape(t) == [(QUESTION, "q", 0), (ANSWER, "a", 0)]
    (t,) = run({"prompt": "q", "response": {"choices": [
        {"message": {"role": "assistant", "content": "a", "reasoning_content": "hm"}, "finish_reason": "length"}]}})
    assert (t.thinking, t.answer, t.flags) == ("hm", "a", ("truncated",))


@pytest.mark.parametrize("messages,reason", [
    ([{"role": "user", "content": "q"}], "no_assistant_turn"),
    ([{"role": "assistant", "content": "a"}], "no_question"),
    ([{"role": "user", "content": "q"}, {"role": "assistant", "content": ""}], "empty_response"),
])
def test_conversations_without_a_trace(messages, reason):
    good = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}
    _, r = run([good, {"messages": messages}])
    assert r.reason == reason
    with pytest.raises(Reject):
        detect([good]).traces({"messages": messages}, "f", 0)


def test_map_makes_a_trace_of_unknown_fields():
    row = {"in": {"text": "q"}, "hint": "h", "out": ["a", "b"], "ok": [1, 0], "truth": "a"}
    a, b = run([row], "question=in.text+hint", "response=out", "correct=ok", "gold=truth")
    assert (a.question, a.answer, a.verdict, b.verdict, b.gold) == ("q\nh", "a", True, False, "a")


@pytest.mark.parametrize("row,maps,message", [
    ({"a": "x", "item_id": 3}, (), "found no question .*--join FILE:id=item_id"),
    ({"messages": [{"role": "user", "content": "q"}]}, (), "hold no assistant turn"),
    ({"question": "q", "other": "x"}, (), "nothing anyone answered .*--map response=other"),
    ({"question": "q", "other": "x"}, ("response=nowhere",), "--map response=nowhere leads nowhere"),
])
def test_undetected_rows_say_which_option_helps(row, maps, message):
    with pytest.raises(ValueError, match=message):
        detect([row], parse_map(maps), "f.jsonl")


def test_question_alone_is_no_trace():
    out = detect([{"question": "q", "answer": "4"}])
    with pytest.raises(Reject, match="empty_response"):
        out.traces({"question": "q", "answer": ""}, "f", 0)


def test_real_files(data_dir):
    """(file, options, traces, thinking, gold): what a person counted when looking at them."""
    d = data_dir / "2_traces"
    join = load_join(f"{d}/qwen3_think_on_off/items.json:id=item_id")
    rows = [join.apply(r) for r in read_rows(d / "qwen3_think_on_off/qwen3.5-9b__think-on.jsonl.gz")]
    out = run(rows)
    assert len(out) == 100 and all(t.thinking for t in out)
    cut = [t for t, r in zip(out, rows) if not r["content"]]
    assert len(cut) == 31 and all("unterminated_think" in t.flags for t in cut)
    assert all(r["thinking"] in (t.thinking, t.thinking + "\n") for t, r in zip(out, rows))
    out = run(list(read_rows(d / "r1_math500/pilot_math500_qwen7b.jsonl.gz")))
    assert all(t.flags == ("missing_open_think",) and t.gold and t.thinking for t in out)
    out = run(list(read_rows(d / "llamafactory_demo/reason_tool_use_demo_50.jsonl.gz")))
    assert sum(s.role is TOOL_CALL for t in out for s in t.segments) == 15 + 7 * 2 + 3
