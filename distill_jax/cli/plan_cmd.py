"""`distill-jax plan`."""

from pathlib import Path
from typing import Annotated

import typer


def plan(
    recipe: Annotated[Path, typer.Argument(help="a recipe: configs/recipes/kd.py or a run's recipe.yaml")],
    on: Annotated[str, typer.Option(help="device and count, e.g. h200:8, v5p:16, rtx4090")] = "cpu",
    set_: Annotated[list[str] | None, typer.Option("--set", help="path=value, repeatable")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON instead of a table")] = False,
) -> None:
    """Say what a recipe will need: bytes, memory per device, FLOPs, time."""
    import dataclasses
    import json

    from rich.console import Console

    from distill_jax.jobs import hardware
    from distill_jax.jobs.plan import fits, plan_recipe, table
    from distill_jax.recipe_file import load_recipe

    name, device, count = hardware.parse(on)
    plans = plan_recipe(load_recipe(recipe, set_), device, count)
    if not plans:
        raise ValueError(f"{recipe} has no training stage to plan")
    if as_json:
        print(json.dumps([dataclasses.asdict(p) | {"total_memory": p.total_memory} for p in plans], indent=1))
    else:
        Console().print(table(plans, device, name, count))
    short = [p.name for p in plans if not fits(p, device)]
    if short:
        raise ValueError(f"does not fit {name} ({device.memory / 1e9:.0f} GB): stage {', '.join(short)}; try "
                         "student.remat=full, more micro_batches, student.precision=bfloat16, or a larger mesh.fsdp")
