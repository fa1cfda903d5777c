"""The quickstart's own stages: make the world, and the report at the end."""

import json
from collections.abc import Sequence
from typing import Any

from distill_jax.data.tokenizer import load_tokenizer
from distill_jax.eval import report as reports
from distill_jax.eval.answerers import model_answerer
from distill_jax.eval.records import Records
from distill_jax.eval.run import run
from distill_jax.eval.tasks.multidoc_qa import MultidocQA
from distill_jax.jobs.context import RunContext, write_json
from distill_jax.jobs.write_store import write_store
from distill_jax.loading import load, local_folder
from distill_jax.traces.world.curriculum import LESSONS, NAMES, Curriculum
from distill_jax.traces.world.thoughts import Style
from distill_jax.traces.world.tokenizer import build_tokenizer


def build_world(context: RunContext, *, lesson_rows: Sequence[int], teacher_rows: int, questions: int,
                rendering: str = "compact", style: Style = "minimal") -> dict[str, int]:
    """Tokenizer and the stores `lesson0` to `lessonN`, `teacher` and `questions` in the stage's folder."""
    folder = context.folder
    build_tokenizer(folder / "tokenizer", rendering)
    tok = load_tokenizer(folder / "tokenizer")
    data = Curriculum(seed=context.seed, rendering=rendering, style=style)
    parts = {f"lesson{i}": data.lesson(i, n) for i, n in zip(range(len(LESSONS)), lesson_rows, strict=True)} | {
        "teacher": data.two_hop(teacher_rows), "questions": data.two_hop(questions, salt=2)}
    made = {name: len(write_store(str(folder / name), traces, tok)) for name, traces in parts.items()}
    context.say(f"[{context.folder.name}] rows: " + ", ".join(f"{name} {n}" for name, n in made.items()))
    return made


def report(context: RunContext, *, teacher: str, thinking: str, answer_only: str, ks: Sequence[int] = (2, 4, 8, 12),
           trained_k: int = 8, questions: int = 500, max_new_tokens: int = 16) -> dict[str, Any]:
    """Ask the three models the same questions over k and position; write report.json, report.md and the plots."""
    task = MultidocQA(k=tuple(ks), questions=questions, positions=8, names=NAMES, seed=context.seed)
    spent = stage_costs(context)
    records: dict[str, Records] = {}
    for name, where in (("thinking", thinking), ("answer_only", answer_only), ("teacher", teacher)):
        kept = context.folder / f"{name}.json"
        if not kept.is_file():
            model, params = load(where)
            tok = load_tokenizer(local_folder(where))
            answerer = model_answerer(model, params, tok, max_new_tokens=max_new_tokens, batch_size=1024)
            got = run(task, answerer, model=name, about=spent.get(name, {}))
            context.say(f"[{context.folder.name}] {name}: {got.mean('correct'):.1%} of {len(got)} answers right")
            write_json(kept, got.to_json())
        records[name] = Records.from_json(json.loads(kept.read_text()))
    out = context.recipe.folder
    seconds = round(sum(s["training_seconds"] for s in spent.values()) + context.watch.total, 1)
    plan = reports.Plan(
        title="Quickstart: distilled reasoning over several documents", compare=("answer_only", "thinking"),
        students=("thinking", "answer_only"), teacher="teacher", trained_k=trained_k,
        extra={"seconds": seconds, "seed": context.seed, "stages": spent})
    value = reports.write(out, records, plan)
    context.say(reports.table_text(value, records, plan))
    context.say(f"report: {out / 'report.md'}   plot: {out / 'position_curves.png'}")
    return {"mean_accuracy": {n: v["mean_accuracy"] for n, v in value["students"].items()}}


def stage_costs(context: RunContext) -> dict[str, dict[str, Any]]:
    """Seconds of every finished stage, and FLOPs and updates of those that trained."""
    out: dict[str, dict[str, Any]] = {}
    for path in sorted(context.recipe.folder.glob("*/done.json")):
        done = json.loads(path.read_text())
        result = done["result"] if isinstance(done["result"], dict) else {}
        out[path.parent.name] = {"training_seconds": round(done["seconds"], 1)} | (
            {"training_flops": result["flops"], "training_steps": result["steps"]} if "flops" in result else {})
    return out
