"""Random rows and signals, a pure function of their number."""

import numpy as np

from distill_jax.traces.store import Row, SignalHeader, StoreHeader, TokenRow, TopKRow, TraceStore
from distill_jax.traces.store.codecs import make_codec
from distill_jax.traces.store.ragged import plane_names, to_planes
from distill_jax.traces.store.vocabulary import Vocabulary
from distill_jax.traces.trace import Encoded, simple_trace

HEADER = StoreHeader(tokenizer={"name": "toy", "hash": "h", "real": 151_665}, template="t",
                     extra={"made": "by a test"})
ARRAYS = ("tokens", "roles", "steps", "parts", "spans")


def make_row(i: int, low: int = 1, high: int = 300) -> Row:
    rng = np.random.default_rng(i)
    n = int(rng.integers(low, high))
    length = rng.integers(0, 6, n)
    ends = np.cumsum(length)
    encoded = None
    if i % 4 == 0:
        encoded = Encoded(tokenizer="h", ids=rng.integers(0, 9, n).astype(np.int32), prompt_length=1,
                          logprobs=-rng.random(n).astype(np.float32), injected=rng.random(n) < 0.1)
    trace = simple_trace(f"question {i % 7}", f"thinking {i} \u4f60", "answer", verdict=(None, True, False)[i % 3],
                         flags=("truncated",) if i % 5 == 0 else (), encoded=encoded, meta={"k": i})
    return Row(tokens=rng.integers(0, 151_665, n).astype(np.int32), roles=rng.integers(1, 9, n).astype(np.uint8),
               steps=rng.integers(0, 4, n).astype(np.int32), parts=rng.integers(-1, 3, n).astype(np.int16),
               spans=np.stack([ends - length, ends], 1).astype(np.int32), trace=trace,
               text=f"<user>question {i % 7}\nthinking {i} \u4f60 answer\ud800")


def make_topk(i: int, length: int, k: int = 8, vocab: int = 151_665) -> TopKRow:
    """The k most probable of 40 random outcomes a token; every third token keeps fewer; the first is masked."""
    rng = np.random.default_rng([i, 1])
    logits = rng.normal(size=(length, 40)) * 3
    logprobs = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    logprobs = -np.sort(-logprobs, 1)[:, :k].astype(np.float32)
    ids = np.stack([rng.choice(vocab, k, replace=False) for _ in range(length)]).astype(np.int32)
    ids[::3, k // 2:] = -1
    mask = np.arange(length) > 0
    ids[0] = -1
    return TopKRow(ids=ids, logprobs=np.where(ids >= 0, logprobs, -np.inf).astype(np.float32), mask=mask)


def make_token(i: int, length: int) -> TokenRow:
    rng = np.random.default_rng([i, 2])
    mask = np.arange(length) > 0
    return TokenRow(logprobs=np.where(mask, -rng.gamma(0.5, 2.0, length), 0).astype(np.float32), mask=mask)


def through_codec(header: SignalHeader, row: TopKRow, vocabulary: Vocabulary | None = None) -> TopKRow:
    """A row encoded to byte planes and decoded again, without a store."""
    codec, length = make_codec(header), len(row.mask)
    vocabulary = vocabulary or Vocabulary(np.zeros(0, np.int32))
    columns = codec.encode(row, length)
    columns["outcomes"]["id"] = vocabulary.encode(columns["outcomes"]["id"])
    tables = {t: dict(zip(plane_names(widths), to_planes({c: (columns[t][c], w) for c, w in widths.items()})))
              for t, widths in codec.widths.items()}
    return codec.decode(tables, length, vocabulary)


def build(url: object, rows: int = 20, shard_rows: int = 8) -> TraceStore:
    store = TraceStore.create(str(url), HEADER)
    with store.writer(shard_rows=shard_rows) as writer:
        for i in range(rows):
            writer.append(make_row(i), {"next": i + 1})
    return store


def same_arrays(a: object, b: object) -> None:
    for name in ARRAYS:
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name), err_msg=name)
        assert getattr(a, name).dtype == getattr(b, name).dtype, name
