"""Further tables of `plan`: remat policies side by side, and the compiler's numbers beside the formulas'."""

from typing import Any

from distill_jax.jobs.compiled import Compiled, compile_step
from distill_jax.jobs.hardware import Device, Target
from distill_jax.jobs.plan import StagePlan, fits, model_config, plan_stage, si
from distill_jax.models.remat import REMAT
from distill_jax.recipe import Recipe, Stage
from distill_jax.recipe_file import override


def stage_of(recipe: Recipe, name: str) -> Stage:
    """The training stage of that name."""
    return next(s for s in recipe.stages if s.name == name and isinstance(s, Stage))


def remat_rows(recipe: Recipe, name: str, device: Device, devices: int) -> list[tuple[str, StagePlan]]:
    """(policy, plan of the stage with it for all its trained models), from most memory to most recomputation."""
    rows = []
    for policy in REMAT:
        changed = recipe
        for provider, p in stage_of(recipe, name).models.items():
            if p.trainable:
                changed = override(changed, f"{provider}.remat={policy}")
        rows.append((policy, plan_stage(changed, stage_of(changed, name), device, devices)))
    return sorted(rows, key=lambda r: -r[1].total_memory)


def remat_table(recipe: Recipe, name: str, device: Device, devices: int) -> Any:
    """Rich table: what each policy keeps and costs."""
    from rich.table import Table

    t = Table(title=f"stage {name}: remat")
    for column in ("policy", "activations", "memory", "", "tokens/s (modelled)"):
        t.add_column(column, justify="left" if column in ("policy", "") else "right")
    for policy, p in remat_rows(recipe, name, device, devices):
        t.add_row(policy, si(p.memory["activations"]) + "B", si(p.total_memory) + "B",
                  "fits" if fits(p, device) else "does not fit", si(p.tokens_per_second))
    return t


def compiled_text(recipe: Recipe, name: str, target: Target) -> Compiled:
    """A stage of the recipe, compiled for the target."""
    stage = stage_of(recipe, name)
    return compile_step(recipe, stage, target, {n: model_config(recipe, p) for n, p in stage.models.items()})


def compiled_table(results: list[tuple[StagePlan, Compiled]], target: Target) -> Any:
    """Rich table: formulas and compiler side by side. No times: nothing ran."""
    from rich.table import Table

    t = Table(title=f"compiled for {target.text}, not run")
    for column in ("stage", "", "formula", "compiler"):
        t.add_column(column, justify="left" if column in ("stage", "") else "right")
    for p, c in results:
        for part in ("parameters", "optimiser", "batch"):
            t.add_row(p.name, part, si(p.memory[part]) + "B", si(c.hbm[part]) + "B")
        rest = sum(p.memory[k] for k in ("gradients", "activations", "loss"))
        t.add_row(p.name, "temporary", si(rest) + "B", si(c.temporary) + "B")
        t.add_row(p.name, "memory: total", si(p.total_memory) + "B",
                  f"{si(c.peak)}B ({p.total_memory / c.peak - 1:+.0%})")
        t.add_row(p.name, f"sent a step, {len(c.collectives)} collectives", "", si(c.sent) + "B")
    return t
