"""Traces as JSON, written by `distill-jax world` and by every other command that writes traces."""

from dataclasses import replace

import pytest

from distill_jax.traces.formats import Reject, detect, parse_map
from distill_jax.traces.trace import Provenance, simple_trace
from distill_jax.traces.world.generate import WorldSpec, traces


def test_traces_come_back_as_they_were():
    made = list(traces(WorldSpec(kind="lookup", k=3), 5))
    rows = [t.to_json() for t in made]
    fmt = detect(rows)
    got = [t for i, row in enumerate(rows) for t in fmt.traces(row, "file", i)]
    named = [t if t.provenance.source else t.replace(provenance=replace(t.provenance, source="file", row=i))
             for i, t in enumerate(made)]
    assert got == named
    bare = simple_trace("q", "hm", "4").to_json()
    assert fmt.traces(bare, "file", 3)[0].provenance == Provenance(source="file", row=3)


def test_odd_rows_are_rejected():
    fmt = detect([simple_trace("q", "hm", "4").to_json()])
    row = {"segments": [{"role": "question", "text": "q"}]}
    for bad, reason in ((row, "no_response"), ({"segments": [{"role": "nobody", "text": "x"}]}, "not_a_trace"),
                        ({"question": "q"}, "not_a_trace")):
        with pytest.raises(Reject) as e:
            fmt.records(bad, "file", 0)
        assert e.value.reason == reason


def test_a_map_says_otherwise():
    row = simple_trace("q", "", "4").to_json() | {"q": "what", "response": "4"}
    assert detect([row], parse_map(["question=q"])).name != "traces of distill_jax"
