"""Length rewards on Knights and Knaves: methods from the same warmed-up student, on the same questions.

    python -m benchmarks.reinforcement out/                       # GRPO and the length methods, one seed each
    python -m benchmarks.reinforcement out/ --seeds 3             # goes on from there: two more seeds
    python -m benchmarks.reinforcement out/ --methods grpo pear
    python -m benchmarks.reinforcement /tmp/x --size smoke        # a minute: does it run; its numbers mean nothing

The warm-up and the 100 questions are those of `configs/recipes/grpo_kk.py`, with room for longer answers; a cell
(method, seed) is its RL stage with the method's reward, advantage and environment, everything else equal; the seed
decides sampling and order. Aim: at most 75% of GRPO's thinking tokens at 2 points of accuracy less or better. One cell
at a time, each in its own process; started again, it goes on. After every cell OUT's reinforcement.json, .md and .png
say what is there. Accuracy and thinking tokens are of greedy answers to held-out puzzles; intervals are 95%, a
bootstrap over questions.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from benchmarks.world_cells import machine, run_cells, today
from configs.recipes import grpo_kk
from distill_jax.data.tokenizer import load_tokenizer
from distill_jax.eval import stats
from distill_jax.eval.answerers import model_answerer
from distill_jax.eval.records import Records
from distill_jax.eval.run import run as ask
from distill_jax.eval.tasks.puzzles import Puzzles
from distill_jax.jobs.puzzles import NAMES
from distill_jax.jobs.run_recipe import run_recipe
from distill_jax.loading import load
from distill_jax.recipe import Recipe
from distill_jax.rewards.algebra import Reward
from distill_jax.rewards.shaping import concise, top_groups
from distill_jax.rewards.shaping_laser import LaserD
from distill_jax.rewards.shaping_modes import early_exit, phase_entropy
from distill_jax.rollout.advantages import group_mean
from distill_jax.rollout.environments import EarlyExits

BASELINE = "grpo"
WRITTEN = 384
"""Most tokens of an answer: more than the recipe's, so that second tests fit. GRPO leaves them all the same
(docs/LOG.md)."""
METHODS: Mapping[str, Mapping[str, Any]] = {
    BASELINE: {},
    "laser_d": {"reward": Reward(fn=LaserD(lower=16, upper=WRITTEN, step=4, wrong=-0.5, unanswered=-1.0))},
    "conciser": {"reward": Reward(fn=concise, kwargs={"limit": WRITTEN}), "advantage": group_mean},
    "grpo_lambda": {"reward": Reward(fn=top_groups, kwargs={"share": 0.2, "alpha": 0.2})},
    "pear": {"reward": Reward(fn=phase_entropy)},
    "s_grpo": {"reward": Reward(fn=early_exit), "advantage": group_mean,
               "environment": EarlyExits(exits=grpo_kk.N - 1, text="</think>", answer_tokens=8)},
}
"""What differs from the recipe's `Reinforce`. Constants as in the recipes of these names, lengths for this world."""


@dataclass(frozen=True, kw_only=True)
class Size:
    """Updates of the warm-up's three parts and of a cell; held-out puzzles."""

    lesson: int = grpo_kk.LESSON
    careful: int = grpo_kk.CAREFUL
    warmup: int = grpo_kk.WARMUP
    steps: int = grpo_kk.STEPS
    asked: int = 500


SIZES = {"laptop": Size(), "smoke": Size(lesson=4, careful=4, warmup=4, steps=2, asked=8)}


class Bench:
    """The folder of the comparison: `start/` (puzzles and warm-up, made once) and `cells/<name>-<seed>/`."""

    def __init__(self, folder: Path, size: Size) -> None:
        self.folder, self.size = folder, size

    def prepare(self) -> None:
        """Puzzles and the student that every cell starts from."""
        s = self.size
        stages = grpo_kk.start(s.lesson, s.careful, s.warmup, WRITTEN)
        self._run(Recipe(name="start", runs=str(self.folder), stages=stages))

    def run(self, name: str, seed: int) -> dict[str, Any]:
        """Train and measure one cell; -> its row of the table."""
        folder, start = self.folder / "cells" / f"{name}-{seed}", self.folder / "start"
        done = folder / "result.json"
        if done.is_file():
            return json.loads(done.read_text())
        stage = grpo_kk.rl(str(start / "puzzles/questions"), str(start / "warmup"), steps=self.size.steps,
                           written=WRITTEN, **METHODS[name])
        self._run(Recipe(name=folder.name, runs=str(folder.parent), seed=seed, stages=(stage,)))
        records = self.records(folder, folder)
        lines = [json.loads(x) for x in (folder / f"metrics/{stage.name}.jsonl").read_text().splitlines()]
        curve = lambda key: [[x["step"], x[key]] for x in lines if key in x]
        result = {"name": name, "seed": seed, "steps": stage.steps, "accuracy": records.mean("correct"),
                  "thinking_tokens": records.mean("thinking_tokens"),
                  "seconds": json.loads((folder / "time.json").read_text()).get("seconds", 0.0),
                  "curves": {k: curve(f"rollouts/{k}") for k in ("accuracy", "think_tokens")}}
        part = done.with_suffix(".tmp")
        part.write_text(json.dumps(result, indent=1))
        part.replace(done)
        return result

    def records(self, model: Path, folder: Path) -> Records:
        """Greedy answers of a model to the held-out puzzles, kept in `folder`."""
        path = folder / "records.json"
        if not path.is_file():
            task = Puzzles(k=(grpo_kk.PEOPLE,), questions=self.size.asked, names=NAMES)
            tok = load_tokenizer(self.folder / "start/puzzles/tokenizer")
            answerer = model_answerer(*load(model), tok, max_new_tokens=WRITTEN, batch_size=512)
            ask(task, answerer, model=folder.name).save(path)
        return Records.load(path)

    def write(self, results: Sequence[Mapping[str, Any]], wanted: int) -> None:
        """The report on what is there."""
        by_name: dict[str, list[Mapping[str, Any]]] = {}
        for x in results:
            by_name.setdefault(x["name"], []).append(x)
        of = lambda rows: tuple(r for x in rows for r in Records.load(
            self.folder / "cells" / f"{x['name']}-{x['seed']}" / "records.json").rows)
        records = {"warm-up": self.records(self.folder / "start/warmup", self.folder / "start")} | {
            name: Records(rows=of(rows), model=name) for name, rows in by_name.items()}
        found = {name: self._row(name, records, by_name.get(name, [])) for name in records}
        value = {"machine": machine(), "date": today(),
                 "size": vars(self.size), "cells": [len(results), wanted], "methods": found}
        (self.folder / "reinforcement.json").write_text(json.dumps(value, indent=1))
        text = table(value)
        (self.folder / "reinforcement.md").write_text(text)
        figure = plot(value)
        FigureCanvasAgg(figure)
        figure.savefig(self.folder / "reinforcement.png", dpi=160)
        print(text, flush=True)

    def _row(self, name: str, records: Mapping[str, Records], rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        k = str(grpo_kk.PEOPLE)
        out = {"seeds": [r["seed"] for r in rows], "accuracy": stats.summary(records[name])["accuracy_interval"][k],
               "thinking_tokens": records[name].mean("thinking_tokens"), "curves": [r["curves"] for r in rows],
               "seconds": float(np.mean([r["seconds"] for r in rows])) if rows else None}
        if name != BASELINE and BASELINE in records and _asked(records[name]) == _asked(records[BASELINE]):
            out["difference"] = stats.compare(records, BASELINE, [name])[name]["difference"][k]
        if BASELINE in records:
            out["tokens_ratio"] = out["thinking_tokens"] / records[BASELINE].mean("thinking_tokens")
        return out

    @staticmethod
    def _run(recipe: Recipe) -> None:
        if not run_recipe(recipe):
            raise SystemExit("stopped; the same command goes on")


def _asked(records: Records) -> set[str]:
    return {r.id for r in records.rows}


def table(value: Mapping[str, Any]) -> str:
    """The report as Markdown."""
    size, (done, wanted) = value["size"], value["cells"]
    lines = ["# Length rewards on Knights and Knaves", ""]
    if done < wanted:
        lines += [f"**Partial: {done} of {wanted} cells.**", ""]
    warmup = sum(size[part] for part in ("lesson", "careful", "warmup"))
    lines += [f"{grpo_kk.PEOPLE} people, {warmup} updates of warm-up, the last {size['warmup']} on varied traces, then "
              f"{size['steps']} updates on {grpo_kk.QUESTIONS} questions; greedy answers to {size['asked']} held-out "
              f"puzzles. {value['machine']}; {value['date']}.", "",
              f"| method | seeds | accuracy, % | minus {BASELINE} | thinking tokens | against {BASELINE} | minutes |",
              "|---|---|---|---|---|---|---|"]
    for name, m in value["methods"].items():
        ratio, minutes = m.get("tokens_ratio"), m["seconds"]
        lines.append(f"| {name} | {len(m['seeds']) or ''} | {_percent(m['accuracy'])} | "
                     f"{_percent(m['difference'], '+') if 'difference' in m else ''} | {m['thinking_tokens']:.1f} | "
                     f"{f'{100 * (ratio - 1):+.0f}%' if ratio else ''} | {f'{minutes / 60:.1f}' if minutes else ''} |")
    return "\n".join(lines) + "\n"


def _percent(x: Sequence[float], sign: str = "") -> str:
    """value [low, high] in %."""
    return f"{100 * x[0]:{sign}.1f} [{100 * x[1]:{sign}.1f}, {100 * x[2]:{sign}.1f}]"


def plot(value: Mapping[str, Any]) -> Figure:
    """Sampled accuracy and thinking tokens on the questions over updates, and held-out accuracy against tokens."""
    figure = Figure(figsize=(11, 3.6), layout="constrained")
    panels = figure.subplots(1, 3)
    for i, (name, m) in enumerate(value["methods"].items()):
        color = "#8d96a3" if name == "warm-up" else f"C{i - 1}"
        for panel, key in zip(panels, ("accuracy", "think_tokens")):
            curves = [np.array(c[key], float) for c in m["curves"] if c[key]]
            if curves:
                n = min(len(c) for c in curves)
                panel.plot(curves[0][:n, 0], np.mean([c[:n, 1] for c in curves], axis=0), color=color, label=name)
        mid, low, high = (100 * x for x in m["accuracy"])
        panels[2].errorbar(m["thinking_tokens"], mid, yerr=[[mid - low], [high - mid]], fmt="o", color=color, capsize=3)
        panels[2].annotate(name, (m["thinking_tokens"], mid), xytext=(6, 4), textcoords="offset points", color=color)
    for panel, (x, y) in zip(panels, (("update", "accuracy on the questions, sampled"),
                                      ("update", "thinking tokens, sampled"),
                                      ("thinking tokens, greedy, held out", "accuracy, %, greedy, held out"))):
        panel.set_xlabel(x)
        panel.set_ylabel(y)
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(color="#e3e5e8")
        panel.set_axisbelow(True)
    return figure


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("out", type=Path)
    p.add_argument("--size", choices=list(SIZES), default="laptop")
    p.add_argument("--methods", nargs="*", default=list(METHODS), choices=list(METHODS))
    p.add_argument("--seeds", type=int, default=1)
    p.add_argument("--cell", default="", help="METHOD:SEED, run here and nothing else (used by the script itself)")
    args = p.parse_args()
    bench = Bench(args.out, SIZES[args.size])
    if args.cell:
        name, seed = args.cell.split(":")
        print(json.dumps(bench.run(name, int(seed))), flush=True)
        return
    bench.prepare()
    wanted = [(name, seed) for seed in range(args.seeds) for name in args.methods]
    run_cells(bench.folder, wanted, "benchmarks.reinforcement", [str(args.out), "--size", args.size],
              lambda results: bench.write(results, len(wanted)))


if __name__ == "__main__":
    main()
