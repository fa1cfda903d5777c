"""Loss curves of a student whose layers multiply in 8 bits (`Student(matmul=...)`) against bfloat16, generated world.

    python -m benchmarks.quantized out/                            # six students of 1M parameters, one seed
    python -m benchmarks.quantized out/ --modes full int8 --seeds 3
    python -m benchmarks.quantized /tmp/x --small                  # a minute: does it run; its numbers mean nothing

All students have the same initial parameters, and see the same batches: lessons of looking things up, then traces with
thinking. `float32` is the yardstick: what another rounding of everything makes of the same run. Held-out loss is taken
twice: multiplying as in training, and in bfloat16, which is how the exported model is used. Computed on a CPU the times
say nothing about 8 bits. One cell (mode, seed) at a time, each in its own process; started again, it goes on.
"""

import argparse
import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

from benchmarks.world_cells import Bench, World, machine, run_cells, today
from configs.quickstart import MODEL
from distill_jax.core.batch import Batch
from distill_jax.core.roles import SUPERVISED
from distill_jax.data.source_specs import Phases, Store
from distill_jax.data.sources import open_source
from distill_jax.data.tokenizer import load_tokenizer
from distill_jax.jobs.quickstart import build_world
from distill_jax.jobs.run_recipe import run_recipe
from distill_jax.loading import load
from distill_jax.losses.rows.cross_entropy import cross_entropy
from distill_jax.models.quantized import MATMULS
from distill_jax.objective.term import Term
from distill_jax.recipe import Call, Recipe, Saving, Stage, Student
from distill_jax.train.optim import AdamW

MODES = ("full", "int8", "int8_dx", "fp8", "fp8_dx", "float32")
COLORS: Mapping[str, str] = dict(zip(MODES, ("#1d3557", "#00798c", "#66a182", "#edae49", "#d1495b", "#9aa0a6")))
LESSONS, TRACES = (70, 50, 40, 60), 80
"""Updates with each lesson, and with the traces: 300 in all."""
BIG = dataclasses.replace(
    MODEL, hidden_size=128, mlp_size=512, num_layers=4, num_heads=4, num_kv_heads=4, head_dim=32, init_std=0.07,
    attention=dataclasses.replace(MODEL.attention, sliding=(True, False, False, False)))
BATCHES, TAIL = 16, 20


def student_of(mode: str, **where: Any) -> Student:
    """mode: a name in `MATMULS`, computing in bfloat16; or "float32"."""
    if mode == "float32":
        return Student(precision="float32", **where)
    return Student(precision="bfloat16", matmul=mode, **where)  # type: ignore[arg-type]


def recipe_of(folder: Path, name: str, seed: int, small: bool) -> Recipe:
    """Lessons, then traces, in one stage."""
    lessons, traces = ((2, 2, 2, 2), 4) if small else (LESSONS, TRACES)
    sources = (*(_store(folder, f"lesson{i}") for i in range(len(lessons))), _traces(folder))
    return Recipe(name=f"{name}-{seed}", runs=str(folder / "cells"), seed=seed, stages=(Stage(
        source=Phases(sources=sources, steps=lessons), steps=sum(lessons) + traces,
        terms={"ce": Term(loss=cross_entropy)},
        providers={"student": student_of(name, config=MODEL if small else BIG,
                                         tokenizer=str(folder / "world/tokenizer"))},
        optim=AdamW(peak_lr=2e-3, warmup=20, b2=0.98), log_every=1, saving=Saving(steps=200, keep=1)),))


def _store(folder: Path, name: str, **more: Any) -> Store:
    return Store(path=str(folder / "world" / name), rows=32, seq_len=48, pack=False, **more)


def _traces(folder: Path, **more: Any) -> Store:
    return _store(folder, "teacher", holdout=0.1, **more)


def make_world(folder: Path) -> None:
    """Tokenizer, lessons and traces, once."""
    rows = {"lesson_rows": (6400, 4800, 4800, 9600), "teacher_rows": 8000, "questions": 64}
    made = Call(name="world", fn=build_world, kwargs=rows)
    if not run_recipe(Recipe(name="world", runs=str(folder), stages=(made,))):
        raise SystemExit("stopped; the same command goes on")


def run_cell(folder: Path, name: str, seed: int, small: bool) -> dict[str, Any]:
    recipe = recipe_of(folder, name, seed, small)
    if not run_recipe(recipe):
        raise SystemExit("stopped; the same command goes on")
    lines = [json.loads(line) for line in (recipe.folder / "metrics/train.jsonl").read_text().splitlines()]
    float32 = name == "float32"
    trained = {"compute": jnp.float32} if float32 else {"compute": jnp.bfloat16, "matmul": name}
    result = {"name": name, "seed": seed, "loss": [round(x["loss"], 5) for x in lines if "loss" in x],
              "heldout": heldout(folder, recipe.folder, 2 if small else BATCHES, **trained),
              "heldout_bf16": heldout(folder, recipe.folder, 2 if small else BATCHES, compute=jnp.bfloat16),
              "seconds_per_step": float(np.median([x["seconds_per_step"] for x in lines if "seconds_per_step" in x]))}
    (recipe.folder / "result.json").write_text(json.dumps(result))
    return result


def heldout(folder: Path, run: Path, batches: int, **how: Any) -> float:
    """Mean cross-entropy, in nats, over the supervised tokens of the first held-out batches of traces."""
    model, params = load(run, **how)
    source = open_source(_traces(folder, split="heldout"), load_tokenizer(folder / "world/tokenizer"), seed=0)

    @jax.jit
    def one(params: Any, batch: Batch) -> tuple[Any, Any]:
        m = batch.main
        logits: Any = model.apply({"params": params}, m.tokens, m.positions, m.segment_ids)
        log = jax.nn.log_softmax(logits)[:, :-1]
        on = jnp.isin(m.roles, jnp.asarray(SUPERVISED, m.roles.dtype)) & (m.weights > 0)
        nll = -jnp.take_along_axis(log, m.tokens[:, 1:, None], axis=-1)[..., 0]
        return jnp.sum(jnp.where(on[:, 1:], nll, 0.0)), jnp.sum(on[:, 1:])

    sums = np.array([jax.device_get(one(params, source.batch(i))) for i in range(batches)], np.float64)
    return float(sums[:, 0].sum() / sums[:, 1].sum())


def write(folder: Path, results: list[dict[str, Any]], wanted: int, small: bool) -> None:
    value = {"machine": machine(), "date": today(), "cells": [len(results), wanted], "lessons": LESSONS,
             "traces": TRACES, "parameters": (MODEL if small else BIG).num_params, "results": results}
    Bench(folder, World()).publish("quantized", value, table(value), plot(results))


def table(value: Mapping[str, Any]) -> str:
    """The report as Markdown; differences to "full" are of the same seeds."""
    done, wanted = value["cells"]
    lines = ["# 8-bit products against bfloat16", ""]
    lines += [f"**Partial: {done} of {wanted} cells.**", ""] if done < wanted else []
    lines += [f"{value['machine']}; {value['date']}. {value['parameters'] / 1e6:.1f}M parameters; updates: "
              f"{sum(value['lessons'])} of lessons, {value['traces']} of traces. Training loss: of the last {TAIL}. "
              "Held out: as in training, and computing in bfloat16.", "",
              "| matmul | seeds | training loss | to full | held out | to full | in bfloat16 | to full |",
              "|---|---|---|---|---|---|---|---|"]
    results = {(x["name"], x["seed"]): x for x in value["results"]}
    for name in dict.fromkeys(n for n, _ in results):
        seeds = [s for n, s in results if n == name]
        cells = [name, str(len(seeds))]
        for key in (lambda x: float(np.mean(x["loss"][-TAIL:])), lambda x: x["heldout"], lambda x: x["heldout_bf16"]):
            mine = {s: key(results[name, s]) for s in seeds}
            gaps = [mine[s] - key(results["full", s]) for s in seeds if ("full", s) in results]
            cells += [f"{np.mean([*mine.values()]):.4f}", f"{np.mean(gaps):+.4f}" if gaps else ""]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def plot(results: list[dict[str, Any]]) -> Figure:
    """Left: loss of each mode, mean over the seeds that all have; right: its difference to "full", mean over the seeds
    that both have. Running means of TAIL updates."""
    figure = Figure(figsize=(9.5, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    smooth = lambda y: np.convolve(y, np.ones(min(TAIL, len(y))) / min(TAIL, len(y)), "valid")
    curves: dict[str, dict[int, np.ndarray]] = {}
    for x in results:
        curves.setdefault(x["name"], {})[x["seed"]] = smooth(x["loss"])
    shared = set.intersection(*(set(seeds) for seeds in curves.values()))
    full = curves.get("full", {})
    for name, of in curves.items():
        style = {"color": COLORS[name], "label": name, "linewidth": 2.2 if name == "full" else 1.3}
        gaps = [of[s] - full[s] for s in of if s in full]
        for panel, lines in ((left, [of[s] for s in of if s in shared]), (right, gaps)):
            if lines:
                panel.plot(np.arange(len(lines[0])) + TAIL, np.mean(lines, axis=0), **style)
    left.set_ylabel(f"training loss, nats (mean of {TAIL} updates)")
    right.set_ylabel("difference to bfloat16 (full)")
    right.axhline(0, color="#9aa0a6", linewidth=0.8, zorder=0)
    left.legend(frameon=False)
    for panel in (left, right):
        panel.set_xlabel("update")
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(color="#e3e5e8")
    return figure


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("out", type=Path)
    p.add_argument("--modes", nargs="*", default=list(MODES), choices=[*MATMULS, "float32"])
    p.add_argument("--seeds", type=int, default=1)
    p.add_argument("--small", action="store_true", help="the quickstart's model, a few updates")
    p.add_argument("--cell", default="", help="MODE:SEED, run here alone (used by the script itself)")
    args = p.parse_args()
    if args.cell:
        name, seed = args.cell.rsplit(":", 1)
        print(json.dumps(run_cell(args.out, name, int(seed), args.small)), flush=True)
        return
    make_world(args.out)
    wanted = [(mode, seed) for seed in range(args.seeds) for mode in args.modes]
    run_cells(args.out, wanted, "benchmarks.quantized", [str(args.out), *(["--small"] if args.small else [])],
              lambda results: write(args.out, results, len(wanted), args.small))


if __name__ == "__main__":
    main()
