"""A store behind Grain's reading threads: damage comes out with its place, an object store is as good as a disk."""

import threading
import time
from dataclasses import replace

import jax
import numpy as np
import pytest

import distill_jax.data.sources as sources
from distill_jax.data.serve import Served
from distill_jax.data.source_specs import Pairs, Prefix, Store
from distill_jax.data.sources import open_source, serve
from distill_jax.traces.store import CorruptShard, TraceStore
from distill_jax.traces.store.ragged import RaggedArray
from tests.data.storing import judged_answers, make_store, some_traces
from tests.s3 import s3_bucket


def opened(url, tok):
    return open_source(Store(path=str(url), rows=2, seq_len=128, signals=("topk",)), tok, seed=0)


@pytest.mark.parametrize("harm", ["flipped", "missing"])
def test_damage_names_shard_and_row_and_nothing_hangs(tiny, tmp_path, harm):
    make_store(tmp_path / "s", some_traces(40), tiny, "topk")
    source = opened(tmp_path / "s", tiny)
    shard = next((tmp_path / "s" / "signals" / "topk" / "data").glob("000001-*")) / "outcomes" / "c.0.0.0"
    if harm == "missing":
        shard.unlink()
    else:
        data = bytearray(shard.read_bytes())
        data[5] ^= 1
        shard.write_bytes(bytes(data))
    with pytest.raises(CorruptShard, match=r"shard 1, row \d+: .*outcomes") as caught:
        for _ in serve(source, stop_step=60):
            pass
    assert caught.value.shard == 1 and 16 <= caught.value.row < 32 and "\n" not in str(caught.value)


def test_s3_through_grain_is_the_local_store(tiny, tmp_path):
    with s3_bucket("rows-bucket") as client:
        urls = [tmp_path / "s", "s3://rows-bucket/s"]
        local = make_store(tmp_path / "s", some_traces(20), tiny, "topk")
        for file in (f for f in (tmp_path / "s").rglob("*") if f.is_file()):
            client.put_object(Bucket="rows-bucket", Key=f"s/{file.relative_to(tmp_path / 's')}",
                              Body=file.read_bytes())
        assert TraceStore.open(urls[1]).fingerprint() == local.fingerprint()
        batches = [list(serve(opened(url, tiny), 1, stop_step=4)) for url in urls]
        for ours, theirs in zip(*(jax.tree.leaves(b) for b in batches), strict=True):
            np.testing.assert_array_equal(ours, theirs)


def damage(folder, shard, table="signals/topk/data", array="outcomes", whole=True):
    """Harm a shard's file: all of it, or one byte."""
    file = next((folder / table).glob(f"{shard:06d}-*")) / array / "c.0.0.0"
    data = bytearray(file.read_bytes())
    data[5] ^= 1
    if whole:
        file.unlink()
    else:
        file.write_bytes(bytes(data))


def rows_by_number(batches):
    """{(store row, how often it was there before): its tokens and kept outcomes, where it lies}."""
    out, seen = {}, {}
    for step, batch in enumerate(batches):
        main, topk = batch.main, batch.signals["topk"]
        for b in range(len(main.tokens)):
            for segment in range(1, main.segment_ids[b].max() + 1):
                at = main.segment_ids[b] == segment
                row = int(main.row_ids[b][at][0])
                seen[row] = seen.get(row, 0) + 1
                out[row, seen[row]] = (step, b, main.tokens[b][at].tolist(), topk.logprobs[b][at].tolist())
    return out


@pytest.mark.parametrize("table,array,whole,lost", [
    ("signals/topk/data", "outcomes", True, set(range(16, 32))), ("data", "tokens", True, set(range(16, 32))),
    ("signals/topk/data", "outcomes", False, None), ("data", "tokens", False, None)])
@pytest.mark.parametrize("keep", [True, False])
def test_skipped_rows_leave_all_others_where_they_were(tiny, tmp_path, monkeypatch, table, array, whole, lost, keep):
    monkeypatch.setattr(sources, "SMALL_STORE", sources.SMALL_STORE if keep else 0)
    make_store(tmp_path / "s", some_traces(60), tiny, "topk")
    spec = Store(path=str(tmp_path / "s"), rows=4, seq_len=160, signals=("topk",), bad_shards="skip")
    before = rows_by_number(serve(open_source(spec, tiny, seed=0), stop_step=12))
    damage(tmp_path / "s", 1, table, array, whole)
    source = open_source(spec, tiny, seed=0)
    batches = list(serve(source, stop_step=12))
    after = rows_by_number(batches)
    gone = {row for row, _ in before} - {row for row, _ in after}
    assert gone and (lost is None or gone == lost & {row for row, _ in before})
    assert after == {key: value for key, value in before.items() if key[0] not in gone}
    (bad,) = source.damaged()
    assert bad.place == f"{tmp_path / 's'}: shard 1" and (bad.lost, bad.rows) == (16 if whole else len(gone), 16)
    assert "of its 16 rows cannot be read and are left out (row " in str(bad) and "\n" not in str(bad)
    halves = [list(serve(open_source(spec, tiny, seed=0), 5, i, 2, stop_step=9)) for i in (0, 1)]  # and begun at 5
    for step, (a, b) in enumerate(zip(*halves, strict=True), 5):
        for x, y, whole_batch in zip(*(jax.tree.leaves(t) for t in (a, b, batches[step])), strict=True):
            np.testing.assert_array_equal(np.concatenate([x, y]), whole_batch)


def test_most_of_a_store_cannot_be_skipped(tiny, tmp_path):
    make_store(tmp_path / "s", some_traces(40), tiny, "topk")
    spec = Store(path=str(tmp_path / "s"), rows=2, seq_len=128, signals=("topk",), bad_shards="skip")
    damage(tmp_path / "s", 0)
    damage(tmp_path / "s", 1)
    with pytest.raises(ValueError, match=r"32 of 40 rows cannot be read, the last found in shard \d .*too many"):
        list(serve(open_source(spec, tiny, seed=0), stop_step=60))


def test_rows_read_while_a_source_is_opened_are_left_out_of_its_plan(tiny, tmp_path):
    make_store(tmp_path / "s", some_traces(60), tiny, "topk")
    spec = Store(path=str(tmp_path / "s"), rows=4, seq_len=160, prefix=Prefix(share=0.5, of="written"))
    damage(tmp_path / "s", 1, "data", "tokens", whole=False)
    with pytest.raises(CorruptShard, match="shard 1"):
        open_source(spec, tiny, seed=0)
    source = open_source(replace(spec, bad_shards="skip"), tiny, seed=0)
    (bad,) = source.damaged()
    assert source.describe()[0]["left_out"] == {"cannot be read": bad.lost} and 0 < bad.lost < 16
    assert source.describe()[0]["rows"] == 60 - bad.lost


def test_a_pair_with_a_side_that_cannot_be_read_is_left_out_whole(tiny, tmp_path):
    make_store(tmp_path / "s", judged_answers(some_traces(12)), tiny, "topk")
    spec = Pairs(path=str(tmp_path / "s"), rows=2, seq_len=256, signals=("topk",), bad_shards="skip")
    damage(tmp_path / "s", 1, whole=False)
    source = open_source(spec, tiny, seed=0)
    batches = list(serve(source, stop_step=12))
    (bad,) = source.damaged()
    assert bad.lost < 8
    for batch in batches:
        pairs, fields = batch.main.fields["pair_ids"], batch.main.fields
        for b in range(2):
            for number in set(pairs[b][pairs[b] > 0].tolist()):
                at = pairs[b] == number
                assert fields["chosen"][b][at].any() and fields["rejected"][b][at].any()


def test_a_read_that_succeeds_when_tried_again_loses_nothing(tiny, tmp_path, monkeypatch):
    make_store(tmp_path / "s", some_traces(40), tiny, "topk")
    spec = Store(path=str(tmp_path / "s"), rows=2, seq_len=128, signals=("topk",), bad_shards="skip")
    want = open_source(spec, tiny, seed=0).batch(3)
    source, finish, left = open_source(spec, tiny, seed=0), RaggedArray.finish, [2]

    def flaky(self, row, future):
        if left[0]:
            left[0] -= 1
            raise ValueError("DATA_LOSS: a bit was flipped on the way")
        return finish(self, row, future)

    monkeypatch.setattr(RaggedArray, "finish", flaky)
    for x, y in zip(jax.tree.leaves(source.batch(3)), jax.tree.leaves(want), strict=True):
        np.testing.assert_array_equal(x, y)
    assert left == [0] and source.damaged() == []


def readers():
    return [t for t in threading.enumerate() if t.name.startswith("grain-prefetch") and t.is_alive()]


def test_closing_ends_the_threads_that_read_ahead(tiny, tmp_path):
    make_store(tmp_path / "s", some_traces(20), tiny, "topk")
    before = set(readers())
    batches = serve(opened(tmp_path / "s", tiny))
    next(batches)
    assert set(readers()) - before
    batches.close()
    batches.close()
    end = time.monotonic() + 20
    while set(readers()) - before and time.monotonic() < end:
        time.sleep(0.01)
    assert not set(readers()) - before
    with pytest.raises(ValueError, match="closed"):
        next(batches)


def test_how_far_is_read_ahead_is_a_setting(tiny, tmp_path, monkeypatch):
    made = []

    def batch(step, rows):
        made.append(step)
        return step

    def read(ahead):
        monkeypatch.setenv("DISTILL_JAX_READ_AHEAD", str(ahead))
        made.clear()
        served = Served(batch, 2, 0, 0, 1)
        next(served)
        end = time.monotonic() + 20
        while len(made) < ahead + 1 and time.monotonic() < end:
            time.sleep(0.01)
        time.sleep(0.05)
        served.close()
        return sorted(made)

    assert read(1) == [0, 1] and read(7) == list(range(8))
    for name in ("DISTILL_JAX_READ_AHEAD", "DISTILL_JAX_READ_THREADS"):
        monkeypatch.setenv(name, "none")
        with pytest.raises(ValueError, match=f"{name}='none': expected a whole number of at least 1"):
            Served(batch, 2, 0, 0, 1)
        monkeypatch.delenv(name)
