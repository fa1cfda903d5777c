"""Bytes a token and random-read tokens a second of the trace store, against the naive ways, in one run.

    python benchmarks/store.py [--data DIR] [--tokens 600000] [--seed 0]

Rows: the longest text of each row of real traces when `--data` is given (Qwen2.5 ids if its tokenizer is there,
hashed words otherwise), synthetic ones if not. The top-64 signal is always synthetic, there being no teacher's logits
in the data: candidates drawn from the rows' own unigrams without replacement, and entropies skewed as a language
model's are (most tokens near certain, a few wide open); its mean entropy is printed. Naive ways: uncompressed arrays
with padded rows, memory-mapped; one Parquet file (zstd) read a row group at a time.
"""

import argparse
import gzip
import json
import platform
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from distill_jax.core.roles import THINK
from distill_jax.traces.store import Row, SignalHeader, StoreHeader, TopKRow, TraceStore, truncate_mass
from distill_jax.traces.trace import simple_trace

K = 64
FOLDERS = ("r1_math500", "qwen3_think_on_off", "rasbt_r1_samples", "student_rollouts_math", "eit_granularity")


def real_texts(data: Path) -> Iterator[str]:
    """The longest string of every row of the trace folders."""
    for folder in FOLDERS:
        for path in sorted((data / "2_traces" / folder).glob("*.json*")):
            raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
            lines = raw.decode("utf-8").splitlines()
            try:
                rows = [json.loads(line) for line in lines if line.strip()]
            except json.JSONDecodeError:
                loaded = json.loads(raw)
                rows = loaded if isinstance(loaded, list) else [loaded]
            for row in rows:
                texts = sorted(strings(row), key=len)
                if texts and len(texts[-1]) > 80:
                    yield texts[-1]


def strings(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for v in value.values():
            yield from strings(v)
    elif isinstance(value, list):
        for v in value:
            yield from strings(v)


def synthetic_texts(seed: int) -> Iterator[str]:
    """Zipf words in rows of log-normal length."""
    rng = np.random.default_rng(seed)
    words = ["".join(rng.choice(list("etaoinshrdlu"), rng.integers(2, 9))) for _ in range(20_000)]
    while True:
        n = int(np.clip(rng.lognormal(6.0, 0.9), 30, 12_000))
        yield " ".join(words[min(int(w), 19_999)] for w in rng.zipf(1.3, n))


def encoder(data: Path | None) -> tuple[str, Callable[[str], tuple[np.ndarray, np.ndarray]]]:
    """(name, text -> ids and byte spans)."""
    folder = data / "7_tokenizers" / "qwen2.5" if data else None
    if folder and folder.is_dir():
        from distill_jax.data.tokenizer import load_tokenizer
        return "Qwen2.5 tokenizer", load_tokenizer(folder).encode

    def hashed(text: str) -> tuple[np.ndarray, np.ndarray]:
        raw = text.encode()
        ends = np.array([i for i, b in enumerate(raw) if b == 32 and i] + [len(raw)], np.int32)
        starts = np.concatenate([np.zeros(1, np.int32), ends[:-1]])
        ids = [zlib.crc32(raw[a:b]) % 151_643 for a, b in zip(starts, ends)]
        return np.array(ids, np.int32), np.stack([starts, ends], 1)
    return "hashed words", hashed


def make_rows(texts: Iterator[str], encode: Callable, tokens: int) -> list[Row]:
    rows, total = [], 0
    for i, text in enumerate(texts):
        ids, spans = encode(text)
        rows.append(Row(tokens=ids, roles=np.full(len(ids), THINK, np.uint8), steps=np.zeros(len(ids), np.int32),
                        parts=np.ones(len(ids), np.int16), spans=spans, text=f"<user>q{i}<assistant>{text}",
                        trace=simple_trace(f"q{i}", text, "")))
        total += len(ids)
        if total >= tokens:
            break
    return rows


def make_signal(row: Row, unigram: np.ndarray, rng: np.random.Generator) -> TopKRow:
    """Top 64 at each token: distinct ids from the unigram (flattened), log-probs of a geometric-like tail whose
    entropy varies from token to token."""
    n = len(row)
    pool = np.stack([rng.choice(len(unigram), 4 * K, p=unigram) for _ in range(8)])
    ids = np.empty((n, K), np.int64)
    for t in range(n):
        first = dict.fromkeys([int(row.tokens[t]), *pool[t % 8][rng.permutation(4 * K)].tolist()])
        fill = [i for i in range(K) if i not in first] if len(first) < K else []
        ids[t] = [*first, *fill][:K]
    slope = 0.15 + rng.gamma(1.2, 3.0, (n, 1))  # nats lost from one rank to the next, at the top
    logits = -slope * np.log1p(np.arange(K + 200)) * 1.5 + rng.normal(size=(n, K + 200)) * 0.3
    logprobs = -np.sort(-(logits - np.log(np.exp(logits).sum(1, keepdims=True))), 1)[:, :K]
    return TopKRow(ids=ids, logprobs=logprobs.astype(np.float32), mask=np.arange(n) > 0)


def size(path: Path) -> int:
    return sum(p.stat().st_size for p in path.rglob("*") if p.is_file())


def timed(read: Callable[[np.ndarray], int], rows: int, seed: int, seconds: float = 2.0) -> float:
    """Random-read tokens a second: calls of 32 rows until the time is over."""
    rng = np.random.default_rng(seed)
    read(rng.integers(0, rows, 32))
    begun, done = time.perf_counter(), 0
    while time.perf_counter() - begun < seconds:
        done += read(rng.integers(0, rows, 32))
    return done / (time.perf_counter() - begun)


def main() -> None:
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--data", type=Path)
    ap.add_argument("--tokens", type=int, default=600_000)
    ap.add_argument("--seed", type=int, default=0)
    args = ap.parse_args()
    name, encode = encoder(args.data)
    rows = make_rows(real_texts(args.data) if args.data else synthetic_texts(args.seed), encode, args.tokens)
    lengths = np.array([len(r) for r in rows])
    total = int(lengths.sum())
    counts = np.bincount(np.concatenate([r.tokens for r in rows]), minlength=151_643) ** 0.75
    rng = np.random.default_rng(args.seed)
    signals = [make_signal(r, counts / counts.sum(), rng) for r in rows]
    p = np.concatenate([np.exp(s.logprobs.astype(np.float64)) for s in signals])
    lp = np.concatenate([s.logprobs for s in signals])
    print(f"{platform.machine()}, {'real' if args.data else 'synthetic'} traces, {name}: {len(rows)} rows, "
          f"{total:,} tokens, lengths {lengths.min()} / {int(np.median(lengths))} / {lengths.max()} (min/median/max)")
    print(f"signal: top {K}, entropy of the kept part {-(p * lp).sum(1).mean():.2f} nats, "
          f"kept mass {p.sum(1).mean():.4f}")
    with tempfile.TemporaryDirectory() as folder:
        run(Path(folder), rows, signals, total, args.seed)


def run(folder: Path, rows: list[Row], signals: list[TopKRow], total: int, seed: int) -> None:
    store = TraceStore.create(folder / "store", StoreHeader(tokenizer={"hash": "x"}))
    begun = time.perf_counter()
    with store.writer() as writer:
        for row in rows:
            writer.append(row)
    wrote = time.perf_counter() - begun
    n = len(rows)
    table(f"{'':34}{'bytes/token':>12}{'random reads, tok/s':>22}{'write, tok/s':>15}")
    text = sum(f[0] for c in store.shards for f in c.array("text").files.values())
    bare = size(folder / "store") - text
    fast = timed(lambda ids: sum(len(r) for r in store.read(ids)), n, seed)
    table(f"{'tokens, roles, spans':34}{bare / total:12.2f}{fast:22,.0f}{total / wrote:15,.0f}")
    table(f"{'text and trace':34}{text / total:12.2f}")
    ours = {}
    for label, mass in (("topk:64", 1.0), ("topk:64, 99.9% of the mass", 0.999), ("topk:64, 99% of the mass", 0.99)):
        header = SignalHeader(kind="topk", k=K, teacher="synthetic", params={"mass": mass})
        begun = time.perf_counter()
        with store.signal_writer(f"m{mass}", header) as writer:
            for s in signals:
                writer.append(s if mass == 1.0 else truncate_mass(s, mass))
        took = time.perf_counter() - begun
        reader = store.signal(f"m{mass}")
        rate = timed(lambda ids, r=reader: sum(len(s.mask) for s in r.read(ids)), n, seed)
        used = size(folder / "store" / "signals" / f"m{mass}") / total
        ours[mass] = (used, rate)
        table(f"{label:34}{used:12.2f}{rate:22,.0f}{total / took:15,.0f}")
    for label, used, rate in naive(folder, rows, signals, total, seed):
        a, b = ours[1.0]
        table(f"{label:34}{used:12.2f}{rate:22,.0f}    ours: {used / a:.1f}x fewer bytes, {b / rate:.2f}x the speed")


def table(line: str) -> None:
    print(line, flush=True)


def naive(folder: Path, rows: list[Row], signals: list[TopKRow], total: int, seed: int
          ) -> Iterator[tuple[str, float, float]]:
    """(label, bytes a token, tokens a second) of the top-64 signal stored the naive ways."""
    lengths = np.array([len(r) for r in rows])
    n, longest = len(rows), int(lengths.max())
    ids_at, lp_at = folder / "ids.npy", folder / "logprobs.npy"
    ids = np.lib.format.open_memmap(ids_at, "w+", np.int32, (n, longest, K))
    lps = np.lib.format.open_memmap(lp_at, "w+", np.float32, (n, longest, K))
    for i, s in enumerate(signals):
        ids[i, : lengths[i]], lps[i, : lengths[i]] = s.ids, s.logprobs
    ids.flush(), lps.flush()
    a, b = np.load(ids_at, mmap_mode="r"), np.load(lp_at, mmap_mode="r")

    def mapped(wanted: np.ndarray) -> int:
        return sum(len(np.array(a[i, : lengths[i]])) + 0 * len(np.array(b[i, : lengths[i]])) for i in wanted)
    yield "npy, padded rows, memory-mapped", (size_of(ids_at) + size_of(lp_at)) / total, timed(mapped, n, seed)
    ids_at.unlink(), lp_at.unlink()

    path, group = folder / "signal.parquet", 16
    columns = {"ids": [s.ids.reshape(-1) for s in signals], "logprobs": [s.logprobs.reshape(-1) for s in signals]}
    pq.write_table(pa.table({k: pa.array(v) for k, v in columns.items()}), path, compression="zstd",
                   row_group_size=group)
    file = pq.ParquetFile(path)

    def grouped(wanted: np.ndarray) -> int:
        out = 0
        for i in wanted:
            got = file.read_row_group(int(i) // group)
            row = np.asarray(got["ids"][int(i) % group].values), np.asarray(got["logprobs"][int(i) % group].values)
            out += len(row[0]) // K
        return out
    yield f"parquet, {group} rows a group, zstd", size_of(path) / total, timed(grouped, n, seed)


def size_of(path: Path) -> int:
    return path.stat().st_size


if __name__ == "__main__":
    main()
