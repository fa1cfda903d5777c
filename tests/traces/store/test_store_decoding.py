"""Fast ways to decode are the plain ones, to the bit."""

import numpy as np
import pytest

import distill_jax.traces.store.quantise as quantise
from distill_jax.traces.store import SampledRow, SignalHeader, SignalRow, TokenRow, TopKRow
from distill_jax.traces.store.codecs import make_codec
from tests.traces.store.store_builders import build, make_topk, through_codec


@pytest.mark.parametrize("n", [0, 1, 7, 63, 64, 65, 1000, 4099])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.uint32])
def test_running_sum_is_cumsum(n, dtype):
    delta = np.random.default_rng(n).integers(0, np.iinfo(dtype).max, n, dtype, endpoint=True)
    got = quantise.running_sum(delta)
    np.testing.assert_array_equal(got, np.cumsum(delta, dtype=dtype))
    assert got.dtype == dtype


@pytest.mark.parametrize("n", [0, 1, 2, 255, 1000])
@pytest.mark.parametrize("precision", ["u8", "u16"])
def test_codes_are_looked_up(precision, n):
    steps = quantise.PRECISIONS[precision].steps
    codes = np.random.default_rng(n).integers(0, steps + 1, n).astype(quantise.PRECISIONS[precision].code)
    plain = quantise.grid(precision)[codes]
    for got, want in ((quantise.decode(codes, precision), plain), (quantise.probabilities(codes, precision),
                                                                   np.exp(plain))):
        np.testing.assert_array_equal(got, want.astype(np.float32))
        assert got.dtype == np.float32
    np.testing.assert_array_equal(quantise.decode(codes[1::2], precision), plain[1::2].astype(np.float32))


def plain_decode(row: TopKRow, k: int) -> tuple[np.ndarray, np.ndarray]:
    """What a stored u8 row must come back as, token by token: (ids, logprobs)."""
    codec = make_codec(SignalHeader(kind="topk", k=k))
    columns = codec.encode(row, len(row.mask))
    codes = np.cumsum(columns["outcomes"]["code"], dtype=np.uint8)
    ids = np.full((len(row.mask), k), -1, np.int32)
    lp = np.full((len(row.mask), k), -np.inf, np.float32)
    at = 0
    for t, kept in enumerate(columns["tokens"]["kept"]):
        n = max(int(kept) - 1, 0)
        if n:
            code = codes[at:at + n]
            p = np.exp(quantise.grid("u8")).astype(np.float32)[code]
            left = np.float32(1) - quantise.decode_tail(columns["tokens"]["tail"][t:t + 1])
            move = np.log(np.maximum(left, np.float32(1e-30)) / np.add.reduceat(p, [0]))
            lp[t, :n] = np.minimum(quantise.grid("u8").astype(np.float32)[code] + move, np.float32(0))
            ids[t, :n] = columns["outcomes"]["id"][at:at + n]
        at += n
    return ids, lp


@pytest.mark.parametrize("shape", ["full", "first masked", "ragged", "nothing"])
def test_topk_rows_are_what_a_loop_makes(shape):
    row = make_topk(3, 65, k=16)
    if shape != "ragged":
        rng = np.random.default_rng(0)
        ids = np.stack([rng.permutation(1000)[:16] for _ in range(65)]).astype(np.int32)
        lp = -np.sort(rng.gamma(1.0, 2.0, (65, 16)), 1) - 3
        mask = np.full(65, shape != "nothing")
        mask[0] &= shape == "full"
        ids[~mask] = -1
        row = TopKRow(ids=ids, logprobs=np.where(ids >= 0, lp, -np.inf).astype(np.float32), mask=mask)
    got = through_codec(SignalHeader(kind="topk", k=16), row)
    ids, lp = plain_decode(row, 16)
    np.testing.assert_array_equal(got.ids, ids)
    np.testing.assert_allclose(got.logprobs, lp, rtol=3e-7)  # log of one number and of many may round apart
    np.testing.assert_array_equal(got.mask, row.mask)


def said_of(kind: str, i: int, n: int, k: int, whole: bool) -> SignalRow:
    """A row of that kind in which every place of every token is taken, or not."""
    row = make_topk(i, n, k)
    if whole:
        rng = np.random.default_rng(i)
        ids = np.stack([rng.permutation(900)[:k] for _ in range(n)]).astype(np.int32)
        row = TopKRow(ids=ids, logprobs=np.full((n, k), np.log(0.9 / k), np.float32), mask=np.ones(n, bool))
    if kind == "topk":
        return row
    some = row.mask & (row.ids[:, 0] >= 0)
    if kind == "token":
        return TokenRow(logprobs=row.logprobs[:, 0], mask=some)
    first = np.broadcast_to(np.arange(k) == 0, (n, k))
    return SampledRow(ids=np.where(first, row.ids, -1), weights=first.astype(np.float32), mask=some)


@pytest.mark.parametrize("kind,precision", [("topk", "u8"), ("topk", "u16"), ("topk", "f16"), ("topk", "f32"),
                                            ("token", "u16"), ("sampled", "counts")])
@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("k", [7, 8])
def test_a_signal_laid_into_a_batch_is_the_decoded_row(tmp_path, kind, precision, whole, k):
    """Into places of the row's own shape, shorter ones (the row is cut), wider ones (another store keeps more)."""
    store = build(tmp_path / "s", rows=6)
    header = SignalHeader(kind=kind, k=0 if kind == "token" else k, precision=precision)
    with store.signal_writer("said", header) as out:
        for i, n in enumerate(store.lengths()):
            out.append(said_of(kind, i, int(n), k, whole))
    reader = store.signal("said")
    for said, row in zip(reader.begin(range(6)), reader.read(range(6)), strict=True):
        arrays = {name: x for name, x in row.arrays().items() if name != "tail"}  # no batch has it
        n = len(row.mask)
        for length, wider in ((n, 0), (max(1, n - 3), 0), (n, 5)):
            shapes = {name: (length, *(w + wider for w in x.shape[1:])) for name, x in arrays.items()}
            got = {name: np.full(shapes[name], 77, x.dtype) for name, x in arrays.items()}
            said.lay(got)
            for name, x in arrays.items():
                want = np.full(shapes[name], row.empty[name], x.dtype)
                want[tuple(slice(s) for s in x.shape)] = x[:length]
                np.testing.assert_array_equal(got[name], want)


def test_rows_without_places_have_all_else(tmp_path):
    store = build(tmp_path / "s", rows=6)
    for bare, row in zip(store.read(range(6), places=False), store.read(range(6)), strict=True):
        for name in ("tokens", "roles", "steps"):
            np.testing.assert_array_equal(getattr(bare, name), getattr(row, name))
        assert len(bare.parts) == len(bare.spans) == 0 and len(row.parts) == len(row)
