"""Students in the generated world, one cell (name, seed) at a time: what `objectives` and `kept_fraction` share.

`prepare` makes a world once: base, teacher, the teacher's traces. A cell trains the base on these traces with one
objective; all cells share teacher, initial parameters and traces, and a cell's seed decides the order of the data.
Everything is kept under one folder and goes on where it was stopped: a cell that is done is read, not run.
"""

import dataclasses
import datetime
import json
import os
import platform
import resource
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from configs.quickstart import LESSON_STEPS, MODEL
from distill_jax.core.roles import SUPERVISED
from distill_jax.data.source_specs import Phases, Source, Store
from distill_jax.data.sources import open_source
from distill_jax.data.tokenizer import load_tokenizer
from distill_jax.decode.sampling import Sampling
from distill_jax.eval import stats
from distill_jax.eval.answerers import model_answerer
from distill_jax.eval.calibration import expected_calibration_error
from distill_jax.eval.records import Records
from distill_jax.eval.run import run as ask
from distill_jax.eval.tasks.multidoc_qa import MultidocQA
from distill_jax.jobs.quickstart import build_world
from distill_jax.jobs.run_recipe import run_recipe
from distill_jax.jobs.score import ScoreJob, score
from distill_jax.loading import load
from distill_jax.losses.rows.cross_entropy import cross_entropy
from distill_jax.objective.term import Term
from distill_jax.recipe import Call, Frozen, Generate, Recipe, Saving, Stage, Student
from distill_jax.rollout.on_policy import OnPolicy
from distill_jax.traces.world.curriculum import NAMES
from distill_jax.traces.world.thoughts import Style
from distill_jax.train.optim import AdamW

HOLDOUT = 0.05
PACKED = 4
"""Rows of the world that a packed sequence may hold at most: the models' context."""


@dataclass(frozen=True, kw_only=True)
class World:
    """Sizes. steps: updates of a student, the budget of every cell; written: most tokens of thinking and answer.

    style "extended" lets the oracle take a wrong branch that it draws: the teacher's entropy comes from there.
    Compact rows have at most 63 words and the template. At the 11,000 to 20,000 tokens/s that the quickstart's models
    reach on two idle cores (docs/LOG.md), a student's 300 updates take about two minutes: a guess until measured.
    """

    rendering: str = "compact"
    style: Style = "extended"
    vocab: int = 176
    seq_len: int = 72
    written: int = 34
    rows: int = 64
    lesson_steps: tuple[int, ...] = LESSON_STEPS
    base_steps: int = 700
    teacher_steps: int = 600
    steps: int = 300
    questions: int = 8000
    asked: int = 300
    ks: tuple[int, ...] = (2, 4, 8)
    untrained: bool = False  # a teacher that has learned nothing will do: every trace is used


WORLDS = {
    "compact": World(),
    # Not known to be learned: no model of this size has been trained on running text so far.
    "rich": World(rendering="rich", style="minimal", vocab=3072, seq_len=512, written=96, rows=16, base_steps=2000,
                  teacher_steps=1000, questions=4000, asked=100),
    "smoke": World(rows=8, lesson_steps=(2, 2, 2), base_steps=8, teacher_steps=3, steps=4, questions=48, asked=4,
                   ks=(2, 4), untrained=True),
}


@dataclass(frozen=True, kw_only=True)
class Cell:
    """A student. terms: of its objective; signal: what its terms read (`topk:12`), or ""; steps: 0 = the world's.

    store  further fields of its `Store`
    on_policy  the student's own answers as a share; a term on "teacher/main" runs the teacher beside the student
    """

    terms: Mapping[str, Term]
    signal: str = ""
    store: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    steps: int = 0
    on_policy: OnPolicy | None = None

    @property
    def signal_name(self) -> str:
        return self.signal.replace(":", "")


class Bench:
    """The folder of a benchmark: `world/` (prepared once) and `cells/<name>-<seed>/`."""

    def __init__(self, folder: Path, world: World, seed: int = 0) -> None:
        self.folder, self.world, self.seed = folder, world, seed
        self.base, self.teacher = folder / "world/base", folder / "world/teacher"
        self.traces = folder / "world/traces/store"
        self.tokenizer = folder / "world/world/tokenizer"

    def prepare(self) -> None:
        """World, base, teacher and traces. Raises ValueError where too few of the teacher's answers are right."""
        w = self.world
        steps = (*w.lesson_steps, max(1, w.base_steps - sum(w.lesson_steps)))
        lessons = Phases(sources=tuple(self._plain(f"stage:world/lesson{i}") for i in range(len(steps))),
                         steps=w.lesson_steps)
        beginner = Student(config=dataclasses.replace(MODEL, vocab_size=w.vocab, context_length=PACKED * w.seq_len),
                           tokenizer="stage:world/tokenizer")
        recipe = Recipe(name="world", runs=str(self.folder), seed=self.seed, stages=(
            Call(name="world", fn=build_world, kwargs={
                "lesson_rows": tuple(min(16000, n * w.rows) for n in steps), "teacher_rows": w.questions,
                "questions": w.questions, "rendering": w.rendering, "style": w.style}),
            self._stage("base", lessons, beginner, w.base_steps),
            self._stage("teacher", self._plain("stage:world/teacher"), Student(model="stage:base"), w.teacher_steps),
            Generate(name="traces", teacher="stage:teacher", questions="stage:world/questions", batch_size=512,
                     keep="all" if w.untrained else "correct",
                     sampling=Sampling(temperature=1.0, max_new_tokens=w.written))))
        if not run_recipe(recipe):
            raise SystemExit("stopped; the same command goes on")
        made = json.loads((self.folder / "world/traces/done.json").read_text())["result"]
        if made["kept"] < made["questions"] // 4 and not w.untrained:
            raise ValueError(f"only {made['kept']} of {made['questions']} answers of the teacher are right: it has not "
                             "learned the task, and comparing its students says nothing. Try another --world-seed")

    def _plain(self, path: str) -> Store:
        return Store(path=path, rows=self.world.rows, seq_len=self.world.seq_len, pack=False,
                     over_long="cut" if self.world.untrained else "drop")

    def _stage(self, name: str, source: Source, student: Student, steps: int,
               terms: Mapping[str, Term] | None = None, on_policy: OnPolicy | None = None) -> Stage:
        terms = terms or {"ce": Term(loss=cross_entropy)}
        live = any(t.target.startswith("teacher/") for t in terms.values())
        return Stage(name=name, source=source, terms=terms, steps=steps, on_policy=on_policy, log_every=50,
                     providers={"student": student} | ({"teacher": Frozen(str(self.teacher))} if live else {}),
                     saving=Saving(steps=200, keep=1),
                     optim=AdamW(peak_lr=2e-3, warmup=min(50, steps // 4), b2=0.98))

    def signal(self, signal: str) -> dict[str, Any]:
        """Score the traces once; -> the report: teacher's entropy, and bytes a token that has the signal."""
        kept = self.folder / f"signal-{signal.replace(':', '')}.json"
        if not kept.is_file():
            report = score(ScoreJob(store=str(self.traces), teacher=str(self.teacher), signal=signal))
            files = (self.traces / "signals" / report["signal"]).rglob("*")
            size = sum(f.stat().st_size for f in files if f.is_file())
            kept.write_text(json.dumps({**report, "bytes_per_token": size / report["tokens"]}))
        return json.loads(kept.read_text())

    def publish(self, name: str, value: Mapping[str, Any], text: str, figure: Figure) -> None:
        """The report as `name`.json, .md and .png in the folder, and on the screen."""
        (self.folder / f"{name}.json").write_text(json.dumps(value, indent=1))
        (self.folder / f"{name}.md").write_text(text)
        FigureCanvasAgg(figure)
        figure.savefig(self.folder / f"{name}.png", dpi=160)
        print(text, flush=True)

    def source(self, cell: Cell, **fields: Any) -> Store:
        options = {"signals": (cell.signal_name,) if cell.signal else (), "holdout": HOLDOUT, **cell.store, **fields}
        return dataclasses.replace(self._plain(str(self.traces)), **options)

    def run(self, name: str, seed: int, cell: Cell) -> dict[str, Any]:
        """Train and measure one cell; -> its row of the table."""
        folder = self.folder / "cells" / f"{name}-{seed}"
        done = folder / "result.json"
        if done.is_file():
            return json.loads(done.read_text())
        about = self.signal(cell.signal) if cell.signal else {}
        stage = self._stage("train", self.source(cell), Student(model=str(self.base)), cell.steps or self.world.steps,
                            cell.terms, cell.on_policy)
        recipe = Recipe(name=folder.name, runs=str(folder.parent), seed=seed, stages=(stage,))
        if not run_recipe(recipe):
            raise SystemExit("stopped; the same command goes on")
        cost = folder / "cost.json"
        if not cost.is_file():  # before anything else needs memory
            cost.write_text(json.dumps(_cost(folder)))
        result = {"name": name, "seed": seed, "signal": cell.signal, "steps": stage.steps,
                  "bytes_per_token": about.get("bytes_per_token", 0.0), **json.loads(cost.read_text()),
                  **self.measure(folder, cell)}
        tmp = done.with_suffix(".tmp")
        tmp.write_text(json.dumps(result, indent=1))
        tmp.replace(done)
        return result

    def measure(self, folder: Path, cell: Cell) -> dict[str, Any]:
        """Answers over k and position (kept in records.json), and what the held-out traces say."""
        w = self.world
        model, params = load(folder)
        tok = load_tokenizer(self.tokenizer)
        task = MultidocQA(k=w.ks, questions=w.asked, positions=8, names=NAMES, rendering=w.rendering, seed=self.seed,
                          floor_and_ceiling=False)
        records = ask(task, model_answerer(model, params, tok, max_new_tokens=w.written, batch_size=512),
                      model=folder.name)
        records.save(folder / "records.json")
        teacher = load(self.teacher)
        source = open_source(self.source(cell, split="heldout", signals=(), prefix=None), tok, seed=0)
        batches = min(16, max(1, int(source.steps_per_epoch)))
        return {"accuracy": records.mean("correct"), **against_teacher((model, params), teacher, source, batches)}


def _cost(folder: Path) -> dict[str, float]:
    """Seconds an update, tokens/s (medians over reports), and the largest memory of this process (GiB)."""
    lines = [json.loads(line) for line in (folder / "metrics/train.jsonl").read_text().splitlines()]
    median = lambda key: float(np.median([x[key] for x in lines if x.get(key)] or [np.nan]))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)
    device = [x["memory_gib"] for x in lines if x.get("memory_gib")]
    return {"seconds_per_step": median("seconds_per_step"), "tokens_per_second": median("tokens_per_second"),
            "peak_gib": max(device, default=peak)}


def against_teacher(student: Any, teacher: Any, source: Any, batches: int) -> dict[str, float]:
    """Over the supervised tokens of the first batches: mean KL(teacher || student) in nats over the whole vocabulary,
    cross-entropy, and the student's calibration error against the tokens that stand there. Builds [B,T,V]."""

    @jax.jit
    def one(params: Any, fixed: Any, batch: Any) -> tuple[Any, ...]:
        m = batch.main
        log = lambda model, p: jax.nn.log_softmax(
            model.apply({"params": p}, m.tokens, m.positions, m.segment_ids).astype(jnp.float32))[:, :-1]
        q, p = log(student[0], params), log(teacher[0], fixed)
        kl = jnp.sum(jnp.where(p > -1e4, jnp.exp(p) * (p - q), 0.0), axis=-1)
        nll = -jnp.take_along_axis(q, m.tokens[:, 1:, None], axis=-1)[..., 0]
        on = jnp.isin(m.roles, jnp.asarray(SUPERVISED, m.roles.dtype)) & (m.weights > 0)
        return kl, nll, jnp.exp(jnp.max(q, axis=-1)), jnp.argmax(q, axis=-1) == m.tokens[:, 1:], on[:, 1:]

    parts = [[np.asarray(x) for x in one(student[1], teacher[1], source.batch(i))] for i in range(batches)]
    kl, nll, confidence, right = (np.concatenate([p[i][p[4]] for p in parts]) for i in range(4))
    return {"kl": float(kl.mean()), "cross_entropy": float(nll.mean()),
            "ece": expected_calibration_error(np.clip(confidence, 0, 1), right)}


def pooled(bench: Bench, results: Sequence[Mapping[str, Any]]) -> Records:
    """The answers of one name over its seeds; intervals are then over questions, each averaged over seeds."""
    rows = [r for x in results
            for r in Records.load(bench.folder / "cells" / f"{x['name']}-{x['seed']}" / "records.json").rows]
    return Records(task="multidoc_qa", model=str(results[0]["name"]), rows=tuple(rows), about={})


def summaries(bench: Bench, results: Sequence[Mapping[str, Any]], baseline: str) -> dict[str, dict[str, Any]]:
    """{name: means over seeds, accuracy and gap by k with intervals, paired difference to the baseline}."""
    by_name: dict[str, list[Mapping[str, Any]]] = {}
    for x in results:
        by_name.setdefault(x["name"], []).append(x)
    records = {name: pooled(bench, rows) for name, rows in by_name.items()}
    out: dict[str, dict[str, Any]] = {}
    for name, rows in by_name.items():
        got = stats.summary(records[name])
        mean = lambda key, rows=rows: float(np.mean([r[key] for r in rows]))
        keys = ("kl", "ece", "cross_entropy", "bytes_per_token", "seconds_per_step", "peak_gib", "steps")
        out[name] = {"seeds": [r["seed"] for r in rows], "accuracy": got["accuracy"],
                     "accuracy_by_k": got["accuracy_interval"], "gap_by_k": got["position_gap"],
                     **{key: mean(key) for key in keys}}
        if baseline in records and name != baseline and _same_items(records[name], records[baseline]):
            out[name]["difference"] = stats.compare(records, baseline, [name])[name]["difference"]
    return out


def _same_items(a: Records, b: Records) -> bool:
    return sorted(r.id for r in a.rows) == sorted(r.id for r in b.rows)


def today() -> str:
    return datetime.datetime.now(datetime.UTC).date().isoformat()


def machine() -> str:
    return f"jax {jax.__version__}, {jax.devices()[0].device_kind}, {platform.machine()}, {os.cpu_count()} cores"


def spawn(module: str, arguments: Sequence[str], cell: str) -> None:
    """One cell in a process of its own: its memory is its own, and a crash ends one cell."""
    done = subprocess.run([sys.executable, "-m", module, *arguments, "--cell", cell], check=False)
    if done.returncode:
        raise SystemExit(f"cell {cell} ended with {done.returncode}; the same command goes on")


def run_cells(folder: Path, wanted: Sequence[tuple[str, int]], module: str, arguments: Sequence[str],
              report: Callable[[list[dict[str, Any]]], None]) -> None:
    """Every cell of a benchmark's folder that is not done, seed by seed; `report` after each, on what is there."""
    results: list[dict[str, Any]] = []
    for name, seed in wanted:
        done = folder / "cells" / f"{name}-{seed}" / "result.json"
        if not done.is_file():
            spawn(module, arguments, f"{name}:{seed}")
        results.append(json.loads(done.read_text()))
        report(results)
