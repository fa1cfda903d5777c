import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from distill_jax.core.roles import ANSWER, QUESTION, THINK
from distill_jax.traces.ops.base import Pipeline, run_op
from distill_jax.traces.trace import Encoded, Segment, Trace, simple_trace


@given(q=st.text(min_size=1), t=st.text(), a=st.text())
def test_json_round_trip(q, t, a):
    tr = simple_trace(q, t, a, gold="4", meta={"k": 3}, scores={"x": 0.5})
    back = Trace.from_json(json.loads(json.dumps(tr.to_json())))
    assert back == tr and back.id == tr.id and (back.question, back.thinking, back.answer) == (q, t, a)


def test_edit_drops_encoding():
    e = Encoded(tokenizer="h", ids=np.arange(3), prompt_length=1, logprobs=np.zeros(3, np.float32))
    tr = simple_trace("q", "t", "a", encoded=e)
    back = Trace.from_json(tr.to_json())
    assert back.encoded is not None and back.encoded.ids.tolist() == [0, 1, 2]
    assert tr.replace(gold="x").encoded is e
    assert tr.replace(segments=(*tr.segments, Segment(role=ANSWER, text="!"))).encoded is None


def test_bad_json_names_the_problem():
    with pytest.raises(ValueError, match="THOUGHT"):
        Trace.from_json({"segments": [{"role": "thought", "text": ""}]})


class DropShort:
    scope, keeps_context, name = "group", True, "drop_short"

    def __call__(self, traces, rng):
        return [max(traces, key=lambda t: len(t.answer))]


def test_run_op_by_group_logs_provenance():
    ts = [simple_trace("q", "", a) for a in ("1", "12")] + [simple_trace("p", "", "3")]
    out = run_op(Pipeline(ops=(DropShort(),)), ts, np.random.default_rng(0))
    assert [t.answer for t in out] == ["12", "3"] and out[0].provenance.ops == ("drop_short",)


def test_segments_by_turn():
    tr = Trace(segments=(Segment(role=QUESTION, text="a"), Segment(role=ANSWER, text="b"),
                         Segment(role=QUESTION, text="c", turn=1), Segment(role=THINK, text="d", turn=1),
                         Segment(role=ANSWER, text="e", turn=1)))
    assert (tr.question, tr.thinking, tr.answer, tr.prompt_text) == ("c", "d", "e", "a")
