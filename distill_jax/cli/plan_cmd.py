"""`distill-jax plan`."""

from pathlib import Path
from typing import Annotated

import typer


def plan(
    recipe: Annotated[Path, typer.Argument(help="a recipe: configs/recipes/kd.py or a run's recipe.yaml")],
    on: Annotated[str, typer.Option(help="device and count, or a TPU slice: h200:8, v5p:16, v5p:8x8x16, rtx4090")]
    = "cpu",
    set_: Annotated[list[str] | None, typer.Option("--set", help="path=value, repeatable")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON instead of a table")] = False,
    price: Annotated[float | None, typer.Option(help="of one device for an hour: prints what the run costs")] = None,
    remat: Annotated[bool, typer.Option("--remat", help="a table of the remat policies: memory and time")] = False,
    compile_: Annotated[bool, typer.Option("--compile", help="also ask the target's compiler (no device needed)")]
    = False,
) -> None:
    """Say what a recipe will need: bytes, memory per device, FLOPs, time, money. Exit code 2 where it does not fit."""
    import json

    from rich.console import Console

    from distill_jax.jobs import hardware
    from distill_jax.jobs.changes import refuse
    from distill_jax.jobs.plan import as_numbers, plan_recipe, table
    from distill_jax.jobs.plan_tables import compiled_table, compiled_text, remat_table
    from distill_jax.recipe_file import load_recipe

    target = hardware.parse(on)
    loaded, device, count = load_recipe(recipe, set_), target.device, target.count
    plans = plan_recipe(loaded, device, count)
    if not plans:
        raise ValueError(f"{recipe} has no training stage to plan")
    if as_json:
        print(json.dumps([as_numbers(p, price) for p in plans], indent=1))
    else:
        Console().print(table(plans, device, on, count, price))
    if remat:
        for p in plans:
            Console().print(remat_table(loaded, p.name, device, count))
    refuse(loaded, plans, target)
    if compile_:
        results = [(p, compiled_text(loaded, p.name, target)) for p in plans]
        Console().print(compiled_table(results, target))
