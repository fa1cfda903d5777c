"""FIRST's stage: the signal it writes is the changed teacher, and training can read it."""

from pathlib import Path

import numpy as np
import pytest

from distill_jax.data.source_specs import Store
from distill_jax.data.sources import open_source
from distill_jax.data.tokenizer import load_tokenizer
from distill_jax.eval.calibration import temper
from distill_jax.jobs.context import RunContext, Stopwatch
from distill_jax.jobs.recalibrate import recalibrate
from distill_jax.recipe import Call, Recipe
from distill_jax.traces.store import TraceStore
from distill_jax.traces.world.generate import WorldSpec, traces
from distill_jax.traces.world.tokenizer import build_tokenizer
from tests.data.storing import make_store


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    folder = tmp_path_factory.mktemp("first")
    tok = load_tokenizer(build_tokenizer(folder / "tok", "compact"))
    made = make_store(folder / "s", list(traces(WorldSpec(k=2), 80)), tok, signal="topk", k=6)
    return made.url, tok


def context(folder: Path) -> RunContext:
    recipe = Recipe(name="r", runs=str(folder), stages=(Call(name="a", fn=recalibrate),))
    return RunContext(recipe=recipe, folder=folder, watch=Stopwatch(folder / "t.json"), say=lambda line: None)


def test_signal_is_the_tempered_teacher(store, tmp_path):
    """The made-up teacher is right on every token at probability 0.5 to 1: too modest, so T < 1 is chosen."""
    url, tok = store
    out = recalibrate(context(tmp_path), store=url, signal="topk", name="first3", k=3, holdout=0.3)
    assert out["value"] < 1.0 and out["errors"][f"{out['value']:g}"] == min(out["errors"].values()) < out["errors"]["1"]
    made = TraceStore.open(url)
    before, after = made.signal("topk").read([0, 41]), made.signal("first3").read([0, 41])
    assert made.signal("first3").header.params["value"] == out["value"]
    for b, a in zip(before, after, strict=True):
        np.testing.assert_array_equal(a.ids[a.mask], b.ids[b.mask][:, :3])
        np.testing.assert_allclose(a.logprobs[a.mask], temper(b.logprobs[b.mask][:, :3], out["value"]), atol=2e-3)
        np.testing.assert_array_equal(a.mask, b.mask)
        np.testing.assert_allclose(np.exp(a.logprobs[a.mask]).sum(-1), 1, atol=1e-3)
    batch = open_source(Store(path=url, signals=("first3",), rows=4, seq_len=64), tok, seed=0).batch(0)
    assert batch.signals["first3"].ids.shape[-1] == 3 and batch.signals["first3"].mask.any()
    again = recalibrate(context(tmp_path), store=url, signal="topk", name="first3", k=3, holdout=0.3)
    assert again == out, "a signal that is there is kept"


def test_what_cannot_be_calibrated_is_named(store, tmp_path):
    with pytest.raises(ValueError, match="at least k=9 outcomes; 'topk' is topk with k=6"):
        recalibrate(context(tmp_path), store=store[0], signal="topk", name="x", k=9)
    with pytest.raises(ValueError, match="no held-out token"):
        recalibrate(context(tmp_path), store=store[0], signal="topk", name="x", holdout=0.0)
