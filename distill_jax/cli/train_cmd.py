"""`distill-jax train`."""

import os
import sys
from pathlib import Path
from typing import Annotated

import typer


def train(
    recipe: Annotated[Path, typer.Argument(help="a recipe: configs/recipes/kd.py or a run's recipe.yaml")],
    set_: Annotated[list[str] | None, typer.Option(
        "--set", help="path=value, e.g. optim.peak_lr=1e-5; * is every one: source.sources.*.seq_len=512")] = None,
    unsafe_code: Annotated[bool, typer.Option(
        "--unsafe-code", help="run programs that the model writes as this user where no sandbox can be had")] = False,
    coordinator: Annotated[str | None, typer.Option(
        help="host:port of process 0 of a run of several processes (DISTILL_JAX_COORDINATOR)")] = None,
    processes: Annotated[int | None, typer.Option(help="how many there are (DISTILL_JAX_PROCESSES)")] = None,
    process: Annotated[int | None, typer.Option(help="number of this one, from 0 (DISTILL_JAX_PROCESS)")] = None,
) -> None:
    """Run a recipe. The same command continues a run that was stopped, to the bit."""
    from distill_jax.jobs.processes import NAMES, index, joined

    given = {n: str(v) for n, v in zip(NAMES, (coordinator, processes, process)) if v is not None}
    with joined({**os.environ, **given}):
        from distill_jax.recipe_file import load_recipe

        loaded = load_recipe(recipe, set_)
        from distill_jax.jobs.run_recipe import allow_unsafe_code, run_recipe

        if not run_recipe(allow_unsafe_code(loaded) if unsafe_code else loaded) and index() == 0:
            print("stopped; run the same command to continue", file=sys.stderr)
