"""Pairs as a source: both sides whole in one sequence, fields, prefixes, mismatched answers, splits, resumption."""

import io

import numpy as np
import pytest
from rich.console import Console

from distill_jax.core.roles import SUPERVISED
from distill_jax.data.pack import plan
from distill_jax.data.pairs import first_apart
from distill_jax.data.render import Style
from distill_jax.data.source_specs import Mix, Pairs, Phases, Prefix, Retokenised, Store, stores
from distill_jax.data.sources import Reading, open_source, serve
from distill_jax.jobs.show_batch import show_batch
from distill_jax.traces.ops.strip_thinking import StripThinking
from distill_jax.traces.pairing import BestWorst, RightWrong, Shortest, Singles
from distill_jax.traces.store import RowArrays
from distill_jax.traces.trace import FLAG_TRUNCATED
from tests.data.storing import judged_answers, make_store, some_traces, topk_of

QUESTIONS, SEQ = 12, 256


@pytest.fixture
def path(tmp_path, tiny):
    make_store(tmp_path / "s", judged_answers(some_traces(QUESTIONS)), tiny, signal="token")
    return str(tmp_path / "s")


def spec(path, **kwargs):
    return Pairs(path=path, **({"rows": 4, "seq_len": SEQ, "build": RightWrong(limit=None)} | kwargs))


def segments(batch):
    """(b, indices, row id, {field: its one value there, or all where they differ}) of every segment."""
    m = batch.main
    for b in range(m.tokens.shape[0]):
        for s in range(1, m.segment_ids[b].max() + 1):
            at = np.flatnonzero(m.segment_ids[b] == s)
            said = {n: f[b, at] for n, f in m.fields.items()}
            yield b, at, int(m.row_ids[b, at[0]]), {
                n: v[0] if (v == v[0]).all() and n != "apart" else v for n, v in said.items()}


def epoch(source):
    """The segments of the steps of an epoch (and the sequences that fill its last batch up)."""
    return [(step, *s) for step in range(int(np.ceil(source.steps_per_epoch))) for s in segments(source.batch(step))]


def test_both_sides_are_whole_and_in_one_sequence(path, tiny):
    source = open_source(spec(path), tiny, seed=3)
    store = source.parts[0].rowset.store
    index, pairs = store.index(), {}
    for step, b, at, row_id, said in epoch(source):
        row, m = store.row(row_id), source.batch(step).main
        assert np.array_equal(m.tokens[b, at], row.tokens) and np.array_equal(m.positions[b, at], np.arange(len(at)))
        assert m.weights[b, at[0]] == 0 and (m.weights[b, at[1:]] == 1).all()
        assert said["chosen"] == 1 - said["rejected"] == index.verdicts[row_id] and said["pair_ids"] >= 1
        pairs.setdefault((step, b, int(said["pair_ids"])), []).append(row_id)
    for (_, b, number), (chosen, rejected) in pairs.items():
        assert index.groups[chosen] == index.groups[rejected]
        assert (index.verdicts[chosen], index.verdicts[rejected]) == (1, 0)
        assert number == 1 or (_, b, number - 1) in pairs, "pairs of a sequence are numbered from 1"
    assert {tuple(p) for p in pairs.values()} == {
        (4 * q + a, 4 * q + b) for q in range(QUESTIONS) for a in (0, 1) for b in (2, 3)}, "the product, each once"
    about = source.describe()[0]
    assert about["pairs"] == 4 * QUESTIONS and about["questions"] == QUESTIONS and about["questions_without"] == 0
    assert max(k[2] for k in pairs) > 1 and max(
        said["pair_ids"] for *_, said in segments(open_source(spec(path, pack=False), tiny, seed=3).batch(0))) == 1
    pad = source.batch(0).main.segment_ids == 0
    assert all((f[pad] == 0).all() for f in source.batch(0).main.fields.values())


def test_apart_is_0_on_the_common_beginning(path, tiny):
    """Answer 2 has the thinking of answer 0: they part behind it. Nothing of the prompt is apart."""
    source = open_source(spec(path), tiny, seed=0)
    store = source.parts[0].rowset.store
    sides = {}
    for step, b, _, row_id, said in epoch(source):
        sides.setdefault((step, b, int(said["pair_ids"])), []).append((row_id, said["apart"].astype(int)))
    for (row, apart), (other, others) in sides.values():
        a, b = store.row(row), store.row(other)
        begin = int(np.flatnonzero(np.isin(a.roles, SUPERVISED))[0])
        k = begin
        while a.tokens[k] == b.tokens[k]:
            k += 1
        assert apart.tolist() == [0] * k + [1] * (len(a) - k) and others.tolist() == [0] * k + [1] * (len(b) - k)
        if (row % 4, other % 4) == (0, 2):
            assert k - begin > len(tiny.encode(a.trace.thinking)[0])


def test_a_side_that_is_the_others_beginning_keeps_a_token():
    row = lambda *ids: RowArrays(tokens=np.array(ids, np.int32), roles=np.array([3] + [5] * (len(ids) - 1), np.uint8),
                                 steps=np.zeros(len(ids), np.int32), parts=np.zeros(len(ids), np.int16),
                                 spans=np.zeros((len(ids), 2), np.int32))
    short, long, unlike = row(9, 1, 2), row(9, 1, 2, 3), row(9, 4)
    assert (first_apart(short, long), first_apart(long, short)) == (2, 2)
    assert first_apart(short, unlike) == first_apart(short, None) == 1


def test_signals_follow_their_tokens(path, tiny):
    batch = open_source(spec(path, signals=("token",)), tiny, seed=1).batch(0)
    store = open_source(spec(path), tiny, seed=1).parts[0].rowset.store
    signal = batch.signals["token"]
    for b, at, row_id, _ in segments(batch):
        want = topk_of(store.row(row_id), 4, tiny.real)
        assert np.array_equal(signal.mask[b, at], want.mask)
        np.testing.assert_allclose(signal.logprobs[b, at], np.where(want.mask, want.logprobs[:, 0], signal.logprobs[
            b, at]), rtol=1e-6)


def test_over_long_pairs_are_left_out_whole(path, tiny):
    lengths = open_source(spec(path), tiny, seed=0).parts[0].rowset.lengths.reshape(-1, 2).sum(axis=1)
    limit = int(np.median(lengths))
    source = open_source(spec(path, seq_len=limit), tiny, seed=0)
    about = source.describe()[0]
    assert about["dropped_over_long"] == (lengths > limit).sum() > 0
    sides = {}
    for step, b, at, _, said in epoch(source):
        sides[step, b, int(said["pair_ids"])] = sides.get((step, b, int(said["pair_ids"])), 0) + len(at)
    assert max(sides.values()) <= limit and set(sides.values()) <= set(lengths[lengths <= limit].tolist())


def test_cut_answers_take_part_when_asked(tmp_path, tiny):
    traces = [t.replace(flags=(FLAG_TRUNCATED,)) if t.verdict is False else t for t in judged_answers(some_traces(4))]
    make_store(tmp_path / "s", traces, tiny)
    with pytest.raises(ValueError, match=r"RightWrong finds nothing to compare: 8 answers \(8 right, 0 wrong"):
        open_source(spec(str(tmp_path / "s")), tiny, seed=0)
    assert open_source(spec(str(tmp_path / "s"), over_long="cut"), tiny, seed=0).describe()[0]["pairs"] == 16


def test_scores_lengths_and_limits(path, tiny):
    rows = lambda **kwargs: open_source(spec(path, **kwargs), tiny, seed=0).parts[0].rowset.origin.reshape(-1, 2) % 4
    assert (rows(build=BestWorst(score="reward")) == [0, 3]).all()
    shortest = open_source(spec(path, build=Shortest()), tiny, seed=0).parts[0].rowset
    assert (shortest.origin[::2] % 4 == 0).all(), "thought once is shorter"
    some = open_source(spec(path, max_rows=5), tiny, seed=0).describe()[0]
    assert some["rows"] == 10
    with pytest.raises(ValueError, match=r"no trace has the score 'grade' that BestWorst reads; .*\['reward'\]"):
        rows(build=BestWorst(score="grade"))


def test_held_out_questions(path, tiny):
    groups = {}
    for split in ("train", "heldout"):
        rowset = open_source(spec(path, holdout=0.4, split=split), tiny, seed=0).parts[0].rowset
        groups[split] = {rowset.store.index().groups[i] for i in rowset.origin}
    assert groups["train"] and groups["heldout"] and not groups["train"] & groups["heldout"]
    assert len(groups["train"] | groups["heldout"]) == QUESTIONS


def test_rendered_again_and_ops(tmp_path, path, tiny):
    """Other think tags: rows are rendered again. Without their thinking, answers 0 and 1 are the same row."""
    batch = open_source(spec(path, style=Style(think_tags=False)), tiny, seed=0).batch(0)
    assert {float(said["chosen"]) for *_, said in segments(batch)} == {0.0, 1.0}
    source = open_source(spec(path, ops=(StripThinking(),), build=RightWrong(limit=None)), tiny, seed=0)
    assert source.describe()[0]["pairs"] == 4 * QUESTIONS
    with pytest.raises(ValueError, match="Shortest finds nothing to compare"):
        open_source(spec(path, ops=(StripThinking(),), build=Shortest(against="right")), tiny, seed=0)


@pytest.mark.parametrize("processes", [1, 2])
def test_served_by_rows_and_resumed(path, tiny, processes):
    source = open_source(spec(path, signals=("token",)), tiny, seed=0)
    far = int(3 * source.steps_per_epoch)  # several epochs on
    served = [serve(source, far, i, processes) for i in range(processes)]
    for step in (far, far + 1):
        parts = [next(s) for s in served]
        whole = source.batch(step).main
        for name in ("tokens", "segment_ids"):
            assert np.array_equal(np.concatenate([getattr(p.main, name) for p in parts]), getattr(whole, name))
        for name, field in whole.fields.items():
            assert np.array_equal(np.concatenate([p.main.fields[name] for p in parts]), field)


def test_in_mixtures_and_phases(path, tiny):
    """Rows of an ordinary store have 0 in the fields of pairs."""
    plain = Store(path=path, rows=4, seq_len=SEQ)
    batch = open_source(Mix(sources=(spec(path), plain), weights=(0.5, 0.5), rows=4), tiny, seed=0).batch(0)
    has = (batch.main.fields["pair_ids"] > 0).any(axis=1)
    assert has.sum() == 2 and batch.main.fields["pair_ids"].dtype == np.int32
    phases = open_source(Phases(sources=(plain, spec(path)), steps=(1,)), tiny, seed=0)
    assert not phases.batch(0).main.fields and "chosen" in phases.batch(1).main.fields
    assert list(stores(Phases(sources=(plain, spec(path)), steps=(1,)))) == [plain, spec(path)]


def test_a_view_in_other_tokens(path, tiny, tiny_teacher):
    """Both sides are in the other view too, with the same segment numbers."""
    readings = {"theirs": Reading(tokenizer=tiny_teacher, seq_len=SEQ)}
    batch = open_source(spec(path), tiny, seed=0, readings=readings).batch(0)
    for b in range(4):
        assert set(batch.main.segment_ids[b]) - {0} == set(batch.views["theirs"].segment_ids[b]) - {0}
    assert Retokenised("teacher").reader == "teacher"


def test_singles_and_answers_to_other_questions(path, tiny):
    source = open_source(spec(path, build=Singles()), tiny, seed=0)
    store = source.parts[0].rowset.store
    groups, seen = store.index().groups, {"chosen": 0, "rejected": 0, "mismatched": 0}
    prompt = lambda row: int(np.flatnonzero(np.isin(row.roles, SUPERVISED))[0])
    answers_of: dict[str, set] = {}
    for i in range(len(store)):
        row = store.row(i)
        answers_of.setdefault(groups[i], set()).add(tuple(row.tokens[prompt(row):].tolist()))
    for step, b, at, row_id, said in epoch(source):
        sides = {n: float(said[n]) for n in seen}
        assert sum(sides.values()) == 1
        seen = {n: seen[n] + sides[n] for n in seen}
        row, tokens = store.row(row_id), source.batch(step).main.tokens[b, at]
        n = prompt(row)
        assert np.array_equal(tokens[:n], row.tokens[:n])
        if said["mismatched"]:
            assert said["pair_ids"] == 0 and not said["apart"].any()
            others = {g for g, known in answers_of.items() if tuple(tokens[n:].tolist()) in known}
            assert others - {groups[row_id]}
        else:
            assert np.array_equal(tokens, row.tokens) and said["apart"].tolist() == [0] * n + [1] * (len(at) - n)
            assert said["pair_ids"] > 0
    about = source.describe()[0]
    assert (about["desirable"], about["undesirable"]) == (2 * QUESTIONS, 2 * QUESTIONS) and "pairs" not in about
    assert seen["mismatched"] == seen["chosen"] + seen["rejected"] >= 4 * QUESTIONS
    plain = open_source(spec(path, build=Singles(measure=False)), tiny, seed=0)
    assert "mismatched" not in plain.batch(0).main.fields


def test_mismatched_answers_have_no_signal(path, tiny):
    batch = open_source(spec(path, build=Singles(), signals=("token",)), tiny, seed=0).batch(0)
    said, other = batch.signals["token"].mask, batch.main.fields["mismatched"] != 0
    assert not said[other].any() and said[(batch.main.segment_ids > 0) & ~other].any()


def test_one_question_has_no_other(tmp_path, tiny):
    make_store(tmp_path / "s", judged_answers(some_traces(2))[:4], tiny)
    with pytest.raises(ValueError, match=r"at least two questions .*measure=False"):
        open_source(spec(str(tmp_path / "s"), build=Singles()), tiny, seed=0)
    assert open_source(spec(str(tmp_path / "s"), build=Singles(measure=False)), tiny, seed=0).describe()[0][
        "desirable"] == 2


def test_batch_prints_the_fields(path, tiny):
    out = io.StringIO()
    show_batch(open_source(spec(path), tiny, seed=0), 0, tiny, Console(file=out, width=300), tokens=400, start=0)
    lines = out.getvalue().splitlines()
    header = next(line for line in lines if line.split()[:2] == ["t", "segment"]).split()
    assert header[-4:] == ["pair_ids", "chosen", "rejected", "apart"] and "pairs 48" in lines[0]
    cells = [line.split() for line in lines if line and line.split()[0].isdigit()]
    assert {"1 1 0 1", "1 0 1 1", "1 1 0 0", "1 0 1 0"} <= {" ".join(c[-4:]) for c in cells}


def test_what_cannot_be_is_said(tmp_path, path, tiny):
    with pytest.raises(ValueError, match="Pairs compares whole answers: drop prefix="):
        spec(path, prefix=Prefix(share=0.5))
    with pytest.raises(ValueError, match=r"finds nothing to compare: 24 answers \(24 right, 0 wrong, 0 unchecked\) to "
                                         r"12 questions.*generate --n 8 --keep all.*verdict='correct' must keep them"):
        open_source(spec(path, verdict="correct"), tiny, seed=0)
    with pytest.raises(ValueError, match="Raise seq_len"):
        open_source(spec(path, seq_len=8), tiny, seed=0)


def test_a_plan_of_units_as_one_of_rows():
    starts = np.array([0, 2, 3, 6])
    units = plan(np.array([5, 4, 6]), seq_len=10, seed=0)
    rows = units.of_members(starts)
    assert units.places.min() == 1
    for s in range(units.sequences):
        mine = units.rows[units.offsets[s]:units.offsets[s + 1]]
        want = [r for u in mine for r in range(starts[u], starts[u + 1])]
        assert rows.rows[rows.offsets[s]:rows.offsets[s + 1]].tolist() == want
        assert units.places[units.offsets[s]:units.offsets[s + 1]].tolist() == list(range(1, len(mine) + 1))
    assert rows.tokens == 15 and [sorted(rows.at(p)) for p in range(2)] == [
        sorted(r for u in units.at(p) for r in range(starts[u], starts[u + 1])) for p in range(2)]
