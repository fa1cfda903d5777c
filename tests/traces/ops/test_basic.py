"""keep_correct, dedup, drop_flags, max_length: golden traces in and out."""

import json
from pathlib import Path

import numpy as np
import pytest

from distill_jax.traces.ops.base import Op, run_op
from distill_jax.traces.ops.dedup import Dedup
from distill_jax.traces.ops.drop_flags import DropFlags
from distill_jax.traces.ops.keep_correct import KeepCorrect
from distill_jax.traces.ops.max_length import MaxLength
from distill_jax.traces.trace import Trace

GOLDEN = Path(__file__).parent / "basic.jsonl"
OPS = {
    "keep_correct": KeepCorrect(), "keep_correct(unchecked)": KeepCorrect(unchecked=True), "dedup": Dedup(),
    "drop_flags(unterminated_think,empty_answer,truncated)": DropFlags(),
    "drop_flags(missing_open_think)": DropFlags(flags=("missing_open_think",)),
    "max_length(chars=20,written=12)": MaxLength(chars=20, written=12),
}


def traces() -> list[Trace]:
    return [Trace.from_json(json.loads(line)["trace"]) for line in GOLDEN.read_text().splitlines()]


@pytest.mark.parametrize("name", OPS)
def test_golden(name):
    """`kept_by` of a line names the ops that keep it."""
    op = OPS[name]
    assert isinstance(op, Op) and op.name == name and op.keeps_context
    before = traces()
    lines = [json.loads(line) for line in GOLDEN.read_text().splitlines()]
    out = run_op(op, before, np.random.default_rng(0))
    kept = [x["trace"]["segments"][-1]["text"] for x in lines if name in x["kept_by"]]
    assert [t.segments[-1].text for t in out] == kept
    assert out and all(t.provenance.ops == (name,) for t in out) and before == traces()
    assert out == run_op(op, before, np.random.default_rng(1))


def test_settings():
    with pytest.raises(ValueError, match="known flags"):
        DropFlags(flags=("cut",))
    with pytest.raises(ValueError, match="needs a bound"):
        MaxLength()
