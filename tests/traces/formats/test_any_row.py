"""Rows of the right names and the wrong kinds: every row becomes traces or a reason, nothing else."""

from hypothesis import given, settings
from hypothesis import strategies as st

from distill_jax.traces.formats import Reject, detect
from distill_jax.traces.formats.fields import NAMES
from distill_jax.traces.trace import Trace

KEYS = sorted({n for names in NAMES.values() for n in names} | {
    "chosen", "rejected", "options", "Body", "passage", "executed", "text", "gemini_output", "metadata", "role", "from",
    "value", "content", "tool_calls", "function_call", "message", "type", "function", "arguments", "name", "6b"})
TEXT = st.one_of(st.sampled_from(["", "q", "<think>\nhm\n</think>\n\n4", "<think>", "#### 4", "The answer is 4", "user",
                                  "assistant", "tool", "a||b #### 3", '{"reasoning": "x", "answer": 1}', "gpt",
                                  "human"]),
                 st.text(max_size=5))
VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), TEXT),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.sampled_from(KEYS), inner, max_size=4)),
    max_leaves=8)
MESSAGE = st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant", "tool", "system", "owl"])},
                                optional={"content": VALUES, "tool_calls": VALUES, "reasoning_content": VALUES})
ROWS = st.lists(st.one_of(
    st.dictionaries(st.sampled_from(KEYS), VALUES, max_size=6),
    st.fixed_dictionaries({"question": TEXT}, optional={k: VALUES for k in KEYS if k != "question"}),
    st.fixed_dictionaries({"messages": st.lists(MESSAGE, max_size=4)}, optional={"reward": VALUES, "tools": VALUES}),
), min_size=1, max_size=4)


@settings(max_examples=300, deadline=None)
@given(ROWS)
def test_traces_or_reasons(rows):
    try:
        fmt = detect(rows)
    except ValueError:
        return
    for i, row in enumerate(rows):
        try:
            out = fmt.records(row, "f", i)
        except Reject:
            continue
        assert all(isinstance(t, Trace | Reject) for t in out)
        for t in out:
            if isinstance(t, Trace):
                assert Trace.from_json(t.to_json()).segments == t.segments
                assert any(s.text.strip() for s in t.segments)
