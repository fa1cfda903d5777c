"""Batches: fields, packing, signals that follow their token, splits, mixtures, resumption."""

import dataclasses

import numpy as np
import pytest

from distill_jax.core.roles import ANSWER, QUESTION, SUPERVISED, THINK
from distill_jax.data.choosing import held_out
from distill_jax.data.render import Style, render
from distill_jax.data.rowset import FlatRows
from distill_jax.data.source_specs import Mix, Phases, Store, stores
from distill_jax.data.sources import open_source, serve
from distill_jax.data.tokenizer import load_tokenizer
from distill_jax.traces.ops.strip_thinking import StripThinking
from distill_jax.traces.trace import FLAG_TRUNCATED, Segment, Trace, simple_trace
from tests.data.storing import make_store, some_traces, topk_of

SEQ = 96


@pytest.fixture
def path(tmp_path, tiny):
    make_store(tmp_path / "s", some_traces(60), tiny, signal="topk")
    return str(tmp_path / "s")


def spec(path, **kwargs):
    return Store(path=path, **({"rows": 4, "seq_len": SEQ} | kwargs))


def segments(batch):
    """Every packed row of a batch: (b, slice, row id)."""
    m = batch.main
    for b in range(m.tokens.shape[0]):
        for s in range(1, m.segment_ids[b].max() + 1):
            where = np.flatnonzero(m.segment_ids[b] == s)
            yield b, slice(where[0], where[-1] + 1), int(m.row_ids[b, where[0]])


def check_batch(batch, store, tok):
    m = batch.main
    for b, where, row_id in segments(batch):
        row = store.row(row_id)
        assert np.array_equal(m.tokens[b, where], row.tokens) and np.array_equal(m.roles[b, where], row.roles)
        assert np.array_equal(m.positions[b, where], np.arange(len(row.tokens)))
        assert m.weights[b, where].tolist() == [0.0] + [1.0] * (len(row.tokens) - 1)
        assert (m.row_ids[b, where] == row_id).all()
    pad = m.segment_ids == 0
    assert (m.roles[pad] == 0).all() and (m.tokens[pad] == 0).all() and (m.weights[pad] == 0).all()
    assert (m.row_ids[pad] == -1).all() and (m.positions[pad] == 0).all()
    assert {a.dtype.name for a in (m.tokens, m.positions, m.segment_ids, m.roles, m.step_ids, m.row_ids)} == {"int32"}
    assert m.weights.dtype == np.float32


@pytest.mark.parametrize("pack", [True, False])
def test_fields_and_signals(path, tiny, pack):
    source = open_source(spec(path, pack=pack, signals=("topk",)), tiny, seed=3)
    store = source.parts[0].rowset.store
    seen = set()
    for step in range(3):
        batch = source.batch(step)
        assert batch.main.tokens.shape == (4, SEQ)
        check_batch(batch, store, tiny)
        topk = batch.signals["topk"]
        for b, where, row_id in segments(batch):
            want = topk_of(store.row(row_id), 4, tiny.real)
            assert np.array_equal(topk.mask[b, where], want.mask)
            first = topk.ids[b, where][want.mask][:, 0]
            assert np.array_equal(first, batch.main.tokens[b, where][want.mask])
            assert np.allclose(topk.logprobs[b, where][want.mask], want.logprobs[want.mask], atol=1e-6)
            seen.add(row_id)
        pad = batch.main.segment_ids == 0
        assert not topk.mask[pad].any() and (topk.ids[pad] == -1).all() and np.isneginf(topk.logprobs[pad]).all()
    most = max(int(batch.main.segment_ids.max()) for batch in [source.batch(0)])
    assert most > 1 if pack else most == 1
    assert len(seen) >= 12


def test_batches_are_a_function_of_seed_and_step(path, tiny):
    a, b, c = (open_source(spec(path), tiny, seed=s) for s in (1, 1, 2))
    for step in (5, 0, 40):
        assert np.array_equal(a.batch(step).main.tokens, b.batch(step).main.tokens)
    assert not np.array_equal(a.batch(0).main.tokens, c.batch(0).main.tokens)


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_serving_slices_the_global_batch_and_resumes(path, tiny, processes):
    source = open_source(spec(path, signals=("topk",)), tiny, seed=0)
    served = [serve(source, 2, i, processes) for i in range(processes)]
    for step in (2, 3, 4):
        parts = [next(s) for s in served]
        whole = source.batch(step)
        assert np.array_equal(np.concatenate([p.main.tokens for p in parts]), whole.main.tokens)
        assert np.array_equal(np.concatenate([p.signals["topk"].ids for p in parts]), whole.signals["topk"].ids)
    state = served[0].state()
    assert state == {"step": 5}
    again = serve(source, 0)
    again.restore(state)
    assert np.array_equal(next(again).main.tokens, source.batch(5).main.tokens)
    assert len(list(serve(source, 3, stop_step=6))) == 3
    with pytest.raises(ValueError, match="do not divide over 3 processes"):
        serve(source, 0, 0, 3)


def test_filters(path, tiny):
    def rows(**kwargs):
        source = open_source(spec(path, pack=False, **kwargs), tiny, seed=0)
        return set(source.parts[0].plan.rows.tolist()), source.describe()[0]["left_out"]

    everything, out = rows()
    assert len(everything) == 60 and out == {}
    correct, out = rows(verdict="correct")
    assert len(correct) == 20 and out == {"verdict": 40}
    assert len(rows(verdict="not_wrong")[0]) == 40
    train, held = (open_source(spec(path, holdout=0.3, split=s), tiny, seed=9).parts[0].rowset.origin.tolist()
                   for s in ("train", "heldout"))
    assert sorted(train + held) == list(range(60)) and 8 < len(held) < 30
    few = [open_source(spec(path, max_rows=10), tiny, seed=s).parts[0].rowset.origin.tolist() for s in (0, 1)]
    assert few[0] == few[1] and len(few[0]) == 10 and few[0] != list(range(10))


def test_held_out_questions_stay_together():
    groups = [f"q{i % 500}" for i in range(2000)]
    held = held_out(groups, 0.25)
    assert len({(g, h) for g, h in zip(groups, held)}) == 500
    assert 0.2 < held.mean() < 0.3
    more = held_out(groups, 0.5)
    assert (more >= held).all()  # a larger share keeps what was held out before


def test_over_long_rows_and_cut_answers(tmp_path, tiny):
    long = simple_trace("long?", "apples " * 100, "The answer is 1.")
    stopped = simple_trace("stopped?", "think", "The ans", flags=(FLAG_TRUNCATED,))
    make_store(tmp_path / "s", [*some_traces(5), long, stopped], tiny)
    path = str(tmp_path / "s")
    info = open_source(spec(path), tiny, seed=0).describe()[0]
    assert (info["dropped_over_long"], info["left_out"], info["cut_over_long"]) == (1, {"answer cut": 1}, 0)
    source = open_source(spec(path, over_long="cut", pack=False, rows=7), tiny, seed=0)
    batch = source.batch(0)
    assert source.describe()[0]["cut_over_long"] == 1 and set(batch.main.row_ids[:, 0].tolist()) == set(range(7))
    b = batch.main.row_ids[:, 0].tolist().index(5)
    assert batch.main.segment_ids[b].all() and ANSWER not in batch.main.roles[b]
    with pytest.raises(ValueError, match="no row to train on"):
        open_source(spec(path, seq_len=8), tiny, seed=0)
    with pytest.raises(ValueError, match=r"none of 7 rows is left.*verdict"):
        open_source(spec(path, holdout=1e-9, split="heldout"), tiny, seed=0)


def test_empty_supervised_mask_stops_and_shows_the_row(tmp_path, tiny):
    store_path = tmp_path / "s"
    from distill_jax.data.render import template_id
    from distill_jax.traces.store import StoreHeader, TraceStore
    store = TraceStore.create(str(store_path), StoreHeader(tokenizer=tiny.info(), template=template_id(tiny)))
    with store.writer() as out:
        for t in some_traces(8):
            row = render(t, tiny)
            out.append(dataclasses.replace(row, roles=np.where(np.isin(row.roles, (4, 5)), 1, row.roles)
                                           .astype(np.uint8)))
    source = open_source(spec(str(store_path)), tiny, seed=0)
    with pytest.raises(ValueError, match=r"nothing to train on(.|\n)*QUESTION +'What is"):
        source.batch(0)


def test_another_template_is_rendered_again_once(path, tiny, tmp_path):
    """Same ids, other template: traces are rendered again, the signal follows its tokens, the result is cached."""
    style = Style(think_tags=False)
    source = open_source(spec(path, signals=("topk",), style=style), tiny, seed=0)
    info = source.describe()[0]
    assert info["rendered"] == "again" and info["signal_coverage"] > 0.9
    batch, store = source.batch(0), source.parts[0].rowset.store
    for b, where, row_id in segments(batch):
        want = render(store.row(row_id).trace, tiny, style=style)
        assert np.array_equal(batch.main.tokens[b, where], want.tokens)
    topk, m = batch.signals["topk"], batch.main
    assert np.array_equal(topk.ids[..., 0][topk.mask], m.tokens[topk.mask])  # the planted teacher ranks it first
    prob = 0.5 + m.tokens / (2.0 * tiny.real)
    assert np.allclose(np.exp(topk.logprobs[..., 0][topk.mask]), prob[topk.mask], atol=1e-5)
    content = np.isin(m.roles, (THINK, ANSWER)) & (m.weights > 0)
    assert topk.mask[content].mean() > 0.9
    cached = list((tmp_path / "cache" / "rendered").iterdir())
    assert len(cached) == 1
    again = open_source(spec(path, signals=("topk",), style=style), tiny, seed=0)
    assert np.array_equal(again.batch(0).main.tokens, m.tokens)
    assert isinstance(again.parts[0].rowset.flat, FlatRows)


def test_teacher_tokenizer_with_other_added_tokens(tmp_path, tiny, tiny_teacher):
    traces = [simple_trace(t.question, t.thinking + " numbers" * 20, t.answer) for t in some_traces(20)]
    make_store(tmp_path / "s", traces, tiny_teacher, signal="topk")
    source = open_source(spec(str(tmp_path / "s"), signals=("topk",), rows=8, seq_len=128), tiny, seed=0)
    batch = source.batch(0)
    topk, m = batch.signals["topk"], batch.main
    assert (topk.ids < tiny.real).all() and source.describe()[0]["signal_coverage"] > 0.9
    assert np.array_equal(topk.ids[..., 0][topk.mask], m.tokens[topk.mask])
    ends = m.tokens == tiny.eos_ids[0]
    assert topk.mask[ends & (m.roles == ANSWER)].all()  # <|stop|> of the teacher became <|im_end|>


def test_unfit_tokenizer_names_the_difference(path, tmp_path):
    from tests.data.conftest import tiny_folder
    stranger = load_tokenizer(tiny_folder(tmp_path / "x", vocabulary=350))
    with pytest.raises(ValueError, match=r"cannot be attached.*number of real ids"):
        open_source(spec(path, signals=("topk",)), stranger, seed=0)
    assert open_source(spec(path), stranger, seed=0).describe()[0]["rendered"] == "again"


def test_unfinished_signal_and_missing_store(tmp_path, tiny):
    store = make_store(tmp_path / "s", some_traces(40), tiny)
    from distill_jax.traces.store import SignalHeader
    with pytest.raises(RuntimeError), store.signal_writer("half", SignalHeader(kind="topk", k=4)) as out:
        for i in range(20):
            out.append(topk_of(store.row(i), 4, tiny.real))
        raise RuntimeError
    with pytest.raises(ValueError, match=r"signal 'half' has 16 of 40 rows"):
        open_source(spec(str(tmp_path / "s"), signals=("half",)), tiny, seed=0)
    with pytest.raises(ValueError, match="no signal 'topk'"):
        open_source(spec(str(tmp_path / "s"), signals=("topk",)), tiny, seed=0)
    with pytest.raises(ValueError, match="no such folder"):
        open_source(spec(str(tmp_path / "nothing")), tiny, seed=0)


@dataclasses.dataclass(frozen=True)
class Shout:
    """Edits every third trace."""

    scope = "trace"
    keeps_context = False
    name = "shout"

    def __call__(self, traces, rng):
        out = []
        for t in traces:
            if int(t.gold) % 3 == 0:
                t = t.replace(segments=tuple(Segment(role=s.role, text=s.text.upper() if s.role == THINK else s.text)
                                             for s in t.segments))
            out.append(t)
        return out if int(traces[0].gold) % 5 else []


def test_ops_edit_filter_and_drop_signals(path, tiny):
    source = open_source(spec(path, signals=("topk",), ops=(Shout(),), pack=False, rows=48), tiny, seed=0)
    info = source.describe()[0]
    assert info["rows"] == 48 and info["rows_without_signal"] == 16
    batch = source.batch(0)
    for b, _, row_id in segments(batch):
        edited = row_id % 3 == 0
        thinking = tiny.decode(batch.main.tokens[b][batch.main.roles[b] == THINK])
        assert thinking.split("\n")[1].isupper() == edited and row_id % 5
        assert batch.signals["topk"].mask[b].any() != edited


def test_ops_that_leave_no_signal_are_refused(path, tiny):
    with pytest.raises(ValueError, match=r"changed the text of all 60 rows.*signals=\(\)"):
        open_source(spec(path, signals=("topk",), ops=(StripThinking(),)), tiny, seed=0)
    assert open_source(spec(path, ops=(StripThinking(),)), tiny, seed=0).describe()[0]["rows"] == 60


def test_mix_keeps_its_shares(tmp_path, path, tiny):
    make_store(tmp_path / "b", some_traces(40, seed=7), tiny, signal="token")
    other = spec(str(tmp_path / "b"), signals=("token",))
    mix = Mix(sources=(spec(path, signals=("topk",)), other), weights=(3.0, 1.0), rows=6)
    source = open_source(mix, tiny, seed=0)
    taken = [source.assigned(s) for s in range(100)]
    flat = [x for step in taken for x in step]
    assert sum(p == 0 for p, _ in flat) == 450 and all(3 <= sum(p == 0 for p, _ in s) <= 6 for s in taken)
    for part in (0, 1):  # each source is read in its own order, without a gap
        assert [at for p, at in flat if p == part] == list(range(sum(p == part for p, _ in flat)))
    assert source.assigned(700) == open_source(mix, tiny, seed=0).assigned(700)
    batch = source.batch(1)
    for b, (part, _) in enumerate(source.assigned(1)):
        assert batch.signals["topk"].mask[b].any() == (part == 0)
        assert batch.signals["token"].mask[b].any() == (part == 1)
    with pytest.raises(ValueError, match="one weight for each"):
        Mix(sources=(other,), weights=(1.0, 2.0))


def test_phases_follow_each_other_and_have_one_shape(tmp_path, path, tiny):
    make_store(tmp_path / "b", some_traces(40, seed=7), tiny, signal="token")
    first, second = spec(path, signals=("topk",)), spec(str(tmp_path / "b"), signals=("token",))
    phases = Phases(sources=(first, second, first), steps=(3, 2))
    source = open_source(phases, tiny, seed=0)
    alone = {s: open_source(s, tiny, seed=0) for s in (first, second)}
    for step, (part, at) in enumerate([(first, 0), (first, 1), (first, 2), (second, 0), (second, 1), (first, 0)]):
        batch, expected = source.batch(step), alone[part].batch(at)
        np.testing.assert_array_equal(batch.main.tokens, expected.main.tokens)
        assert set(batch.signals) == {"topk", "token"}
        for name, signal in expected.signals.items():
            np.testing.assert_array_equal(batch.signals[name].mask, signal.mask)
    served = serve(source, start_step=2, process_index=1, process_count=2)
    for step in (2, 3):
        half = source.rows // 2
        np.testing.assert_array_equal(next(served).main.tokens, source.batch(step).main.tokens[half:])
    assert [d["from_step"] for d in source.describe()] == [0, 3, 5]
    assert list(stores(phases)) == [first, second, first]
    assert phases.signals == ("topk", "token") and source.steps_per_epoch > 5


@pytest.mark.parametrize("changes, match", [
    ({"steps": (3,)}, "every source but the last"), ({"steps": (3, 0)}, "at least one update"),
    ({"sources": (Store(path="a"), Store(path="b", rows=3), Store(path="c"))}, "agree in")])
def test_phases_that_make_no_sense(changes, match):
    good = {"sources": (Store(path="a"), Store(path="b"), Store(path="c")), "steps": (1, 1)}
    with pytest.raises(ValueError, match=match):
        Phases(**(good | changes))


def test_multi_turn_context_is_not_supervised(tmp_path, tiny):
    tr = Trace(segments=(Segment(role=QUESTION, text="one?"), Segment(role=ANSWER, text="first"),
                         Segment(role=QUESTION, text="two?", turn=1), Segment(role=ANSWER, text="second", turn=1)))
    make_store(tmp_path / "s", [tr], tiny)
    batch = open_source(spec(str(tmp_path / "s"), rows=1), tiny, seed=0).batch(0)
    said = tiny.decode(batch.main.tokens[0][np.isin(batch.main.roles[0], [int(r) for r in SUPERVISED])])
    assert said.endswith("second<|im_end|>") and "first" not in said


def test_spec_errors():
    with pytest.raises(ValueError, match="holdout > 0"):
        Store(path="x", split="heldout")
    with pytest.raises(ValueError, match="share of the questions"):
        Store(path="x", holdout=1.5)
