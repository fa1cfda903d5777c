"""Time and peak temporaries of the lifted top-k KD loss, in both of its loops (over tokens, over the vocabulary),
against the naive one and against rematerialised chunks.

All sides compute forward KL on k kept teacher outcomes and a tail bucket, value and gradients for hidden states and
head, in one process, one after the other; their values and gradients are compared. Full size wants 10 GB of memory.
With --row-losses it is instead every row loss, lifted, on each kind of target it can use, against plain lifted
cross-entropy.

    python -m benchmarks.loss                 # V=151,936 D=896, 4,096 tokens, k=64
    python -m benchmarks.loss --small         # seconds: does it run and agree
    python -m benchmarks.loss --dtype bfloat16 --supervised 0.25
    python -m benchmarks.loss --row-losses --vocab 32000    # table of every row loss
    python -m benchmarks.loss --target h200.txtpb --width 1536 --tokens 8192 --dtype bfloat16
                                              # memory only, compiled for a GPU that is not there (its target config as
                                              # text proto); needs jax-cuda13-plugin of jax's version, JAX_PLATFORMS=cpu
"""

import argparse
import json
import os
import platform
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from distill_jax.core.batch import TopK
from distill_jax.core.head import Head
from distill_jax.losses.rows.divergences import forward_kl
from distill_jax.losses.targets import TopKTarget
from distill_jax.objective.lift import lift_sum
from distill_jax.objective.memory import CHUNK, Loop
from distill_jax.objective.rows import RowTerm

Array = Any


def head_of(kernel: Array) -> Head:
    """A padded vocabulary, as Qwen's: 271 of its 151,936 rows are no token."""
    return Head(kernel=kernel, real=kernel.shape[0] - 271)


def naive(hidden: Array, kernel: Array, weights: Array, topk: TopK) -> Array:
    """What one writes first: log-softmax of all logits, gather, 1 - sum for the tail."""
    logits = head_of(kernel).logits(hidden)[:, :-1]
    logp = jax.nn.log_softmax(logits)
    kept = jnp.take_along_axis(logp, topk.ids[:, 1:], axis=-1)
    tail = jnp.log1p(-jnp.minimum(jnp.sum(jnp.exp(kept), -1), 1 - 1e-6))
    teacher = topk.logprobs[:, 1:]
    rest = jnp.maximum(1 - jnp.sum(jnp.exp(teacher), -1), 1e-7)
    loss = jnp.sum(jnp.exp(teacher) * (teacher - kept), -1) + rest * (jnp.log(rest) - tail)
    return jnp.sum(weights[:, 1:] * loss)


def rematerialised(hidden: Array, kernel: Array, weights: Array, topk: TopK, *, chunk: int) -> Array:
    """The same row loss over chunks of tokens, each under `jax.checkpoint`: logits are computed twice."""
    rows = lambda x: jnp.concatenate([x[:, 1:], jnp.zeros_like(x[:, :1])], 1).reshape(-1, chunk, *x.shape[2:])
    kernel = kernel.astype(hidden.dtype)

    @jax.checkpoint
    def body(total: Array, xs: Any) -> tuple[Array, None]:
        h, w, ids, logprobs = xs
        return total + jnp.sum(w * forward_kl(head_of(kernel).logits(h), TopKTarget(ids, logprobs))), None

    xs = (hidden.reshape(-1, chunk, hidden.shape[-1]), rows(weights), rows(topk.ids), rows(topk.logprobs))
    return jax.lax.scan(body, jnp.float32(0), xs)[0]


def lifted(hidden: Array, kernel: Array, weights: Array, topk: TopK, *, chunk: int, loop: Loop) -> Array:
    term = {"kd": RowTerm(loss=forward_kl, target="signals/topk")}
    tokens = jnp.zeros(weights.shape, jnp.int32)
    return lift_sum({"student/main": (hidden, head_of(kernel))}, term, {"kd": weights}, tokens=tokens,
                    signals={"topk": topk}, chunk=chunk, loop=loop)[0]


def compiled_temporaries(sides: dict[str, Callable[..., Array]], args: argparse.Namespace) -> dict[str, dict]:
    """Peak temporaries of each side, compiled for the GPU described by the file `args.target`."""
    from jax.experimental import topologies

    with open(args.target) as f:
        gpu = topologies.get_topology_desc("gpu", "cuda", topology="1x1x1", target_config=f.read())
    mesh = jax.sharding.Mesh(np.array(gpu.devices).reshape(1), ("x",))
    here = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    like = lambda dtype, *shape: jax.ShapeDtypeStruct(shape, dtype, sharding=here)
    B, T = args.rows, args.tokens // args.rows
    data = (like(jnp.dtype(args.dtype), B, T, args.width), like(jnp.float32, args.vocab, args.width),
            like(jnp.float32, B, T), TopK(ids=like(jnp.int32, B, T, args.k), logprobs=like(jnp.float32, B, T, args.k),
                                          mask=like(jnp.bool_, B, T)))
    out = {}
    for name, fn in sides.items():
        memory = jax.jit(jax.value_and_grad(fn, argnums=(0, 1))).lower(*data).compile().memory_analysis()
        out[name] = {"temp_gb": memory.temp_size_in_bytes / 1e9, "output_gb": memory.output_size_in_bytes / 1e9}
        print(f"{name:15s} temporaries {out[name]['temp_gb']:6.2f} GB, gradients returned "
              f"{out[name]['output_gb']:.2f} GB", flush=True)
    return out


def inputs(args: argparse.Namespace) -> tuple[Array, Array, Array, TopK]:
    rng = np.random.default_rng(0)
    shape = (args.rows, args.tokens // args.rows)
    hidden = jnp.asarray(rng.normal(size=(*shape, args.width)), args.dtype)
    kernel = jnp.asarray(rng.standard_normal((args.vocab, args.width), np.float32) * (2 / args.width**0.5))
    real = args.vocab - 271
    ids = rng.integers(0, real // args.k, (*shape, args.k)) + np.arange(args.k) * (real // args.k)
    logits = np.sort(rng.normal(size=(*shape, args.k + 1)) * 3)[..., ::-1]
    logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    topk = TopK(ids=jnp.asarray(ids, jnp.int32), logprobs=jnp.asarray(logp[..., :-1], jnp.float32),
                mask=jnp.ones(shape, bool))
    weights = (rng.random(shape) < args.supervised) / args.tokens
    return hidden, kernel, jnp.asarray(weights, jnp.float32), topk


def measure(fn: Callable[..., Array], data: Any, repeats: int) -> tuple[dict[str, float], Any]:
    """Best wall-clock and CPU seconds (of all threads) of `repeats` runs, compiled temporaries, and the result."""
    compiled = jax.jit(jax.value_and_grad(fn, argnums=(0, 1))).lower(*data).compile()
    wall, cpu = [], []
    for _ in range(repeats):
        out = None  # two results at once would not fit
        start = time.perf_counter(), time.process_time()
        out = jax.block_until_ready(compiled(*data))
        wall.append(time.perf_counter() - start[0])
        cpu.append(time.process_time() - start[1])
    return {"seconds": min(wall), "cpu_seconds": min(cpu), "all_seconds": wall,
            "temp_gb": compiled.memory_analysis().temp_size_in_bytes / 1e9}, jax.tree.map(np.asarray, out)


def difference(a: Any, b: Any) -> float:
    """Largest relative difference over value, hidden gradient and head gradient."""
    return max(float(np.linalg.norm(np.ravel(x) - np.ravel(y)) / np.linalg.norm(np.ravel(y)))
               for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--vocab", type=int, default=151_936)
    p.add_argument("--width", type=int, default=896)
    p.add_argument("--tokens", type=int, default=4_096)
    p.add_argument("--rows", type=int, default=2)
    p.add_argument("--k", type=int, default=64)
    p.add_argument("--chunk", type=int, default=CHUNK)
    p.add_argument("--dtype", default="float32")
    p.add_argument("--supervised", type=float, default=1.0, help="share of tokens with a weight")
    p.add_argument("--repeats", type=int, default=2)
    p.add_argument("--only", nargs="*", default=None, help="naive, rematerialised, lifted, vocabulary")
    p.add_argument("--small", action="store_true")
    p.add_argument("--row-losses", action="store_true", help="every row loss against cross-entropy (row_losses.py); "
                   "--only takes their names")
    p.add_argument("--target", default=None, help="text proto of a GPU to compile for: memory only, nothing runs")
    p.add_argument("--out", default=None, help="write the result as JSON")
    args = p.parse_args()
    if args.small:
        args.vocab, args.width, args.tokens, args.k, args.chunk = 4_096, 64, 512, 16, 64
    if args.row_losses:
        from benchmarks.row_losses import compare

        compare(args)
        return
    sides = {"naive": naive, "rematerialised": partial(rematerialised, chunk=args.chunk),
             "lifted": partial(lifted, chunk=args.chunk, loop="tokens"),
             "vocabulary": partial(lifted, chunk=args.chunk, loop="vocabulary")}
    sides = {n: f for n, f in sides.items() if n in (args.only or sides)}
    config = {k: v for k, v in vars(args).items() if k not in ("out", "only", "target")}
    machine = f"{jax.devices()[0].device_kind}, {platform.machine()}, {os.cpu_count()} cores"
    device = os.path.basename(args.target) if args.target else machine
    print(f"jax {jax.__version__} on {device}; {config}")
    results = compiled_temporaries(sides, args) if args.target else run(sides, args)
    if args.out:
        with open(args.out, "w") as f:
            json.dump({"jax": jax.__version__, "device": device, "config": config, "results": results}, f, indent=1)


def run(sides: dict[str, Callable[..., Array]], args: argparse.Namespace) -> dict[str, dict]:
    """Measure the sides one after another, each against the first."""
    data, results, first = inputs(args), {}, None
    for name, fn in sides.items():
        results[name], out = measure(fn, data, args.repeats)
        first = out if first is None else first
        results[name] |= {"difference": difference(out, first)}
        r, base = results[name], next(iter(results.values()))
        print(f"{name:15s} {r['seconds']:8.2f} s ({r['seconds'] / base['seconds']:.2f}x)   CPU "
              f"{r['cpu_seconds']:8.2f} s ({r['cpu_seconds'] / base['cpu_seconds']:.2f}x)   temporaries "
              f"{r['temp_gb']:6.2f} GB ({r['temp_gb'] / base['temp_gb']:.3f}x)   difference {r['difference']:.1e}",
              flush=True)
    return results


if __name__ == "__main__":
    main()
