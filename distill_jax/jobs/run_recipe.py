"""Run a recipe: its stages in order, each once. Started again, it continues where it was stopped."""

import json
import shutil
from pathlib import Path
from typing import Any

from distill_jax.jobs import processes
from distill_jax.jobs.context import Echo, RunContext, Stopped, Stopwatch, say, write_json
from distill_jax.loading import local_folder
from distill_jax.recipe import AnyStage, Call, Generate, Recipe, Score, Stage, write_or_compare

LAID_OUT = ("recipe.yaml", "run.json", "time.json")
"""What stands in a run before anything is computed, beside `model/` and the header of TensorBoard's file."""


def run_recipe(recipe: Recipe, echo: Echo = say) -> bool:
    """Run every stage that is not done. Returns False when a stage was stopped and will continue at the next start."""
    new = False
    if processes.index() == 0:
        new = write_or_compare(recipe)
        (recipe.folder / "run.json").write_text(json.dumps({"final": _final(recipe)}))
    try:
        return _run_stages(recipe, echo)
    except Exception:
        if new:
            forget_unless_made(recipe.folder)
        raise


def forget_unless_made(folder: Path) -> None:
    """Delete a run that failed before it made anything: else the corrected command would be refused as another
    recipe's."""
    made = [p for p in folder.rglob("*") if p.is_file() and p.stat().st_size and p.name not in LAID_OUT
            and p.parent.name != "model" and not p.name.startswith("events.out")]
    if not made:
        shutil.rmtree(folder)


def _run_stages(recipe: Recipe, echo: Echo) -> bool:
    for stage in recipe.stages:
        folder = recipe.stage_folder(stage.name)
        marker = folder / "done.json"
        if marker.is_file():
            echo(f"[{stage.name}] done in {json.loads(marker.read_text())['seconds']:.0f} s, kept")
            continue
        folder.mkdir(parents=True, exist_ok=True)
        echo(f"[{stage.name}] start")
        with Stopwatch(folder / "time.json") as watch:
            try:
                result = _run(stage, RunContext(recipe=recipe, folder=folder, say=echo, watch=watch))
            except Stopped as stop:
                echo(f"[{stage.name}] stopped: {stop}")
                return False
        write_json(marker, {"seconds": watch.total, "result": result})
        echo(f"[{stage.name}] done in {watch.total:.0f} s")
    return True


def _run(stage: AnyStage, context: RunContext) -> Any:
    if isinstance(stage, Stage):
        from distill_jax.jobs.train import train_stage

        return train_stage(stage, context)
    if isinstance(stage, Generate):
        from distill_jax.jobs.generate_stage import generate_stage

        return generate_stage(stage, context)
    if isinstance(stage, Score):
        from distill_jax.jobs.score import ScoreJob, score

        teacher = str(local_folder(context.resolve(stage.teacher)))
        return score(ScoreJob(store=context.resolve(stage.store), teacher=teacher, signal=stage.signal,
                              batch_tokens=stage.batch_tokens))
    assert isinstance(stage, Call)
    return stage.fn(context, **{k: context.resolve(v) if isinstance(v, str) else v for k, v in stage.kwargs.items()})


def _final(recipe: Recipe) -> str:
    """Name of the last training stage: the model that `load(runs/<name>)` means."""
    trained = [s.name for s in recipe.stages if isinstance(s, Stage)]
    return trained[-1] if trained and len(recipe.stages) > 1 else ""
