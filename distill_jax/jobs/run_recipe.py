"""Run a recipe: its stages in order, each once. Started again, it continues where it was stopped."""

import hashlib
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

from distill_jax.core import spec
from distill_jax.jobs import processes
from distill_jax.jobs.context import Echo, RunContext, Stopped, Stopwatch, say, write_json
from distill_jax.loading import local_folder
from distill_jax.recipe import AnyStage, Call, Generate, Recipe, Score, Stage
from distill_jax.rollout.reinforce import Reinforce
from distill_jax.train import peers


def run_recipe(recipe: Recipe, echo: Echo = say) -> bool:
    """Run every stage that is not done. Returns False when a stage was stopped and will continue at the next start.

    Training takes all processes of a run, any other stage is run by process 0.
    """
    if processes.index() == 0:
        write_or_compare(recipe)
        (recipe.folder / "run.json").write_text(json.dumps({"final": _final(recipe)}))
    peers.current().barrier("the recipe", hashlib.blake2b(recipe.to_yaml().encode(), digest_size=8).hexdigest())
    ours = peers.current()
    for stage in recipe.stages:
        ours.barrier(f"stage {stage.name}", seconds=math.inf)
        if isinstance(stage, Stage) or ours.processes == 1:
            finished = _once(stage, recipe, echo)
        elif ours.process == 0:  # the work of one process: the others wait at the next stage
            with peers.alone():
                finished = _once(stage, recipe, echo)
        else:
            finished = True
        if not finished:
            return False
    return True


def _once(stage: AnyStage, recipe: Recipe, echo: Echo) -> bool:
    """Run a stage unless it is done; False when it was stopped."""
    folder = recipe.stage_folder(stage.name)
    marker = folder / "done.json"
    if marker.is_file():
        echo(f"[{stage.name}] done in {json.loads(marker.read_text())['seconds']:.0f} s, kept")
        return True
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

def allow_unsafe_code(recipe: Recipe) -> Recipe:
    """The recipe with `unsafe_code=True` in every stage that judges code. Raises ValueError where none does."""
    judges = lambda s: isinstance(s, Stage) and isinstance(s.on_policy, Reinforce) and s.on_policy.judge == "code"
    if not any(map(judges, recipe.stages)):
        raise ValueError(f"--unsafe-code: no stage of recipe {recipe.name!r} runs code (on_policy.judge='code')")
    allow = lambda s: replace(s, on_policy=replace(s.on_policy, unsafe_code=True)) if judges(s) else s
    return replace(recipe, stages=tuple(map(allow, recipe.stages)))


def write_or_compare(recipe: Recipe) -> None:
    """Write `recipe.yaml` at the first start; later refuse a changed recipe, showing the difference. Where the first
    start failed before anything was made, there is nothing to keep and the corrected recipe takes its place."""
    path = recipe.folder / "recipe.yaml"
    new = spec.to_plain(recipe)
    if path.is_file():
        old = spec.parse(path.read_text(), str(path))
        changes = spec.diff(old, new)
        if changes and _begun(recipe.folder):
            raise ValueError(f"{recipe.folder} was made by another recipe:\n  " + "\n  ".join(changes)
                             + "\nresume with the old values, or give the run another name (--set name=...)")
        if not changes:
            return
    path.parent.mkdir(parents=True, exist_ok=True)
    tmp = path.with_suffix(".tmp")
    tmp.write_text(recipe.to_yaml())
    tmp.replace(path)


def _begun(folder: Path) -> bool:
    """Whether a run has made anything: a checkpoint, a store, a report, more than what every start writes."""
    every_start = {"recipe.yaml", "run.json", "time.json", "checkpoints.url"}
    files = (p for p in folder.rglob("*") if p.is_file() and p.name not in every_start)
    files = (p for p in files if p.stat().st_size and not p.name.startswith("events.out"))
    return any(p.parent.name != "model" or p.name == "done.json" for p in files)
