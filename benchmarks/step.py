"""A training step of one small Qwen2 model on the CPU: ours, and transformers + torch, in one run.

Forward, backward, clipping by global norm and AdamW, cross-entropy on full rows, float32, the same weights and batches
on both sides; the losses are compared step by step. Steps alternate, so that a busy machine slows both; the ratios are
of the medians, of the time on the clock and of the processor time (which other programs disturb less; pin the run to
one core with `taskset -c 0` where threads would wait for each other). Needs torch (`make parity` installs it).

    python -m benchmarks.step                   # 10M parameters, 8 x 256 tokens
    python -m benchmarks.step --small           # seconds: does it run and agree
"""

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import jax
import numpy as np

from distill_jax.core.batch import Batch, Stream
from distill_jax.core.roles import ANSWER
from distill_jax.losses.rows.cross_entropy import cross_entropy
from distill_jax.models import hf
from distill_jax.models.config import AttentionConfig, ModelConfig
from distill_jax.models.transformer import Transformer, init_params
from distill_jax.objective.term import Term, build_objective
from distill_jax.sharding import make_mesh
from distill_jax.train.optim import AdamW
from distill_jax.train.state import create_state
from distill_jax.train.step import StepConfig, make_step

LR, BETAS, EPS, CLIP = 1e-3, (0.9, 0.95), 1e-8, 1.0
Step = Callable[[np.ndarray], float]


def config_of(small: bool) -> ModelConfig:
    """10.1M parameters, of which 4.2M embedding; small: 0.2M."""
    sizes = (512, 64, 2, 128) if small else (16384, 256, 6, 1024)
    vocab, width, layers, mlp = sizes
    return ModelConfig(vocab_size=vocab, hidden_size=width, mlp_size=mlp, num_layers=layers, num_heads=width // 32,
                       num_kv_heads=width // 64, head_dim=32, attention=AttentionConfig(qkv_bias=True))


def ours(model: Transformer, params: Any) -> Step:
    """The trainer's own step, through the lifted cross-entropy."""
    mesh = make_mesh(devices=jax.devices()[:1])
    optim = AdamW(peak_lr=LR, warmup=0, decay="constant", b1=BETAS[0], b2=BETAS[1], eps=EPS, grad_clip=CLIP)
    objective = build_objective({"ce": Term(cross_entropy)})
    optimizers = {"student": optim.build(1000)}
    config = StepConfig(objective=objective, models={"student": model}, mesh=mesh, optimizers=optimizers)
    state = create_state({"student": params}, optimizers, mesh=mesh, controllers=objective.init())
    step = make_step(config, state)

    def run(tokens: np.ndarray) -> float:
        nonlocal state
        state, metrics = step(state, {}, batch_of(tokens))
        return float(metrics["loss"])

    return run


def batch_of(tokens: np.ndarray) -> Batch:
    rows, length = tokens.shape
    weights = np.ones((rows, length), np.float32)
    weights[:, 0] = 0.0
    one = np.ones_like(tokens)
    return Batch(views={"main": Stream(
        tokens=tokens, positions=np.broadcast_to(np.arange(length, dtype=np.int32), tokens.shape).copy(),
        segment_ids=one, roles=one * int(ANSWER), step_ids=one * 0, weights=weights, row_ids=one * 0)})


def theirs(folder: Path) -> Step:
    """transformers' model with torch's AdamW, as a training loop would call them."""
    import torch
    import transformers

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, betas=BETAS, eps=EPS, weight_decay=0.0)

    def run(tokens: np.ndarray) -> float:
        ids = torch.from_numpy(tokens).long()
        logits = model(ids).logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(logits.reshape(-1, logits.shape[-1]), ids[:, 1:].reshape(-1))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return run


def timed(step: Step, tokens: np.ndarray) -> tuple[float, tuple[float, float]]:
    """The loss, and (seconds on the clock, processor seconds)."""
    clock, processor = time.perf_counter(), time.process_time()
    loss = step(tokens)
    return loss, (time.perf_counter() - clock, time.process_time() - processor)


def measure(config: ModelConfig, rows: int, length: int, steps: int) -> dict[str, Any]:
    """Seconds a step on both sides, their ratios, and how far the losses are apart."""
    model = Transformer(config)
    params = init_params(model, jax.random.key(0))
    with TemporaryDirectory() as scratch:
        hf.save(Path(scratch) / "m", model, params)
        sides = {"torch": theirs(Path(scratch) / "m"), "ours": ours(model, params)}
    rng = np.random.default_rng(0)
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
    gaps = []
    for i in range(steps + 2):
        tokens = rng.zipf(1.3, (rows, length)).clip(1, config.vocab_size - 1).astype(np.int32)
        losses = {}
        for name, step in sides.items():
            losses[name], elapsed = timed(step, tokens)
            if i >= 2:  # compilation, first allocations
                seconds[name].append(elapsed)
        gaps.append(abs(losses["ours"] - losses["torch"]) / losses["torch"])
    clock, processor = ({name: statistics.median(x[i] for x in s) for name, s in seconds.items()} for i in (0, 1))
    return {"parameters": config.num_params, "rows": rows, "length": length, "steps": steps,
            "seconds": clock, "processor_seconds": processor, "ratio_ours_to_torch": clock["ours"] / clock["torch"],
            "processor_ratio_ours_to_torch": processor["ours"] / processor["torch"],
            "tokens_per_second_ours": rows * length / clock["ours"], "largest_relative_loss_gap": max(gaps)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--steps", type=int, default=10)
    args = parser.parse_args()
    rows, length, steps = (2, 32, 3) if args.small else (args.rows, args.length, args.steps)
    import torch
    import transformers

    machine = {"jax": jax.__version__, "torch": torch.__version__, "transformers": transformers.__version__,
               "processor": platform.processor() or platform.machine(), "cores": len(os.sched_getaffinity(0))}
    print(json.dumps({"machine": machine, "result": measure(config_of(args.small), rows, length, steps)}, indent=1))


if __name__ == "__main__":
    main()
