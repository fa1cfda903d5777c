"""Objectives compared in the generated world: same teacher, initial parameters, traces and number of updates.

    python -m benchmarks.objectives out/                          # cross-entropy and the six, one seed
    python -m benchmarks.objectives out/ --seeds 3                # goes on from there: two more seeds
    python -m benchmarks.objectives out/ --methods taid taid_ramp --seeds 3
    python -m benchmarks.objectives out/ --world rich             # running text; another folder
    python -m benchmarks.objectives /tmp/x --world smoke          # a minute: does it run; its numbers mean nothing

One cell (method, seed) at a time, each in its own process; started again, it goes on. After every cell OUT's
objectives.json, objectives.md and objectives.png say what is there, and that it is partial where it is. The methods
alone differ: each is one term of weight 1, on the same tokens; `bytes/token` is the signal's on disk (0: the teacher is
live). Peak memory is the process's (the device's where it tells). KL and calibration error (ECE) are of held-out
traces, against the teacher's whole distribution and against the tokens that stand there; intervals are 95%, a bootstrap
over questions.
"""

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

from benchmarks.world_cells import WORLDS, Bench, Cell, machine, run_cells, summaries, today
from distill_jax.decode.sampling import Sampling
from distill_jax.losses.rows.cross_entropy import cross_entropy
from distill_jax.losses.rows.divergences import forward_kl, generalized_jsd, reverse_kl
from distill_jax.losses.rows.first import renormalised_kl
from distill_jax.losses.rows.selective import Selective, uncertain
from distill_jax.losses.rows.taid import taid
from distill_jax.losses.targets import SampledTarget
from distill_jax.objective.controllers import EntropyQuantile, TAIDSchedule
from distill_jax.objective.term import Term
from distill_jax.rollout.on_policy import OnPolicy
from distill_jax.rollout.scoring import SignalSpec

K = 12
"""Outcomes of every signal: kept ones (topk) or draws (sampled), as in 2503.16870, whose claim is about 12."""
BASELINE = "cross_entropy"


def _on_topk(loss: Callable[..., Any], **kwargs: Any) -> Cell:
    return Cell(signal=f"topk:{K}", terms={"kd": Term(loss=loss, target=f"signals/topk{K}", kwargs=kwargs)})


def _taid(steps: int, adaptive: bool) -> Cell:
    return _on_topk(taid, t=TAIDSchedule(steps=steps, start=0.2, adaptive=adaptive))


def _taid_fixed(steps: int) -> Cell:
    """t stays where the schedule starts."""
    return _on_topk(taid, t=0.2)


def _sampled(steps: int) -> Cell:
    """Random-sampling KD. Raises ValueError where this version of the package cannot score or read such a signal."""
    SignalSpec.parse(f"sampled:{K}")
    cross_entropy(jnp.zeros((1, 3)), SampledTarget(ids=jnp.zeros((1, 1), jnp.int32), weights=jnp.ones((1, 1))))
    return Cell(signal=f"sampled:{K}", terms={"kd": Term(loss=cross_entropy, target=f"signals/sampled{K}")})


def _selective(steps: int) -> Cell:
    threshold, target = EntropyQuantile(share=0.5, start=0.1), f"signals/topk{K}"
    return Cell(signal=f"topk:{K}", terms={
        "kd": Term(loss=Selective(loss=forward_kl, share=0.5), target=target, kwargs={"threshold": threshold}),
        "uncertain": Term(loss=uncertain, target=target, weight=0.0, kwargs={"threshold": threshold})})


def _live(loss: Callable[..., Any], share: float, **kwargs: Any) -> Cell:
    """The teacher beside the student, a share of the sequences the student's own: no signal is stored."""
    own = OnPolicy(share=share, every=10, prompts=640, batch_size=640,
                   sampling=Sampling(temperature=1.0, max_new_tokens=34))
    return Cell(terms={"kd": Term(loss=loss, target="teacher/main", kwargs=kwargs)}, on_policy=own)


METHODS: Mapping[str, Callable[[int], Cell]] = {
    BASELINE: lambda steps: Cell(terms={"ce": Term(loss=cross_entropy)}),
    "forward_kl": lambda steps: _on_topk(forward_kl),
    "reverse_kl": lambda steps: _on_topk(reverse_kl),
    "jsd": lambda steps: _on_topk(generalized_jsd, beta=0.5),
    "taid": lambda steps: _taid(steps, adaptive=True),
    "renormalised": lambda steps: _on_topk(renormalised_kl, k=K),
    "sampled": _sampled,
    "taid_ramp": lambda steps: _taid(steps, adaptive=False),
    "taid_fixed": _taid_fixed,
    "selective": _selective,
    "on_policy_jsd": lambda steps: _live(generalized_jsd, 0.5, beta=0.5),
    "on_policy_reverse_kl": lambda steps: _live(reverse_kl, 1.0),
}
FIRST = tuple(METHODS)[:7]


def available(names: Sequence[str], steps: int) -> tuple[list[str], dict[str, str]]:
    """(methods that can run here, {other: why not})."""
    can, cannot = [], {}
    for name in names:
        try:
            METHODS[name](steps)
            can.append(name)
        except (ValueError, ImportError, TypeError) as e:
            cannot[name] = str(e).splitlines()[0]
    return can, cannot


def write(bench: Bench, results: list[dict[str, Any]], wanted: int, cannot: Mapping[str, str]) -> None:
    found = summaries(bench, results, BASELINE)
    value = {"machine": machine(), "date": today(),
             "world": vars(bench.world), "cells": [len(results), wanted], "not_available": dict(cannot),
             "teacher_entropy": bench.signal(f"topk:{K}")["entropy"], "methods": found}
    bench.publish("objectives", value, table(value), plot(found))


def table(value: Mapping[str, Any]) -> str:
    """The report as Markdown."""
    world, (done, wanted), most = value["world"], value["cells"], str(max(value["world"]["ks"]))
    lines = ["# Objectives in the generated world", ""]
    if done < wanted:
        lines += [f"**Partial: {done} of {wanted} cells.**", ""]
    lines += [f"{world['rendering']} rendering, {world['style']} thinking, {world['steps']} updates of {world['rows']} "
              f"rows, {K} outcomes a signal; teacher's entropy {value['teacher_entropy']:.3f} nats a "
              f"supervised token. {value['machine']}; {value['date']}.", "",
              f"| method | seeds | accuracy, k={most} | minus {BASELINE} | position gap | KL to teacher | ECE "
              "| bytes/token | s/update | peak GiB |", "|---|---|---|---|---|---|---|---|---|---|"]
    for name, m in value["methods"].items():
        gap = m["gap_by_k"].get(most)
        difference = m.get("difference", {}).get(most)
        lines.append(f"| {name} | {len(m['seeds'])} | {_percent(m['accuracy_by_k'][most])} | "
                     f"{_percent(difference, '+') if difference else ''} | {_percent(gap) if gap else ''} | "
                     f"{m['kl']:.4f} | {m['ece']:.4f} | {m['bytes_per_token']:.1f} | {m['seconds_per_step']:.3f} | "
                     f"{m['peak_gib']:.2f} |")
    lines += [f"| {name} | not available: {why} |" + " |" * 8 for name, why in value["not_available"].items()]
    return "\n".join(lines) + "\n"


def _percent(x: Sequence[float], sign: str = "") -> str:
    """value [low, high] in %."""
    return f"{100 * x[0]:{sign}.1f} [{100 * x[1]:{sign}.1f}, {100 * x[2]:{sign}.1f}]"


def plot(found: Mapping[str, Mapping[str, Any]]) -> Figure:
    """Accuracy with its interval beside the KL to the teacher, a row for each method."""
    figure = Figure(figsize=(8.5, 1.2 + 0.42 * len(found)), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    names, at = list(found), np.arange(len(found))
    most = max(found[names[0]]["accuracy_by_k"], key=int)
    mid, low, high = np.array([found[n]["accuracy_by_k"][most] for n in names]).T
    left.errorbar(100 * mid, at, xerr=100 * np.stack([mid - low, high - mid]), fmt="o", color="#00798c", capsize=3)
    right.barh(at, [found[n]["kl"] for n in names], color="#edae49", height=0.6)
    left.set_yticks(at, names)
    left.invert_yaxis()
    left.set_xlabel(f"accuracy at {most} documents, % (95% interval)")
    right.set_xlabel("KL(teacher || student), nats a token, held out")
    for panel in (left, right):
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(axis="x", color="#e3e5e8")
        panel.set_axisbelow(True)
    return figure


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("out", type=Path)
    p.add_argument("--world", choices=list(WORLDS), default="compact")
    p.add_argument("--world-seed", type=int, default=0)
    p.add_argument("--methods", nargs="*", default=list(FIRST), choices=list(METHODS))
    p.add_argument("--seeds", type=int, default=1)
    p.add_argument("--cell", default="", help="METHOD:SEED, run here and nothing else (used by the script itself)")
    args = p.parse_args()
    bench = Bench(args.out, WORLDS[args.world], args.world_seed)
    if args.cell:
        name, seed = args.cell.split(":")
        print(json.dumps(bench.run(name, int(seed), METHODS[name](bench.world.steps))), flush=True)
        return
    can, cannot = available(args.methods, bench.world.steps)
    bench.prepare()
    wanted = [(name, seed) for seed in range(args.seeds) for name in can]
    run_cells(bench.folder, wanted, "benchmarks.objectives",
              [str(args.out), "--world", args.world, "--world-seed", str(args.world_seed)],
              lambda results: write(bench, results, len(wanted), cannot))


if __name__ == "__main__":
    main()
