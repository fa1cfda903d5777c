"""Bytes a token and random-read tokens a second of the trace store, against the naive ways, in one run.

    python benchmarks/store.py [--data DIR] [--tokens 600000] [--seed 0]

Rows: the longest text of each row of real traces when `--data` is given (Qwen2.5 ids if its tokenizer is there,
hashed words otherwise), synthetic ones if not. The top-64 signal is always synthetic, there being no teacher's logits
in the data: candidates drawn from the rows' own unigrams without replacement, and entropies skewed as a language
model's are (most tokens near certain, a few wide open); its mean entropy is printed. Naive ways: uncompressed arrays,
memory-mapped (in the system's cache, as this run has just written them); one Parquet file (zstd), a row group a read.
"""

import argparse
import gzip
import json
import os
import platform
import subprocess
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


class Teacher:
    """Makes a top-64 signal: distinct ids from the flattened unigram with the true token first, Zipf log-probs whose
    exponent, and so whose entropy, varies from token to token."""

    def __init__(self, rows: list[Row], seed: int) -> None:
        self._rng = np.random.default_rng(seed)
        counts = np.bincount(np.concatenate([r.tokens for r in rows])) ** 0.75
        share = counts / counts.sum()
        size = min(1024, 1 << (int(np.count_nonzero(counts)).bit_length() - 1))
        self._pools = np.stack([self._rng.choice(len(share), size, replace=False, p=share) for _ in range(64)])

    def __call__(self, row: Row) -> TopKRow:
        n, rng, size = len(row), self._rng, self._pools.shape[1]
        step = 2 * rng.integers(0, size // 2, (n, 1)) + 1  # odd: all places of the pool are different
        places = (rng.integers(0, size, (n, 1)) + step * np.arange(K + 1)) % size
        drawn = self._pools[rng.integers(0, 64, (n, 1)), places]
        others = np.take_along_axis(drawn, np.argsort(drawn == row.tokens[:, None], axis=1, kind="stable"), axis=1)
        ids = np.concatenate([row.tokens[:, None], others[:, : K - 1]], axis=1)
        exponent = 1.5 + rng.gamma(1.0, 5.0, (n, 1))
        logits = -exponent * np.log1p(np.arange(400)) + rng.normal(size=(n, 400)) * 0.3
        logprobs = -np.sort(-(logits - np.log(np.exp(logits).sum(1, keepdims=True))), 1)[:, :K]
        return TopKRow(ids=ids, logprobs=logprobs.astype(np.float32), mask=np.arange(n) > 0)


def size(path: Path) -> int:
    return sum(p.stat().st_size for p in path.rglob("*") if p.is_file())


def timed(read: Callable[[np.ndarray], int], rows: int, seed: int, seconds: float = 2.0) -> tuple[float, float]:
    """Random-read tokens a second, and a second of CPU time of all threads (which other work on the machine does not
    change): calls of 32 rows until the time is over."""
    rng = np.random.default_rng(seed)
    read(rng.integers(0, rows, 32))
    begun, cpu, done = time.perf_counter(), time.process_time(), 0
    while time.perf_counter() - begun < seconds:
        done += read(rng.integers(0, rows, 32))
    return done / (time.perf_counter() - begun), done / (time.process_time() - cpu)


def main() -> None:
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--data", type=Path, help="folder of the real data")
    ap.add_argument("--tokens", type=int, default=600_000)
    ap.add_argument("--seed", type=int, default=0)
    args = ap.parse_args()
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    print(f"benchmarks/store.py --tokens {args.tokens} --seed {args.seed}{' --data DIR' if args.data else ''}, commit "
          f"{commit or '?'}, Python {platform.python_version()}")
    name, encode = encoder(args.data)
    rows = make_rows(real_texts(args.data) if args.data else synthetic_texts(args.seed), encode, args.tokens)
    lengths = np.array([len(r) for r in rows])
    total = int(lengths.sum())
    teacher = Teacher(rows, args.seed)
    signals = [teacher(r) for r in rows]
    p = np.concatenate([np.exp(s.logprobs.astype(np.float64)) for s in signals])
    lp = np.concatenate([s.logprobs for s in signals])
    print(f"{platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}: "
          f"{'real' if args.data else 'synthetic'} traces, {name}: {len(rows)} rows, "
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
    table(f"{'':34}{'bytes/token':>12}{'random reads, tok/s':>22}{'a CPU second':>15}{'write, tok/s':>15}")
    text = sum(f[0] for c in store.shards for f in c.arrays["text"].files.values())
    bare = size(folder / "store") - text
    fast = timed(lambda ids: sum(len(r) for r in store.read(ids)), n, seed)
    table(f"{'tokens, roles, spans':34}{bare / total:12.2f}{fast[0]:22,.0f}{fast[1]:15,.0f}{total / wrote:15,.0f}")
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
        table(f"{label:34}{used:12.2f}{rate[0]:22,.0f}{rate[1]:15,.0f}{total / took:15,.0f}")
    print(f"KL(given || stored) over 64 outcomes and tail: {kl(store, signals):.1e} nats a token")
    for label, used, rate in naive(folder, rows, signals, total, seed):
        a, b = ours[1.0]
        table(f"{label:34}{used:12.2f}{rate[0]:22,.0f}{rate[1]:15,.0f}   topk:64 against it: "
              f"{used / a:.1f}x fewer bytes, {b[1] / rate[1]:.2f}x the tokens a CPU second")


def kl(store: TraceStore, signals: list[TopKRow]) -> float:
    """Mean KL between the signal as given and as stored by `topk:64`."""
    total, count = 0.0, 0
    for given, got in zip(signals, store.signal("m1.0").read(range(len(signals)))):
        on = given.mask
        assert isinstance(got, TopKRow) and got.tail is not None and np.array_equal(given.ids[on], got.ids[on])
        lp = given.logprobs[on].astype(np.float64)
        p, tail = np.exp(lp), np.maximum(1 - np.exp(lp).sum(1), 1e-12)
        total += float((p * (lp - got.logprobs[on])).sum() + (tail * np.log(tail / got.tail[on])).sum())
        count += int(on.sum())
    return total / count


def table(line: str) -> None:
    print(line, flush=True)


def naive(folder: Path, rows: list[Row], signals: list[TopKRow], total: int, seed: int
          ) -> Iterator[tuple[str, float, tuple[float, float]]]:
    """(label, bytes a token, tokens a second) of the top-64 signal stored the naive ways."""
    n, ends = len(rows), np.cumsum([len(r) for r in rows])
    places = folder / "ids.npy", folder / "logprobs.npy"
    np.save(places[0], np.concatenate([s.ids for s in signals]).astype(np.int32))
    np.save(places[1], np.concatenate([s.logprobs for s in signals]))
    a, b = (np.load(p, mmap_mode="r") for p in places)

    def mapped(wanted: np.ndarray) -> int:
        got = [(a[ends[i] - len(rows[i]) : ends[i]].copy(), b[ends[i] - len(rows[i]) : ends[i]].copy()) for i in wanted]
        return sum(len(x) for x, _ in got)
    yield "npy int32 + float32, memory-mapped", sum(map(size_of, places)) / total, timed(mapped, n, seed)
    for p in places:
        p.unlink()

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
