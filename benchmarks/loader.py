"""Loader: tokens/s of packed batches from a trace store, against parsing JSON and tokenising in every step.

    python benchmarks/loader.py [--rows 2000] [--seq-len 4096] [--k 64] [--tokenizer DIR] [--seconds 8] [--processes 2]
    python benchmarks/loader.py --against CHECKOUT          # this package against that of another checkout, in turns

All sides read the same traces in one run and count tokens that carry data (not padding). Without --tokenizer a
byte-level BPE of 8k ids is trained on the traces.
"""

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

import distill_jax.data.sources as sources
from distill_jax.data.render import render, template_id
from distill_jax.data.source_specs import Store
from distill_jax.data.sources import open_source, serve
from distill_jax.data.tokenizer import Tokenizer, load_tokenizer
from distill_jax.traces.store import SignalHeader, StoreHeader, TopKRow, TraceStore
from distill_jax.traces.trace import Trace, simple_trace

TEMPLATE = ("{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endfor %}"
            "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}")


def make_traces(n: int, seed: int = 0) -> list[Trace]:
    """Word salad with Zipf frequencies; thinking of log-normal length (median about 600 words)."""
    rng = np.random.default_rng(seed)
    syllables = [a + b for a in "bcdfghklmnprstvz" for b in ("a", "e", "in", "o", "ur")]
    words = ["".join(rng.choice(syllables, rng.integers(1, 4))) for _ in range(5000)]
    p = 1 / np.arange(1, 5001)
    say = lambda k: " ".join(rng.choice(words, k, p=p / p.sum()))
    lengths = np.clip(rng.lognormal(6.4, 0.7, n), 20, 2500).astype(int)
    return [simple_trace(say(40), say(k), say(20), gold=str(i)) for i, k in enumerate(lengths)]


def train_tokenizer(folder: Path, traces: list[Trace]) -> Tokenizer:
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers

    tok = tokenizers.Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=8000, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
                                  show_progress=False)
    tok.train_from_iterator((t.thinking for t in traces[:300]), trainer)
    tok.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    folder.mkdir(exist_ok=True)
    tok.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|im_end|>", "chat_template": TEMPLATE}))
    return load_tokenizer(folder)


def write_store(path: Path, traces: list[Trace], tok: Tokenizer, k: int, shard_rows: int = 256) -> int:
    """Store with a top-k signal of random outcomes; returns its bytes on disk."""
    store = TraceStore.create(str(path), StoreHeader(tokenizer=tok.info(), template=template_id(tok)))
    with store.writer(shard_rows) as out:
        for t in traces:
            out.append(render(t, tok))
    store = TraceStore.open(str(path))
    rng = np.random.default_rng(0)
    with store.signal_writer("topk", SignalHeader(kind="topk", k=k)) as out:
        for n in store.lengths():
            gaps = rng.integers(1, max(2, tok.real // k), (n, k))
            ids = (rng.integers(0, tok.real, (n, 1)) + np.cumsum(gaps, axis=1)) % tok.real
            logits = np.sort(rng.normal(0, 3, (n, k)))[:, ::-1]
            logprobs = logits - np.log(np.exp(logits).sum(1, keepdims=True)) - 0.02
            out.append(TopKRow(ids=ids.astype(np.int32), logprobs=logprobs.astype(np.float32), mask=np.ones(n, bool)))
    return sum(f.stat().st_size for f in path.rglob("*") if f.is_file())


def naive(lines: list[str], tok: Tokenizer, rows: int, seq_len: int) -> Iterator[int]:
    """Parse, render, tokenise and pad one batch per step: tokens of each."""
    order = np.random.default_rng(0).permutation(len(lines))
    for start in itertools.count(0, rows):
        batch = np.zeros((rows, seq_len), np.int32)
        roles = np.zeros((rows, seq_len), np.int32)
        count = 0
        for b in range(rows):
            row = render(Trace.from_json(json.loads(lines[order[(start + b) % len(order)]])), tok)
            n = min(len(row.tokens), seq_len)
            batch[b, :n], roles[b, :n] = row.tokens[:n], row.roles[:n]
            count += n
        yield count


def prefetched(make: Callable[[int], int], threads: int) -> Iterator[int]:
    """`make(0)`, `make(1)`, ... in order, computed by threads ahead of time."""
    with ThreadPoolExecutor(threads) as pool:
        waiting = [pool.submit(make, i) for i in range(2 * threads)]
        for i in itertools.count(len(waiting)):
            yield waiting.pop(0).result()
            waiting.append(pool.submit(make, i))


LAST = [0.0]


def rate(steps: Iterator[int], seconds: float) -> float:
    """Tokens per second, after one step of warming up. Leaves in `LAST` those per second of CPU time of the whole
    process (all threads), which says more than the clock where others use the machine."""
    next(steps)
    start, cpu, tokens = time.perf_counter(), time.process_time(), 0
    while (spent := time.perf_counter() - start) < seconds:
        tokens += next(steps)
    LAST[0] = tokens / (time.process_time() - cpu)
    return tokens / spent


def measure(store: str, tok: Tokenizer, signals: tuple[str, ...], a: argparse.Namespace) -> float:
    """Tokens per second of one process's share of the batches."""
    sources.SMALL_STORE = 0  # else later epochs of a small store would come from memory
    source = open_source(Store(path=store, rows=a.batch * a.processes, seq_len=a.seq_len, signals=signals), tok, seed=0)

    def tokens() -> Iterator[int]:
        for batch in serve(source, 0, a.process, a.processes, threads=a.threads):
            yield int((batch.main.segment_ids > 0).sum())

    return rate(tokens(), a.seconds)


def in_processes(store: str, tok: str, signals: tuple[str, ...], a: argparse.Namespace, root: str = "",
                 processes: int = 1) -> tuple[float, float]:
    """(tokens per second of all processes, of a CPU second of one) with the package of checkout `root`."""
    root = root or str(Path(__file__).resolve().parents[1])
    command = [sys.executable, __file__, "--measure", store, "--tokenizer", tok, "--signals", ",".join(signals)]
    command += [f"--{name.replace('_', '-')}={getattr(a, name)}" for name in ("batch", "seq_len", "threads", "seconds")]
    begun = [subprocess.Popen([*command, "--process", str(i), "--processes", str(processes)], text=True,
                              env=os.environ | {"PYTHONPATH": root}, stdout=subprocess.PIPE) for i in range(processes)]
    said = [json.loads(p.communicate()[0].splitlines()[-1]) for p in begun]
    return sum(s["tokens"] for s in said), float(np.mean([s["cpu"] for s in said]))


def compare(store: str, tok: str, a: argparse.Namespace) -> None:
    """The package of another checkout and this one, in turns; the best of three each: others use the machine too."""
    for signals in ((), ("topk",)):
        best = [0.0, 0.0]
        for _ in range(3):
            for i, root in enumerate((a.against, "")):
                best[i] = max(best[i], in_processes(store, tok, signals, a, root)[1])
        name = f"with topk:{a.k}" if signals else "tokens only"
        print(f"{name:24} before {best[0]:12,.0f}  now {best[1]:12,.0f} tokens per CPU second "
              f"{best[1] / best[0]:5.2f}x", flush=True)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=2000)
    parser.add_argument("--shard-rows", type=int, default=256)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--seq-len", type=int, default=4096)
    parser.add_argument("--k", type=int, default=64)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--seconds", type=float, default=8.0)
    parser.add_argument("--tokenizer")
    parser.add_argument("--against", help="another checkout of this repository: its package and this one, in turns")
    parser.add_argument("--processes", type=int, default=1, help="also so many processes at once, each with its share")
    parser.add_argument("--process", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    parser.add_argument("--signals", default="", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    a = arguments()
    if a.measure:
        got = measure(a.measure, load_tokenizer(a.tokenizer), tuple(filter(None, a.signals.split(","))), a)
        print(json.dumps({"tokens": got, "cpu": LAST[0]}))
        return
    traces = make_traces(a.rows)
    with tempfile.TemporaryDirectory() as temp:
        folder, store = Path(temp) / "tok", Path(temp) / "store"
        tok = load_tokenizer(a.tokenizer) if a.tokenizer else train_tokenizer(folder, traces)
        tok.save(folder)
        size = write_store(store, traces, tok, a.k, a.shard_rows)
        print(f"load average {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores; {a.rows} traces in shards of "
              f"{a.shard_rows}, vocabulary {tok.real:,}, batches of {a.batch} x {a.seq_len}, {a.threads} threads, "
              f"store with topk:{a.k} {size / 1e6:.0f} MB", flush=True)
        if a.against:
            return compare(str(store), str(folder), a)
        base = against_text([json.dumps(t.to_json()) for t in traces], tok, a)
        for name, signals in (("store, tokens only", ()), (f"store, with topk:{a.k}", ("topk",))):
            for n in sorted({1, a.processes}):
                got, cpu = in_processes(str(store), str(folder), signals, a, processes=n)
                print(f"{name:24} {n} process{'es' if n > 1 else '  '} {got:12,.0f} tokens/s {got / base:5.1f}x  "
                      f"{cpu:12,.0f} tokens per CPU second", flush=True)


def against_text(lines: list[str], tok: Tokenizer, a: argparse.Namespace) -> float:
    """Tokens per second of what parses and tokenises in every step, by one thread."""
    base = rate(naive(lines, tok, a.batch, a.seq_len), a.seconds)
    print(f"naive, one thread           {base:12,.0f} tokens/s   1.0x  {LAST[0]:12,.0f} tokens per CPU second (padded)")

    def one(i: int) -> int:
        part = [lines[(i * a.batch + b) % len(lines)] for b in range(a.batch)]
        return next(naive(part, tok, a.batch, a.seq_len))

    if a.threads > 1:
        many = rate(prefetched(one, a.threads), a.seconds)
        print(f"naive, {a.threads} threads            {many:12,.0f} tokens/s {many / base:5.1f}x  {LAST[0]:12,.0f} "
              "tokens per CPU second (padded)", flush=True)
    return base


if __name__ == "__main__":
    main()
