"""Bytes an outcome of a top-64 signal under several orders of its ids: what the codec does, and what it could do.

    python benchmarks/topk_coding.py --data DIR [--tokens 1024]

Outcomes of an n-gram teacher over Qwen2.5 ids (see `benchmarks.fidelity`); byte planes under zstd level 1, as in a
shard. Ids by probability leave the log-probs sorted, so that their differences are small; ids in order make the ids'
differences small and leave the log-probs in disorder. Either way the order of K outcomes, log2(K!) / K bits each (4.6
at K = 64), is paid for once.
"""

import argparse
from pathlib import Path

import numpy as np
import pyarrow as pa

from benchmarks.fidelity import topk, traces
from benchmarks.ngram import NGram
from distill_jax.traces.store import quantise
from distill_jax.traces.store.ragged import to_planes
from distill_jax.traces.store.vocabulary import Vocabulary

K, STRETCH = 64, 64


def size(values: np.ndarray, width: int) -> float:
    """Bytes a value after zstd, each byte plane by itself."""
    planes = to_planes({"x": (values.reshape(-1), width)})
    codec = pa.Codec("zstd", compression_level=1)
    return sum(codec.compress(np.ascontiguousarray(p).tobytes()).size for p in planes if p.any()) / values.size


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--train-tokens", type=int, default=400_000)
    args = parser.parse_args()
    rows, vocab = traces(args.data, args.train_tokens)
    rows = [rows[i] for i in np.random.default_rng(0).permutation(len(rows))]
    cut = len(rows) * 4 // 5
    teacher = NGram(rows[:cut], 4, vocab)
    held = [r[:STRETCH] for r in rows[cut:] if len(r) >= STRETCH][:max(1, args.tokens // STRETCH)]
    made = [topk(np.stack([teacher.logprobs(r[:t]) for t in range(len(r))]), K) for r in held]
    ids = np.concatenate([m.ids for m in made])
    codes = quantise.encode(np.concatenate([m.logprobs for m in made]), "u8")
    ranks = Vocabulary.of([ids.reshape(-1)]).encode(ids)
    falling = np.diff(codes.reshape(-1), prepend=np.zeros(1, codes.dtype)).reshape(codes.shape)
    steps = lambda x: np.diff(np.sort(x, axis=1), axis=1, prepend=0)
    by = lambda x: np.take_along_axis(codes, np.argsort(x, axis=1), axis=1)
    print(f"{ids.size:,} outcomes of {len(ids):,} tokens; bytes an outcome: ids + log-probs")
    for name, a, b in (("by probability, ids", ids, falling), ("by probability, ranks (the codec)", ranks, falling),
                       ("by id, differences", steps(ids), by(ids)), ("by rank, differences", steps(ranks), by(ranks))):
        x, y = size(a, 3), size(b, 1)
        print(f"{name:36} {x:.3f} + {y:.3f} = {x + y:.3f}   {K * (x + y):6.1f} bytes/token at k={K}")


if __name__ == "__main__":
    main()
