"""A KD step of one Qwen2 student: ours, and tunix's `DistillationTrainer` with its `LogitStrategy`, in one run.

Half forward KL on the whole vocabulary against a live teacher of the same shape (temperature 1), half cross-entropy;
the same weights, batches, precision, clipping and AdamW; full rows. Both sides are JAX on the same device, so what
differs is the program: tunix makes the teacher's logits in one call and the student's in another, [B,T,V] in float32
with one-hot labels of the same size; ours makes a chunk of both inside the loss. Steps alternate; losses are compared
step by step.

Needs google-tunix (`pip install google-tunix`; it has no part in the project otherwise).

    python -m benchmarks.tunix_step                       # 10M parameters, 8 x 256 tokens, float32 and bfloat16
    python -m benchmarks.tunix_step --size 100m --rows 2
"""

import argparse
import json
import os
import platform
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks import peers
from distill_jax.losses.rows.cross_entropy import cross_entropy
from distill_jax.losses.rows.divergences import forward_kl
from distill_jax.models import hf
from distill_jax.models.transformer import Transformer, init_params
from distill_jax.objective.term import Term

TERMS = {"kl": Term(forward_kl, target="teacher/main", weight=0.5), "ce": Term(cross_entropy, weight=0.5)}


def tunix(folders: tuple[Path, Path], size: str, precision: str) -> peers.Step:
    """tunix's own model, trainer and strategy, called as its training loop calls them."""
    import tunix.distillation.distillation_trainer as trainers  # pyright: ignore[reportMissingImports]
    import tunix.distillation.strategies as strategies  # pyright: ignore[reportMissingImports]
    from tunix.models.qwen2 import model as qwen2  # pyright: ignore[reportMissingImports]
    from tunix.models.qwen2.params import create_model_from_safe_tensors  # pyright: ignore[reportMissingImports]

    c, dtype = peers.config_of(size), jnp.dtype(precision)
    make = lambda kept: qwen2.ModelConfig(
        num_layers=c.num_layers, vocab_size=c.vocab_size, embed_dim=c.hidden_size, hidden_dim=c.mlp_size,
        num_heads=c.num_heads, head_dim=c.head_dim, num_kv_heads=c.num_kv_heads, rope_theta=int(c.attention.rope.theta),
        norm_eps=c.norm_eps, use_tied_embedding=c.tied, dtype=dtype, param_dtype=kept)
    load = lambda folder, kept: create_model_from_safe_tensors(str(folder), make(kept), dtype=kept)

    def logits(model: Any, input_tokens: Any, input_mask: Any) -> Any:
        length = input_tokens.shape[1]
        where = jnp.broadcast_to(jnp.arange(length), input_tokens.shape)
        causal = jnp.broadcast_to(jnp.tril(jnp.ones((length, length), bool)), (*input_tokens.shape, length))
        return model(input_tokens, where, None, causal)[0][:, :-1]

    strategy = strategies.LogitStrategy(
        logits, logits, lambda input_tokens, input_mask: jax.nn.one_hot(input_tokens[:, 1:], c.vocab_size),
        temperature=1.0, alpha=0.5)
    optimizer = optax.chain(optax.clip_by_global_norm(peers.CLIP),
                            optax.adamw(peers.LR, *peers.BETAS, eps=peers.EPS, weight_decay=0.0))
    trainer = trainers.DistillationTrainer(
        load(folders[0], jnp.float32), load(folders[1], dtype), strategy, optimizer,
        trainers.TrainingConfig(eval_every_n_steps=10**9, max_steps=10**9))
    step, _ = trainer.jit_train_and_eval_step()

    def run(tokens: np.ndarray) -> float:
        batch = trainers.TrainingInput(input_tokens=jnp.asarray(tokens), input_mask=jnp.ones(tokens.shape, bool))
        return float(step(trainer._prepare_inputs(batch))[0])

    return run


def compare(size: str, precision: Any, rows: int, length: int, steps: int) -> dict[str, Any]:
    """One comparison from random weights: student and teacher of `size`, differing by their seeds."""
    config = peers.config_of(size)
    with TemporaryDirectory() as scratch:
        folders = (Path(scratch) / "student", Path(scratch) / "teacher")
        for seed, folder in enumerate(folders):
            model = Transformer(config)
            hf.save(folder, model, init_params(model, jax.random.key(seed)))
        case = peers.Case(method="kd", precision=precision, folders=folders)
        sides = {"tunix": tunix(folders, size, precision), "ours": peers.ours(case, TERMS)}
        result = peers.measure(sides, config.vocab_size, rows, length, steps)
    return {"size": size, "parameters": config.num_params, "precision": precision} | result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=peers.SIZES, default="10m")
    parser.add_argument("--precisions", nargs="+", choices=["float32", "bfloat16"], default=["float32", "bfloat16"])
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--steps", type=int, default=5)
    args = parser.parse_args()
    import importlib.metadata

    print(json.dumps({"machine": {
        "jax": jax.__version__, "tunix": importlib.metadata.version("google-tunix"),
        "device": jax.devices()[0].device_kind, "processor": platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0))}}), flush=True)
    one = partial(compare, args.size, rows=args.rows, length=args.length, steps=args.steps)
    for precision in args.precisions:
        print(json.dumps(one(precision), indent=1), flush=True)


if __name__ == "__main__":
    main()
