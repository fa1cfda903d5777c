"""`Prefix`: the first part of every row, with its signals, whatever the rows come from."""

import numpy as np
import pytest

from distill_jax.core.roles import SUPERVISED
from distill_jax.data.choosing import kept_lengths
from distill_jax.data.render import Style
from distill_jax.data.source_specs import Prefix, Store
from distill_jax.data.sources import open_source
from tests.data.storing import make_store, some_traces
from tests.data.test_sources import segments


class Lengths:
    """What `kept_lengths` reads of a row set."""

    def __init__(self, lengths, first=0):
        self.lengths, self.first = np.array(lengths), first

    def first_written(self):
        return np.full(len(self.lengths), self.first)


def test_hand_values():
    """The card's: 101 tokens at 0.5 give 50, one token stays one, 1.0 is the identity."""
    kept = lambda lengths, prefix, **kw: kept_lengths(Lengths(lengths, **kw), prefix, ["q"] * len(lengths)).tolist()
    assert kept([101, 1, 100], Prefix(share=0.5)) == [50, 1, 50]
    assert kept([101, 1, 7], Prefix(share=1.0)) == [101, 1, 7] == kept([101, 1, 7], Prefix(share=1.0, of="written"))
    assert kept([101, 100], Prefix(share=0.29), first=40) == [29, 29]
    assert kept([110, 40, 41], Prefix(share=0.3, of="written"), first=40) == [61, 40, 41]
    assert kept([101], Prefix(share=0.5, whole=1.0)) == [101]
    with pytest.raises(ValueError, match="0 < share <= 1"):
        Prefix(share=0.0)


@pytest.mark.parametrize("style", [Style(), Style(think_tags=False)], ids=["stored", "rendered again"])
def test_rows_and_signals_are_cut_together(tmp_path, tiny, style):
    make_store(tmp_path / "s", some_traces(40), tiny, signal="topk")
    spec = lambda prefix, signals=("topk",): Store(
        path=str(tmp_path / "s"), rows=4, seq_len=96, style=style, signals=signals, pack=False, prefix=prefix)
    whole, cut = (open_source(spec(p), tiny, seed=0) for p in (None, Prefix(share=0.4, of="written")))
    seen = 0
    for step in range(10):
        a, b = whole.batch(step), cut.batch(step)  # unpacked, so both plans have the same order
        for i, where, row_id in segments(b):
            n = where.stop
            row = a.main.tokens[i, :n]
            assert a.main.row_ids[i, 0] == row_id and np.array_equal(b.main.tokens[i, :n], row)
            assert np.array_equal(b.signals["topk"].ids[i, :n], a.signals["topk"].ids[i, :n])
            assert not b.main.weights[i, n:].any() and not b.signals["topk"].mask[i, n:].any()
            written = lambda batch, i=i: int(np.isin(batch.main.roles[i], SUPERVISED).sum())
            first = int(np.flatnonzero(np.isin(a.main.roles[i], SUPERVISED))[0])
            total = int((a.main.segment_ids[i] > 0).sum()) - first
            assert n == first + max(1, int(0.4 * total + 1e-9)) and 0 < written(b) < written(a)
            seen += 1
    assert seen == 40 and 0.3 < cut.describe()[0]["kept"] < 1 == whole.describe()[0]["kept"]


@pytest.mark.parametrize("style", [Style(), Style(think_tags=False)], ids=["stored", "rendered again"])
def test_prompts_alone_are_refused(tmp_path, tiny, style):
    make_store(tmp_path / "s", some_traces(20), tiny, signal="topk")
    source = open_source(Store(path=str(tmp_path / "s"), rows=4, seq_len=96, style=style, signals=("topk",),
                               prefix=Prefix(share=0.1)), tiny, seed=0)
    with pytest.raises(ValueError, match=r"nothing to train on(.|\n)*or a prefix keep only"):
        source.batch(0)


def test_a_share_of_the_questions_stays_whole(tmp_path, tiny):
    make_store(tmp_path / "s", some_traces(60), tiny)
    lengths = lambda **kw: open_source(Store(path=str(tmp_path / "s"), rows=4, seq_len=96, prefix=Prefix(
        share=0.5, **kw)), tiny, seed=1).parts[0].rowset
    some = lengths(whole=0.3)
    as_before = some.lengths == some.whole
    assert 6 <= as_before.sum() <= 30 and (lengths().lengths < some.whole).all()
    assert (lengths(whole=0.6).lengths == some.whole)[as_before].all(), "a larger share keeps what was whole before"
    packed = open_source(Store(path=str(tmp_path / "s"), rows=4, seq_len=96, prefix=Prefix(share=0.5)), tiny, seed=1)
    assert packed.parts[0].plan.tokens == lengths().lengths.sum()
