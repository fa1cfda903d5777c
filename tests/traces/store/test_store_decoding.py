"""Fast ways to decode are the plain ones, to the bit."""

import numpy as np
import pytest

import distill_jax.traces.store.quantise as quantise
from distill_jax.traces.store import SignalHeader, TopKRow
from distill_jax.traces.store.codecs import make_codec
from tests.traces.store.store_builders import make_topk, through_codec


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
