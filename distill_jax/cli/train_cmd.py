"""`distill-jax train`."""

import sys
from pathlib import Path
from typing import Annotated

import typer


def train(
    recipe: Annotated[Path, typer.Argument(help="a recipe: configs/recipes/kd.py or a run's recipe.yaml")],
    set_: Annotated[list[str] | None, typer.Option("--set", help="path=value, e.g. optim.peak_lr=1e-5")] = None,
) -> None:
    """Run a recipe. The same command continues a run that was stopped, to the bit."""
    from distill_jax.jobs.processes import index, join

    join()
    from distill_jax.recipe import load_recipe

    loaded = load_recipe(recipe, set_)
    from distill_jax.jobs.run_recipe import run_recipe

    if not run_recipe(loaded) and index() == 0:
        print("stopped; run the same command to continue", file=sys.stderr)
