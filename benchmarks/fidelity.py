"""What stored signals are worth at V about 152k: an n-gram teacher over Qwen2.5 ids of real traces.

    python -m benchmarks.fidelity --data DIR [--tokens 768] [--out benchmarks/results/fidelity]

Teacher: interpolated 4-gram of four fifths of the traces; student: bigram of a tenth of them; measured on tokens of
the rest. Every signal goes through a store, so that the numbers are those of what is read back. Bytes are those of its
arrays; the numbering of ids, written once (3 bytes an id, at most 196 kB), is left out: over so few tokens it would
count for more than all the rest. The student's "hidden state" is its context token, its head the table of the bigram.
"""

import argparse
import json
import subprocess
import tempfile
import time
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from benchmarks.ngram import NGram
from benchmarks.store import real_texts
from distill_jax.core.roles import THINK
from distill_jax.data.tokenizer import load_tokenizer
from distill_jax.eval.fidelity import Fidelity, projection, table, write
from distill_jax.jobs.fidelity import target
from distill_jax.jobs.inspect_store import stored_bytes
from distill_jax.rollout.draws import merge, systematic
from distill_jax.traces.store import Row, SampledRow, SignalHeader, StoreHeader, TopKRow, TraceStore, truncate_mass
from distill_jax.traces.trace import simple_trace

CHUNK = 64
TOPK, KEPT_MASS, DRAWS = (8, 12, 16, 32, 64), {"m99": 0.99, "m999": 0.999}, (8, 16, 50)


def traces(data: Path, limit: int) -> tuple[list[np.ndarray], int]:
    """(ids of each trace, real ids of the tokenizer)."""
    tok = load_tokenizer(data / "7_tokenizers" / "qwen2.5")
    rows: list[np.ndarray] = []
    for text in real_texts(data):
        rows.append(tok.encode(text)[0].astype(np.int32))
        if sum(map(len, rows)) > limit:
            break
    return [r for r in rows if len(r) > 16], tok.real


def topk(logp: np.ndarray, k: int) -> TopKRow:
    """logp float32 [T,V] -> the row; token 0 has no signal."""
    ids = np.argpartition(-logp, k, axis=1)[:, :k]
    ids = np.take_along_axis(ids, np.argsort(-np.take_along_axis(logp, ids, 1), axis=1, kind="stable"), 1)
    return TopKRow(ids=ids.astype(np.int32), logprobs=np.take_along_axis(logp, ids, 1), mask=np.arange(len(logp)) > 0)


def sampled(logp: np.ndarray, n: int, rng: np.random.Generator, independent: bool) -> SampledRow:
    """Draws of every token: systematic ones, or independent ones as in the paper."""
    u = rng.random(len(logp)).astype(np.float32)
    if independent:
        cdf = np.cumsum(np.exp(logp.astype(np.float64)), axis=1)
        found = [np.searchsorted(c, np.sort(rng.random(n)) * c[-1], side="right") for c in cdf]
        ids = np.minimum(np.array(found), logp.shape[1] - 1).astype(np.int32)
    else:
        ids = systematic(jnp.exp(jnp.asarray(logp)), jnp.asarray(u), n)
    ids, weights = merge(jnp.asarray(ids), jnp.full((len(logp), n), 1 / n, jnp.float32))
    return SampledRow(ids=np.asarray(ids), weights=np.asarray(weights), mask=np.arange(len(logp)) > 0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=768)
    parser.add_argument("--train-tokens", type=int, default=400_000)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/fidelity"))
    args = parser.parse_args()
    start = time.monotonic()
    rng = np.random.default_rng(0)
    rows, vocab = traces(args.data, args.train_tokens)
    rows = [rows[i] for i in rng.permutation(len(rows))]
    cut = len(rows) * 4 // 5
    teacher, student = NGram(rows[:cut], 4, vocab), NGram(rows[:len(rows) // 10], 2, vocab)
    held = [r[:CHUNK + 1] for r in rows[cut:] if len(r) > CHUNK][:max(1, args.tokens // CHUNK)]
    kinds = {f"topk{k}": ("topk", k) for k in TOPK} | {f"topk64-{m}": ("topk", 64) for m in KEPT_MASS}
    kinds |= {f"sampled{n}": ("sampled", n) for n in DRAWS} | {"independent50": ("sampled", 50)}
    onto = projection(vocab)
    with tempfile.TemporaryDirectory() as folder:
        store = TraceStore.create(folder, StoreHeader(tokenizer={"name": "qwen2.5", "real": vocab}, template="t"))
        with store.writer() as out:
            for ids in held:
                n = len(ids)
                out.append(Row(tokens=ids, roles=np.full(n, int(THINK), np.uint8), steps=np.zeros(n, np.int32),
                               parts=np.zeros(n, np.int16), spans=np.zeros((n, 2), np.int32), text="",
                               trace=simple_trace("q", "t", "a")))
        store.refresh()
        writers = {name: store.signal_writer(name, SignalHeader(kind=kind, k=k)) for name, (kind, k) in kinds.items()}
        logps, entropy, nll = [], 0.0, 0.0
        for ids in held:
            logp = np.stack([teacher.logprobs(ids[:t]) for t in range(len(ids))])
            logps.append(logp)
            entropy -= float((np.exp(logp[1:]) * logp[1:]).sum())
            nll -= float(logp[np.arange(1, len(ids)), ids[1:]].sum())
            wide = topk(logp, 64)
            for name, writer in writers.items():
                kind, k = kinds[name]
                if kind == "sampled":
                    writer.append(sampled(logp, k, rng, name.startswith("independent")))
                else:
                    mass = KEPT_MASS.get(name.rpartition("-")[2])
                    writer.append(truncate_mass(wide, mass) if mass else topk(logp, k))
        for writer in writers.values():
            writer.close()
        count = len(held) * CHUNK
        readers = {name: store.signal(name) for name in kinds}
        size = {name: sum(b for part, b in stored_bytes(r.shards).items() if part != "vocabulary") / count
                for name, r in readers.items()}
        commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
        measured = Fidelity(bytes=size, about={
            "teacher": f"4-gram of {sum(map(len, rows[:cut])):,} tokens, V={vocab:,}, entropy {entropy / count:.2f} "
                       f"nats, NLL {nll / count:.2f}", "student": "bigram of a tenth", "commit": commit})
        at, valid = np.arange(1, CHUNK + 1), np.ones(CHUNK, bool)
        for number, (ids, logp) in enumerate(zip(held, logps)):
            own = np.stack([student.logprobs(ids[:t]) for t in at])
            measured.add(jnp.asarray(logp[1:]), jnp.asarray(own), jnp.asarray(onto[ids[at - 1]]), jnp.asarray(ids[at]),
                         jnp.asarray(valid), {n: target(r.read([number])[0], at, ids) for n, r in readers.items()})
    report = measured.report() | {"seconds": round(time.monotonic() - start, 1)}
    write(report, args.out)
    print(json.dumps({k: v for k, v in report.items() if k != "signals"}), table(report), sep="\n")


if __name__ == "__main__":
    main()
