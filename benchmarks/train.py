"""Training steps of the usual shapes from random weights: tokens/s, MFU and peak memory; or, compiled for a device that
is not there, memory alone.

Packed full rows, AdamW with float32 masters, bfloat16 compute, V = 152k; cross-entropy and top-64 KD. FLOPs are the
model's, causal, recomputation not counted.

    python -m benchmarks.train                                   # what fits this device: 0.5B and 1.5B, CE and KD, 4k
    python -m benchmarks.train --sizes tiny --rows 8 --length 128 --steps 3     # a CPU: does it run
    JAX_PLATFORMS=cpu python -m benchmarks.train --on compile:h200              # bytes; needs jax-cuda13-plugin, no GPU
"""

import argparse
import json
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.shapes import SHAPES, step_recipe
from distill_jax.core.batch import Batch, Stream, TopK
from distill_jax.core.roles import ANSWER
from distill_jax.jobs.compiled import compile_step
from distill_jax.jobs.hardware import parse
from distill_jax.jobs.train import step_config
from distill_jax.models.transformer import Transformer, init_params
from distill_jax.recipe import Recipe, Stage
from distill_jax.sharding import make_mesh
from distill_jax.train.feed import place_global
from distill_jax.train.flops import memory_bytes, peak_flops
from distill_jax.train.state import create_state
from distill_jax.train.step import make_step

K = 64


def batch_of(stage: Stage, vocab: int) -> Batch:
    """Full rows of random tokens in documents of a quarter of the row, with top-64 signals where the stage has them."""
    rows, length = stage.source.rows, stage.source.seq_len
    rng = np.random.default_rng(0)
    documents = np.broadcast_to(np.arange(length) // max(1, length // 4) + 1, (rows, length)).astype(np.int32)
    starts = np.diff(documents, axis=1, prepend=0) != 0
    positions = np.arange(length) - np.maximum.accumulate(np.where(starts, np.arange(length), 0), axis=1)
    one = np.ones((rows, length), np.int32)
    stream = Stream(tokens=rng.integers(1, vocab, (rows, length), np.int32), positions=positions.astype(np.int32),
                    segment_ids=documents, roles=one * int(ANSWER), step_ids=one * 0, row_ids=one * 0,
                    weights=np.where(starts, 0.0, 1.0).astype(np.float32))
    if not stage.source.signals:
        return Batch(views={"main": stream})
    ids = rng.integers(1, vocab, (rows, length, K), np.int32)
    logprobs = np.broadcast_to(np.log(np.full(K, 0.9 / K, np.float32)), ids.shape).copy()
    return Batch(views={"main": stream}, signals={"topk64": TopK(ids=ids, logprobs=logprobs, mask=~starts)})


def measure(recipe: Recipe, stage: Stage, size: str, steps: int) -> dict[str, Any]:
    """Medians over `steps` after two for compilation. peak_gb: of this process so far, None on a CPU."""
    config, mesh = SHAPES[size], make_mesh(devices=None, **recipe.mesh.sizes)
    [provider] = stage.models.values()
    model = Transformer(config, dtype=jnp.dtype(provider.precision), remat=provider.remat,
                        attention=provider.attention, matmul=provider.matmul)
    built = step_config(stage, {"student": model}, mesh)
    params = {"student": init_params(model, jax.random.key(0), mesh=mesh)}
    state = create_state(params, built.optimizers, mesh=mesh, controllers=built.objective.init())
    step, batch = make_step(built, state), place_global(batch_of(stage, config.vocab_size), mesh)
    seconds = []
    for _ in range(steps + 2):
        began = time.perf_counter()
        state, metrics = step(state, {}, batch)
        jax.block_until_ready(metrics["loss"])
        seconds.append(time.perf_counter() - began)
    took, tokens = statistics.median(seconds[2:]), stage.source.rows * stage.source.seq_len
    peak, held = peak_flops(jax.devices()[0]), memory_bytes()
    flops = float(metrics["flops"])
    return {"seconds": took, "tokens_per_second": tokens / took, "loss": float(metrics["loss"]),
            "mfu": None if peak is None else flops / took / (peak * mesh.size),
            "peak_gb": None if held is None else held / 1e9}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--on", default="", help="compile:h200, compile:v6e:4 ...: memory only")
    parser.add_argument("--sizes", nargs="+", choices=SHAPES, default=["0.5B", "1.5B"])
    parser.add_argument("--losses", nargs="+", choices=["ce", "kd"], default=["ce", "kd"])
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--remat", nargs="+", default=["dots"])
    parser.add_argument("--micro-batches", type=int, default=1)
    parser.add_argument("--steps", type=int, default=10)
    args = parser.parse_args()
    target = parse(args.on.removeprefix("compile:")) if args.on else None
    print(json.dumps({"jax": jax.__version__, "device": target.text if target else jax.devices()[0].device_kind,
                      "devices": target.count if target else jax.device_count(),
                      "what": "compiled, not run" if target else "run"}), flush=True)
    for size in args.sizes:
        for remat in args.remat:
            for loss in args.losses:
                recipe = step_recipe(size, loss, rows=args.rows, length=args.length, remat=remat,
                                     micro_batches=args.micro_batches)
                [stage] = recipe.stages
                assert isinstance(stage, Stage)
                row = {"size": size, "loss_kind": loss, "rows": args.rows, "length": args.length, "remat": remat,
                       "micro_batches": args.micro_batches}
                if target is None:
                    row |= measure(recipe, stage, size, args.steps)
                else:
                    found = compile_step(recipe, stage, target, {"student": SHAPES[size]})
                    row |= {"peak_gb": found.peak / 1e9, "temporary_gb": found.temporary / 1e9,
                            "sent_gb": found.sent / 1e9}
                print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
