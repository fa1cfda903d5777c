"""The rows of a store: what comes back is what was appended, from any place, in any order."""

import pickle
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distill_jax.traces.store import Row, StoreHeader, TraceStore, compatible
from distill_jax.traces.store.rows import MAX_ID, TOKEN_PLANES, RowArrays, decode_tokens, digest, encode_tokens
from tests.traces.store.store_builders import HEADER, build, make_row, same_arrays


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return build(tmp_path_factory.mktemp("store") / "s", rows=20, shard_rows=8)


def test_rows_come_back(store):
    opened = TraceStore.open(store.url)
    assert len(opened) == 20 and [c.rows for c in opened.shards] == [8, 8, 4] and opened.complete
    assert opened.header == HEADER
    for i in (0, 7, 8, 19):
        got, made = opened.row(i), make_row(i)
        same_arrays(got, made)
        assert got.text == made.text and got.trace.to_json() == made.trace.to_json()
    order = [19, 3, 3, 0, 11]
    for i, got in zip(order, opened.read(order)):
        same_arrays(got, make_row(i))
    assert [t.meta["k"] for t in opened.traces()] == list(range(20))
    assert [t.meta["k"] for t in opened.traces([5, 2])] == [5, 2]
    assert opened.read([]) == []


def test_index_needs_no_data(store):
    index = TraceStore.open(store.url).index()
    made = [make_row(i) for i in range(20)]
    assert index.lengths.tolist() == [len(r) for r in made] == store.lengths().tolist()
    assert index.groups == tuple(r.trace.group for r in made)
    assert index.verdicts.tolist() == [(-1, 1, 0)[i % 3] for i in range(20)]
    assert index.flags[5] == ("truncated",) and index.flags[6] == ()


def test_concurrent_reads(store):
    made = [make_row(i) for i in range(20)]
    orders = [np.random.default_rng(s).permutation(20) for s in range(16)]
    with ThreadPoolExecutor(8) as pool:
        for order, rows in zip(orders, pool.map(store.read, orders)):
            for i, row in zip(order, rows):
                same_arrays(row, made[i])


def test_pickles_for_worker_processes(store):
    same_arrays(pickle.loads(pickle.dumps(store)).read([4])[0], make_row(4))


def test_fingerprint_is_of_the_content(tmp_path, store):
    """Other shards, same fingerprint; another gold answer, which is only in the text, another one."""
    assert build(tmp_path / "a", rows=20, shard_rows=3).fingerprint() == store.fingerprint()
    changed = TraceStore.create(tmp_path / "b", HEADER)
    with changed.writer() as writer:
        for i in range(20):
            row = make_row(i)
            trace = row.trace.replace(gold="7") if i == 13 else row.trace
            writer.append(Row(**{**vars(row), "trace": trace}))
    assert changed.fingerprint() != store.fingerprint()


def test_outside(store):
    for bad in (-1, 20):
        with pytest.raises(IndexError, match=f"no row {bad}"):
            store.read([0, bad])


def test_spans_round_trip_for_interleaved_parts():
    row = make_row(3, low=200, high=201)
    same_arrays(decode_tokens(dict(zip(TOKEN_PLANES, encode_tokens(row))), 200), row)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 60), st.sampled_from([3, 300, 2**31 - 1]))
def test_any_arrays_round_trip(seed, n, most):
    """Parts in any order, spans that overlap, jump and go back, the largest values there are."""
    rng = np.random.default_rng(seed)
    spans = np.sort(rng.integers(0, most, (n, 2), endpoint=True), axis=1).astype(np.int32)
    row = RowArrays(tokens=rng.integers(0, min(most, MAX_ID), n, dtype=np.int32, endpoint=True),
                    roles=rng.integers(0, 9, n, dtype=np.uint8), spans=spans,
                    steps=rng.integers(0, most, n, dtype=np.int32, endpoint=True),
                    parts=rng.integers(-1, min(most, 2**15 - 1), n, dtype=np.int16, endpoint=True))
    same_arrays(decode_tokens(dict(zip(TOKEN_PLANES, encode_tokens(row))), n), row)
    assert digest(row) == digest(decode_tokens(dict(zip(TOKEN_PLANES, encode_tokens(row))), n))


def test_places_that_hold_no_store(tmp_path, store):
    with pytest.raises(FileNotFoundError, match=r"manifest\.json"):
        TraceStore.open(tmp_path)
    with pytest.raises(ValueError, match="already holds a store"):
        TraceStore.create(store.url, HEADER)
    other = StoreHeader(tokenizer=HEADER.tokenizer, template="u", extra=HEADER.extra)
    with pytest.raises(ValueError, match="another template"):
        TraceStore.open_or_create(store.url, other)
    assert len(TraceStore.open_or_create(store.url, HEADER)) == 20


def test_two_processes_begin_one_store(tmp_path, monkeypatch):
    """The other one creates it after this one has looked."""
    real, calls = TraceStore.open.__func__, []

    def racing(cls, url):
        calls.append(url)
        if len(calls) == 1:
            build(url, rows=3)
            raise FileNotFoundError(url)
        return real(cls, url)

    monkeypatch.setattr(TraceStore, "open", classmethod(racing))
    assert len(TraceStore.open_or_create(tmp_path / "s", HEADER)) == 3


def test_headers_compare_over_real_ids():
    padded = StoreHeader(tokenizer={**HEADER.tokenizer, "name": "other", "padded": 152_064}, template="t")
    assert compatible(HEADER, padded)
    other = StoreHeader(tokenizer={"name": "llama", "hash": "g", "real": 128_256, "added": {"<s>": 1}}, template="t")
    with pytest.raises(ValueError, match=r"llama.*151665 against 128256.*id 1: None against '<s>'"):
        compatible(HEADER, other)
    with pytest.raises(ValueError, match="template 't' against 'u'"):
        compatible(HEADER, StoreHeader(tokenizer=HEADER.tokenizer, template="u"))
