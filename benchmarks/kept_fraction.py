"""Accuracy against the kept fraction of the written tokens, by section: the protocol of 2512.21002, generated world.

    python -m benchmarks.kept_fraction out/                        # shares 1, 0.75, 0.5, 0.25, one seed
    python -m benchmarks.kept_fraction out/ --sections think all --shares 1 0.5 --seeds 3
    python -m benchmarks.kept_fraction /tmp/x --world smoke        # a minute: does it run; its numbers mean nothing

Every student sees the same questions the same number of times. `Prefix(of="written")` keeps the prompt and the first
share of what the teacher wrote (the prompts of the world are longer than its traces, so a share of whole rows would
keep prompts alone); rows are packed, and a shorter row is paid with fewer updates. WHOLE of the questions stay whole,
or no student would ever see an answer. Loss: half cross-entropy, half forward KL (the paper's). One cell (section and
share, seed) at a time, each in its own process; started again, it goes on. OUT may be the folder of
`benchmarks.objectives` with the same --world: they share its teacher.
"""

import argparse
import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from benchmarks.world_cells import HOLDOUT, PACKED, WORLDS, Bench, Cell, machine, run_cells, summaries, today
from distill_jax.core.roles import ANSWER, THINK, Role
from distill_jax.data.source_specs import Prefix
from distill_jax.data.sources import open_source
from distill_jax.data.tokenizer import load_tokenizer
from distill_jax.losses.rows.cross_entropy import cross_entropy
from distill_jax.losses.rows.divergences import forward_kl
from distill_jax.objective.term import Term

SECTIONS: Mapping[str, tuple[Role, ...]] = {"all": (THINK, ANSWER), "think": (THINK,), "answer": (ANSWER,)}
WHOLE = 0.05
SIGNAL = "topk:12"


def name_of(section: str, share: float) -> str:
    return f"{section}@{share:g}"


def cell_of(bench: Bench, name: str) -> Cell:
    """The student of a section and share; its updates are those of whole rows times the tokens it reads of them."""
    section, _, share = name.partition("@")
    on, target = SECTIONS[section], f"signals/{SIGNAL.replace(':', '')}"
    cell = Cell(signal=SIGNAL, terms={"ce": Term(loss=cross_entropy, on=on, weight=0.5),
                                      "kl": Term(loss=forward_kl, target=target, on=on, weight=0.5)},
                store=_store(bench, float(share)))
    tokens = [_tokens(bench, dataclasses.replace(cell, store=_store(bench, s))) for s in (float(share), 1.0)]
    return dataclasses.replace(cell, steps=max(1, round(bench.world.steps * tokens[0] / tokens[1])))


def _store(bench: Bench, share: float) -> dict[str, Any]:
    return {"pack": True, "seq_len": PACKED * bench.world.seq_len, "rows": max(1, bench.world.rows // PACKED),
            "prefix": None if share == 1 else Prefix(share=share, of="written", whole=WHOLE)}


def _tokens(bench: Bench, cell: Cell) -> int:
    source = open_source(bench.source(cell, signals=()), load_tokenizer(bench.tokenizer), seed=0)
    return source.describe()[0]["tokens_per_epoch"]


def write(bench: Bench, results: list[dict[str, Any]], wanted: int) -> None:
    found = summaries(bench, results, name_of(results[0]["name"].partition("@")[0], 1.0))
    value = {"machine": machine(), "date": today(), "world": vars(bench.world), "cells": [len(results), wanted],
             "holdout": HOLDOUT, "students": found}
    bench.publish("kept_fraction", value, table(value), plot(found))


def table(value: Mapping[str, Any]) -> str:
    """The report as Markdown; "of whole": accuracy over that of the same section at share 1."""
    done, wanted = value["cells"]
    most, found = str(max(value["world"]["ks"])), value["students"]
    lines = ["# Accuracy against the kept fraction", ""]
    lines += [f"**Partial: {done} of {wanted} cells.**", ""] if done < wanted else []
    lines += [f"{value['machine']}; {value['date']}. {100 * WHOLE:.0f}% of the questions stay whole.", "",
              f"| section | share | seeds | updates | accuracy, k={most} | of whole | KL to teacher | s/update |",
              "|---|---|---|---|---|---|---|---|"]
    for name, m in found.items():
        section, _, share = name.partition("@")
        whole = found.get(name_of(section, 1.0), {}).get("accuracy_by_k", {}).get(most, [0.0])[0]
        mean, low, high = (100 * x for x in m["accuracy_by_k"][most])
        of_whole = f"{mean / whole:.0f}%" if whole else ""
        accuracy = f"{mean:.1f} [{low:.1f}, {high:.1f}]"
        lines.append(f"| {section} | {share} | {len(m['seeds'])} | {m['steps']:.0f} | {accuracy} | {of_whole} "
                     f"| {m['kl']:.4f} | {m['seconds_per_step']:.3f} |")
    return "\n".join(lines) + "\n"


def plot(found: Mapping[str, Mapping[str, Any]]) -> Figure:
    figure = Figure(figsize=(6.2, 4.0), layout="constrained")
    panel = figure.subplots()
    most = max(next(iter(found.values()))["accuracy_by_k"], key=int)
    for section in dict.fromkeys(n.partition("@")[0] for n in found):
        mine = sorted((float(n.partition("@")[2]), m["accuracy_by_k"][most]) for n, m in found.items()
                      if n.partition("@")[0] == section)
        x, y = np.array([s for s, _ in mine]), 100 * np.array([a for _, a in mine])
        panel.errorbar(x, y[:, 0], yerr=np.abs(y[:, 1:] - y[:, :1]).T, marker="o", capsize=3, label=section)
    panel.set_xlabel("kept share of what the teacher wrote")
    panel.set_ylabel(f"accuracy at {most} documents, % (95% interval)")
    panel.legend(frameon=False)
    panel.spines[["top", "right"]].set_visible(False)
    panel.grid(color="#e3e5e8")
    return figure


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("out", type=Path)
    p.add_argument("--world", choices=list(WORLDS), default="compact")
    p.add_argument("--world-seed", type=int, default=0)
    p.add_argument("--sections", nargs="*", default=["all"], choices=list(SECTIONS))
    p.add_argument("--shares", nargs="*", type=float, default=[1.0, 0.75, 0.5, 0.25])
    p.add_argument("--seeds", type=int, default=1)
    p.add_argument("--cell", default="", help="SECTION@SHARE:SEED, run here alone (used by the script itself)")
    args = p.parse_args()
    bench = Bench(args.out, WORLDS[args.world], args.world_seed)
    if args.cell:
        name, seed = args.cell.rsplit(":", 1)
        print(json.dumps(bench.run(name, int(seed), cell_of(bench, name))), flush=True)
        return
    bench.prepare()
    wanted = [(name_of(section, share), seed) for seed in range(args.seeds) for section in args.sections
              for share in args.shares]
    run_cells(bench.folder, wanted, "benchmarks.kept_fraction",
              [str(args.out), "--world", args.world, "--world-seed", str(args.world_seed)],
              lambda results: write(bench, results, len(wanted)))


if __name__ == "__main__":
    main()
