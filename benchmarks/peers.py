"""A training step of one Qwen2 student: ours, and what others do with transformers + torch, in one run.

Cross-entropy, and KD by the generalised Jensen-Shannon divergence (beta 1/2) against a live teacher of the same shape,
each in float32 and in bfloat16 over float32 parameters. Forward, backward, clipping by global norm and AdamW, full
rows, the same weights and batches on all sides; losses are compared step by step. Steps alternate, so that a busy
machine slows all; ratios are of the medians, of the time on the clock and of the processor time (which other programs
disturb less; pin the run to one core with `taskset -c 0` where threads would wait for each other).

    torch     eager: transformers' model, `torch.nn.functional.cross_entropy`; KD with TRL's own
              `GKDTrainer.generalized_jsd_loss` where TRL is installed, else not run
    compiled  the same model under `torch.compile` (--compile; wants a C++ compiler)

Needs torch (`make parity` installs it).

    python -m benchmarks.peers                            # 10M parameters, 8 x 256 tokens, all four
    python -m benchmarks.peers --size 100m --rows 4
    python -m benchmarks.peers --size small --steps 3     # seconds: does it run and agree
"""

import argparse
import importlib.util
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from distill_jax.core.batch import Batch, Stream
from distill_jax.core.roles import ANSWER
from distill_jax.losses.rows.cross_entropy import cross_entropy
from distill_jax.losses.rows.divergences import generalized_jsd
from distill_jax.models import hf
from distill_jax.models.config import AttentionConfig, ModelConfig
from distill_jax.models.transformer import Transformer, init_params
from distill_jax.objective.term import Term, build_objective
from distill_jax.sharding import make_mesh
from distill_jax.train.optim import AdamW
from distill_jax.train.state import create_state
from distill_jax.train.step import StepConfig, make_step

LR, BETAS, EPS, CLIP = 1e-3, (0.9, 0.95), 1e-8, 1.0
WARM = 2
"""Steps before the clock runs: compilation, first allocations."""
Step = Callable[[np.ndarray], float]
Method = Literal["ce", "kd"]

SIZES: dict[str, tuple[int, int, int, int]] = {  # vocabulary, width, layers, MLP
    "small": (512, 64, 2, 128),  # 0.2M
    "10m": (16384, 256, 6, 1024),  # 10.1M, of which 4.2M embedding
    "100m": (32768, 768, 10, 3072),  # 110M, of which 25M embedding
}


@dataclass(frozen=True, kw_only=True)
class Case:
    """What one comparison is about. folders: the student's and the teacher's weights, Hugging Face layout."""

    method: Method
    precision: Literal["float32", "bfloat16"]
    folders: tuple[Path, Path]


def config_of(size: str) -> ModelConfig:
    """Qwen2 with heads of 32 (small) or 64."""
    vocab, width, layers, mlp = SIZES[size]
    head = 32 if width <= 256 else 64
    return ModelConfig(vocab_size=vocab, hidden_size=width, mlp_size=mlp, num_layers=layers, num_heads=width // head,
                       num_kv_heads=max(1, width // head // 2), head_dim=head, attention=AttentionConfig(qkv_bias=True))


def ours(case: Case, terms: Mapping[str, Term] | None = None) -> Step:
    """The trainer's own step, through the lifted loss. terms: another objective than the method's."""
    mesh = make_mesh(devices=jax.devices()[:1])
    optim = AdamW(peak_lr=LR, warmup=0, decay="constant", b1=BETAS[0], b2=BETAS[1], eps=EPS, grad_clip=CLIP)
    kd = Term(generalized_jsd, target="teacher/main", kwargs={"beta": 0.5})
    objective = build_objective(terms or {"loss": Term(cross_entropy) if case.method == "ce" else kd})
    (model, params), (teacher, frozen) = (hf.load(folder) for folder in case.folders)
    dtype = jnp.dtype(case.precision)
    models = {"student": model.clone(dtype=dtype)}
    if case.method == "kd":
        models["teacher"] = teacher.clone(dtype=dtype)
    optimizers = {"student": optim.build(1000)}
    config = StepConfig(objective=objective, models=models, mesh=mesh, optimizers=optimizers)
    state = create_state({"student": params}, optimizers, mesh=mesh, controllers=objective.init())
    fixed = {} if case.method == "ce" else {"teacher": jax.tree.map(lambda x: x.astype(dtype), frozen)}
    step = make_step(config, state)

    def run(tokens: np.ndarray) -> float:
        nonlocal state
        state, metrics = step(state, fixed, batch_of(tokens))
        return float(metrics["loss"])

    return run


def batch_of(tokens: np.ndarray) -> Batch:
    """Full rows [B,T], supervised everywhere but at the first token."""
    rows, length = tokens.shape
    weights = np.ones((rows, length), np.float32)
    weights[:, 0] = 0.0
    one = np.ones_like(tokens)
    return Batch(views={"main": Stream(
        tokens=tokens, positions=np.broadcast_to(np.arange(length, dtype=np.int32), tokens.shape).copy(),
        segment_ids=one, roles=one * int(ANSWER), step_ids=one * 0, weights=weights, row_ids=one * 0)})


def theirs(case: Case, compiled: bool = False) -> Step:
    """transformers' model with torch's AdamW, as a training loop would call them; bfloat16 by autocast."""
    import torch
    import transformers

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    load = partial(transformers.AutoModelForCausalLM.from_pretrained, dtype=torch.float32)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, half = load(case.folders[0]).train().to(device), case.precision == "bfloat16"
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, betas=BETAS, eps=EPS, weight_decay=0.0)
    teacher: Any = None
    if case.method == "kd":
        teacher = load(case.folders[1]).eval().to(device)
        teacher = teacher.to(torch.bfloat16) if half else teacher
        teacher = torch.compile(teacher) if compiled else teacher
    forward: Any = torch.compile(model) if compiled else model

    def loss_of(ids: Any) -> Any:
        logits = forward(ids).logits[:, :-1]
        if teacher is None:
            return torch.nn.functional.cross_entropy(logits.reshape(-1, logits.shape[-1]).float(),
                                                     ids[:, 1:].reshape(-1))
        with torch.no_grad():
            target = teacher(ids).logits[:, :-1]
        return gkd_loss()(logits.float(), target.float(), labels=ids[:, 1:], beta=0.5)

    def run(tokens: np.ndarray) -> float:
        ids = torch.from_numpy(tokens).long().to(device)
        with torch.autocast(device, dtype=torch.bfloat16, enabled=half):
            loss = loss_of(ids)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return run


def gkd_loss() -> Any:
    """TRL's loss as TRL wrote it."""
    from trl.experimental.gkd.gkd_trainer import GKDTrainer  # pyright: ignore[reportMissingImports]

    return GKDTrainer.generalized_jsd_loss


def sides_of(case: Case, compile_too: bool) -> dict[str, Step]:
    """{side: its step}; a side that cannot be run here is left out, and said on stderr."""
    if case.method == "kd" and importlib.util.find_spec("trl") is None:
        print("kd: TRL is not installed (pip install trl): ours alone", file=sys.stderr)
        return {"ours": ours(case)}
    return {"torch": theirs(case), "ours": ours(case)} | ({"compiled": theirs(case, True)} if compile_too else {})


def timed(step: Step, tokens: np.ndarray) -> tuple[float, tuple[float, float]]:
    """The loss, and (seconds on the clock, processor seconds)."""
    clock, processor = time.perf_counter(), time.process_time()
    loss = step(tokens)
    return loss, (time.perf_counter() - clock, time.process_time() - processor)


def measure(sides: dict[str, Step], vocab: int, rows: int, length: int, steps: int) -> dict[str, Any]:
    """Seconds a step on all sides, the ratios of ours to each, and how far the losses are apart."""
    rng = np.random.default_rng(0)
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
    gaps = [0.0]
    for i in range(steps + WARM):
        tokens = rng.zipf(1.3, (rows, length)).clip(1, vocab - 1).astype(np.int32)
        losses = {}
        for name, step in sides.items():
            losses[name], elapsed = timed(step, tokens)
            if i >= WARM:
                seconds[name].append(elapsed)
        gaps += [abs(losses["ours"] - x) / abs(x) for name, x in losses.items() if name != "ours"]
    clock, processor = ({name: statistics.median(x[i] for x in s) for name, s in seconds.items()} for i in (0, 1))
    ratios = lambda of: {f"ours/{name}": of["ours"] / s for name, s in of.items() if name != "ours"}
    return {"rows": rows, "length": length, "steps": steps, "seconds": clock, "processor_seconds": processor,
            "ratio": ratios(clock), "processor_ratio": ratios(processor),
            "tokens_per_second": {name: rows * length / s for name, s in clock.items()},
            "largest_relative_loss_gap": max(gaps)}


def compare(size: str, method: Method, precision: Any, rows: int, length: int, steps: int,
            compile_too: bool = False) -> dict[str, Any]:
    """One comparison from random weights: student and teacher of `size`, differing by their seeds."""
    config = config_of(size)
    with TemporaryDirectory() as scratch:
        folders = tuple(Path(scratch) / name for name in ("student", "teacher"))
        for seed, folder in enumerate(folders):
            model = Transformer(config)
            hf.save(folder, model, init_params(model, jax.random.key(seed)))
        case = Case(method=method, precision=precision, folders=(folders[0], folders[1]))
        result = measure(sides_of(case, compile_too), config.vocab_size, rows, length, steps)
    return {"size": size, "parameters": config.num_params, "method": method, "precision": precision} | result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=SIZES, default="10m")
    parser.add_argument("--methods", nargs="+", choices=["ce", "kd"], default=["ce", "kd"])
    parser.add_argument("--precisions", nargs="+", choices=["float32", "bfloat16"], default=["float32", "bfloat16"])
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--compile", action="store_true", help="torch.compile as a third side")
    args = parser.parse_args()
    import torch
    import transformers

    machine = {"jax": jax.__version__, "torch": torch.__version__, "transformers": transformers.__version__,
               "device": jax.devices()[0].device_kind, "processor": platform.processor() or platform.machine(),
               "cores": len(os.sched_getaffinity(0))}
    print(json.dumps({"machine": machine}), flush=True)
    for precision in args.precisions:
        for method in args.methods:
            print(json.dumps(compare(args.size, method, precision, args.rows, args.length, args.steps, args.compile),
                             indent=1), flush=True)


if __name__ == "__main__":
    main()
