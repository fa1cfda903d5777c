"""Signals beside rows: round trips in every precision, ragged outcomes, boundaries, bad input."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distill_jax.traces.store import (
    CorruptShard,
    HiddenRow,
    SampledRow,
    SignalHeader,
    StoredHead,
    TokenRow,
    TopKRow,
    TraceStore,
    truncate_mass,
)
from distill_jax.traces.store.vocabulary import Vocabulary
from tests.traces.store.store_builders import HEADER, build, make_row, make_token, make_topk, through_codec


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return build(tmp_path_factory.mktemp("signals") / "s", rows=12, shard_rows=5)


@pytest.mark.parametrize("precision,atol", [("u8", 0.12), ("u16", 2e-3), ("f16", 1e-2), ("f32", 0)])
def test_topk_round_trip(store, precision, atol):
    name = f"topk-{precision}"
    header = SignalHeader(kind="topk", k=8, teacher={"model": "t"}, params={"temperature": 1.0}, precision=precision)
    made = [make_topk(i, n) for i, n in enumerate(store.lengths())]
    with store.signal_writer(name, header) as writer:
        for s in made:
            writer.append(s)
    reader = TraceStore.open(store.url).signal(name)
    assert reader.header == header and len(reader) == 12 and name in store.signals()
    order = [11, 0, 6, 6]
    for i, got in zip(order, reader.read(order)):
        assert got.ids.dtype == np.int32 and got.logprobs.dtype == np.float32
        np.testing.assert_array_equal(got.ids, made[i].ids)
        np.testing.assert_array_equal(got.mask, made[i].mask)
        np.testing.assert_array_equal(np.isneginf(got.logprobs), got.ids < 0)
        there = got.ids >= 0
        np.testing.assert_allclose(got.logprobs[there], made[i].logprobs[there], atol=atol, rtol=0)
        tail = np.where(made[i].mask, 1 - np.exp(made[i].logprobs.astype(np.float64)).sum(1), 1)
        np.testing.assert_allclose(got.tail, tail, rtol=2e-4, atol=2e-6)


@pytest.mark.parametrize("precision,atol", [("", 2e-3), ("u8", 0.15), ("f16", 1e-2), ("f32", 0)])
def test_token_round_trip(store, precision, atol):
    made = [make_token(i, n) for i, n in enumerate(store.lengths())]
    with store.signal_writer(f"token{precision}", SignalHeader(kind="token", precision=precision)) as writer:
        for s in made:
            writer.append(s)
    for s, got in zip(made, store.signal(f"token{precision}").read(np.arange(12))):
        np.testing.assert_array_equal(got.mask, s.mask)
        np.testing.assert_allclose(got.logprobs, s.logprobs, atol=atol, rtol=0)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 70), st.sampled_from([300, 70_000, 1 << 24]), st.floats(0, 1))
def test_codec_any_shape(seed, k, vocab, kept_share):
    """Ids to 2^24 - 1, from no outcome at a token to all of them, in any order."""
    rng = np.random.default_rng(seed)
    t = int(rng.integers(1, 9))
    ids = np.stack([rng.choice(vocab, k, replace=False) for _ in range(t)])
    lp = np.log(rng.dirichlet(np.ones(k + 1), t)[:, :k]).astype(np.float32)
    ids = np.where(rng.random((t, k)) < kept_share, ids, -1)
    mask = rng.random(t) < 0.8
    ranked = Vocabulary(rng.permutation(np.unique(ids))[: int(rng.integers(0, 5))].clip(0))
    row = TopKRow(ids=ids, logprobs=np.where(ids < 0, -np.inf, lp), mask=mask)
    got = through_codec(SignalHeader(kind="topk", k=k, precision="f32"), row, ranked)
    np.testing.assert_array_equal(got.mask, mask)
    for row in range(t):
        expected = {int(i): float(x) for i, x in zip(ids[row], lp[row]) if i >= 0 and mask[row]}
        found = {int(i): float(x) for i, x in zip(got.ids[row], got.logprobs[row]) if i >= 0}
        assert found == pytest.approx(expected, abs=1e-6)
        assert np.all(np.diff(got.logprobs[row][got.ids[row] >= 0]) <= 0)
        assert np.all(got.ids[row][len(found):] == -1)


def test_vocabulary():
    """Ranks by frequency; ids outside it follow behind; nothing is ranked where ids hardly repeat."""
    rows = [np.repeat([7, 3, 9], [30, 8, 10]), np.repeat([3], 1)]
    v = Vocabulary.of(rows)
    assert v.ids.tolist() == [7, 9, 3]
    every = np.array([0, 3, 7, 9, 10, (1 << 24) - 1])
    assert v.encode(every).tolist() == [3, 2, 0, 1, 13, (1 << 24) + 2]
    assert v.decode(v.encode(every)).tolist() == every.tolist()
    assert len(Vocabulary.of([np.arange(100)]).ids) == 0 and len(Vocabulary.of([]).ids) == 0


@pytest.mark.parametrize("empty_first", [False, True])
def test_ids_that_repeat_are_ranked(tmp_path, empty_first):
    """A signal over several shards of a small vocabulary, continued by a second writer, and after an empty shard."""
    store = TraceStore.create(tmp_path / "s", HEADER)
    if empty_first:
        store.writer().close()
    with store.writer(shard_rows=4) as writer:
        for i in range(12):
            writer.append(make_row(i))
    header, lengths = SignalHeader(kind="topk", k=8, precision="f32"), store.lengths()
    made = [make_topk(i, n, vocab=40 if i < 8 else 90_000) for i, n in enumerate(lengths)]
    with pytest.raises(KeyError), store.signal_writer("s", header) as writer:
        for i in range(6):
            writer.append(made[i])
        raise KeyError
    with store.signal_writer("s", header) as writer:
        for i in range(writer.next_row, 12):
            writer.append(made[i])
    assert ("vocabulary" in store.signal("s").shards[0].arrays) != empty_first
    TraceStore.open(store.url).verify()
    for s, got in zip(made, store.signal("s").read(range(12))):
        np.testing.assert_array_equal(got.ids, s.ids)
        np.testing.assert_array_equal(got.logprobs, s.logprobs)


def test_truncate_mass_by_hand():
    lp = np.log(np.array([[0.1, 0.5, 0.05, 0.25]])).astype(np.float32)
    row = TopKRow(ids=np.array([[4, 7, 9, 2]]), logprobs=lp, mask=np.array([True]))
    cut = truncate_mass(row, 0.8)  # 0.8 of 0.9: 0.5 and 0.25 reach it
    assert cut.ids.tolist() == [[7, 2, -1, -1]] and cut.tail is not None
    assert cut.tail[0] == pytest.approx(0.25)
    assert np.exp(cut.logprobs[0, :2]).tolist() == pytest.approx([0.5, 0.25])
    assert truncate_mass(row, 1.0).ids.tolist() == [[7, 2, 4, 9]]


def test_boundaries_and_resume(store):
    """Shards of a signal end where the store's do; an interrupted writer goes on at the first missing shard."""
    header = SignalHeader(kind="token", teacher="t", precision="f32")
    lengths = store.lengths()
    with pytest.raises(RuntimeError), store.signal_writer("resumed", header) as writer:
        for i in range(7):
            assert writer.next_row == i
            writer.append(make_token(i, lengths[i]))
        raise RuntimeError
    assert len(store.signal("resumed")) == 5
    with pytest.raises(IndexError, match="no row 5"):
        store.signal("resumed").read([5])
    writer = store.signal_writer("resumed", header)
    assert writer.next_row == 5
    writer.append(make_token(5, lengths[5]))
    with pytest.raises(ValueError, match="rows 6 to 9 is missing"):
        writer.close()
    with store.signal_writer("resumed", header) as writer:
        for i in range(writer.next_row, 12):
            writer.append(make_token(i, lengths[i]))
        with pytest.raises(ValueError, match="all of them have this signal"):
            writer.append(make_token(0, 3))
    assert [c.rows for c in store.signal("resumed").shards] == [5, 5, 2]
    with pytest.raises(ValueError, match=r"another header \(precision: 'f32' there, 'u8' asked\)"):
        store.signal_writer("resumed", SignalHeader(kind="token", teacher="t", precision="u8"))
    with pytest.raises(ValueError, match="has no signal 'nope'"):
        store.signal("nope")


@pytest.mark.parametrize("change,message", [
    ({"logprobs": np.full((3, 2), 0.5, np.float32)}, "at most 0"),
    ({"logprobs": np.full((3, 2), -0.1, np.float32)}, "sum to 1.8"),
    ({"logprobs": np.full((3, 2), np.nan, np.float32)}, "finite"),
    ({"logprobs": np.full((3, 2), -np.inf, np.float32)}, "finite"),
    ({"ids": np.array([[1, 1]] * 3)}, "occurs twice"),
    ({"ids": np.array([[1, 1 << 24]] * 3)}, "does not fit"),
    ({"ids": np.zeros((2, 2), int)}, "expected ids and their values"),
    ({"mask": np.ones(4, bool)}, r"expected mask \[3\]"),
    ({"tail": np.zeros(3, np.float32)}, "tail must be"),
])
def test_bad_rows(change, message):
    from distill_jax.traces.store.codecs import make_codec
    good = {"ids": np.array([[1, 2]] * 3), "logprobs": np.full((3, 2), -1.0, np.float32), "mask": np.ones(3, bool)}
    codec = make_codec(SignalHeader(kind="topk", k=2))
    codec.encode(TopKRow(**good), 3)
    with pytest.raises(ValueError, match=message):
        codec.encode(TopKRow(**{**good, **change}), 3)


def test_bad_headers_and_kinds(store):
    for kwargs, message in (({"kind": "hiden"}, "unknown signal kind"), ({"kind": "topk"}, "cannot have k=0"),
                            ({"kind": "token", "k": 4}, "cannot have k=4"),
                            ({"kind": "hidden", "k": 8}, "needs the teacher's head"),
                            ({"kind": "hidden", "k": 8, "head": {}, "precision": "u8"}, "unknown precision"),
                            ({"kind": "token", "precision": "u4"}, "unknown precision")):
        with pytest.raises(ValueError, match=message):
            SignalHeader(**kwargs)
    with pytest.raises(ValueError, match="takes TopKRow"):
        store.signal_writer("mixed", SignalHeader(kind="topk", k=2)).append(
            TokenRow(logprobs=np.zeros(3), mask=np.ones(3, bool)))
    with pytest.raises(ValueError, match="signal name"):
        store.signal("../up")


def make_sampled(i: int, length: int, n: int = 10) -> SampledRow:
    """Ten draws of up to six ids a token, merged."""
    rng = np.random.default_rng([i, 3])
    counts = rng.multinomial(n, rng.dirichlet(np.full(6, 0.5), length))
    ids = np.stack([rng.choice(151_665, 6, replace=False) for _ in range(length)]).astype(np.int32)
    mask = rng.random(length) < 0.8
    there = (counts > 0) & mask[:, None]
    weights = np.where(there, counts / n, 0).astype(np.float32)
    return SampledRow(ids=np.where(there, ids, -1), weights=weights, mask=mask)


@pytest.mark.parametrize("precision,rtol", [("counts", 1e-6), ("u16", 5e-3), ("f32", 1e-6)])
def test_sampled_round_trip(store, precision, rtol):
    header = SignalHeader(kind="sampled", k=10, precision="" if precision == "counts" else precision)
    made = [make_sampled(i, n) for i, n in enumerate(store.lengths())]
    with store.signal_writer(f"sampled-{precision}", header) as writer:
        for s in made:
            writer.append(s)
    reader = TraceStore.open(store.url).signal(f"sampled-{precision}")
    assert reader.header.precision == precision
    for s, got in zip(made, reader.read(np.arange(12))):
        np.testing.assert_array_equal(got.mask, s.mask)
        assert np.all(np.diff(got.weights, axis=1) <= 0)
        for t in np.flatnonzero(s.mask):
            expected = {int(i): float(w) for i, w in zip(s.ids[t], s.weights[t]) if i >= 0}
            found = {int(i): float(w) for i, w in zip(got.ids[t], got.weights[t]) if i >= 0}
            assert found == pytest.approx(expected, rel=rtol)


@pytest.mark.parametrize("precision,error", [("bf16", 2.0**-8), ("int8", 0.5 / 127)])
def test_hidden_round_trip_and_its_head(store, precision, error):
    rng = np.random.default_rng(0)
    head = StoredHead(kernel=rng.normal(size=(50, 12)).astype(np.float32), bias=rng.normal(size=50).astype(np.float32),
                      scale=0.5, soft_cap=30.0, real=47)
    name = f"hidden-{precision}"
    header = SignalHeader(kind="hidden", k=12, precision=precision, head=store.write_head(name, head))
    made = [HiddenRow(states=rng.normal(size=(n, 12)).astype(np.float32), mask=rng.random(n) < 0.8)
            for n in store.lengths()]
    with store.signal_writer(name, header) as writer:
        for s in made:
            writer.append(s)
    reader = TraceStore.open(store.url).signal(name)
    assert reader.header == header
    back = reader.head()
    assert all(np.array_equal(getattr(back, f), getattr(head, f)) for f in vars(head))
    for s, got in zip(made, reader.read(np.arange(12))):
        np.testing.assert_array_equal(got.mask, s.mask)
        assert got.states.dtype.name == {"bf16": "bfloat16", "int8": "int8"}[precision]
        values = got.states.astype(np.float32) * got.scales[:, None]
        size = np.abs(s.states) if precision == "bf16" else np.abs(s.states).max(axis=1, keepdims=True)
        assert np.all(np.abs(values - s.states)[s.mask] <= (error * size + 1e-6 + 0 * values)[s.mask])
        assert not values[~s.mask].any()
    key = f"signals/{name}/head/kernel-000.bin"
    good = store.kv.read(key)
    store.kv.write_many({key: good[:-1] + b"\0"})
    with pytest.raises(CorruptShard, match=r"kernel-000.bin"):
        reader.verify()
    store.kv.write_many({key: good})
    reader.verify()


@pytest.mark.parametrize("row,message", [
    (SampledRow(ids=np.array([[1, 2]]), weights=np.array([[0.5, 0.4]]), mask=np.ones(1, bool)), "sum to 1"),
    (SampledRow(ids=np.array([[1, 2]]), weights=np.array([[np.nan, 0.5]]), mask=np.ones(1, bool)), "finite"),
    (SampledRow(ids=np.array([[1, 1]]), weights=np.array([[0.5, 0.5]]), mask=np.ones(1, bool)), "occurs twice"),
    (SampledRow(ids=np.array([[1, 2]]), weights=np.array([[0.55, 0.45]]), mask=np.ones(1, bool)), "2 equal draws"),
    (HiddenRow(states=np.array([[1, np.inf]]), mask=np.ones(1, bool)), "token 0 is not finite"),
    (HiddenRow(states=np.zeros((1, 3)), mask=np.ones(1, bool)), r"states \[1, 2\]"),
])
def test_bad_draws_and_states(row, message):
    from distill_jax.traces.store.codecs import make_codec
    head = {} if isinstance(row, HiddenRow) else None
    codec = make_codec(SignalHeader(kind="sampled" if head is None else "hidden", k=2, head=head))
    with pytest.raises(ValueError, match=message):
        codec.encode(row, 1)
