"""`distill-jax profile`."""

from pathlib import Path
from typing import Annotated

import typer


def profile(
    recipe: Annotated[Path, typer.Argument(help="a recipe: configs/recipes/kd.py or a run's recipe.yaml")],
    set_: Annotated[list[str] | None, typer.Option("--set", help="path=value, repeatable")] = None,
    stage: Annotated[str | None, typer.Option(help="name of the training stage; default: the last")] = None,
    steps: Annotated[int, typer.Option(help="updates under the profiler")] = 3,
    top: Annotated[int, typer.Option(help="longest instructions to show")] = 12,
    out: Annotated[Path | None, typer.Option(help="a new folder; default: RUN/profile/STAGE-TIME")] = None,
) -> None:
    """Run a few updates under the profiler: a trace for XProf or Perfetto, and a table of where the step goes."""
    import os
    import time

    from rich.console import Console

    from distill_jax.jobs.processes import index, joined

    with joined(os.environ):
        from distill_jax.jobs.profile import profile_stage, stage_to_profile, tables
        from distill_jax.recipe_file import load_recipe

        loaded = load_recipe(recipe, set_)
        chosen = stage_to_profile(loaded, stage)
        folder = out or loaded.folder / "profile" / f"{chosen.name}-{time.strftime('%Y%m%d-%H%M%S')}"
        if folder.exists():
            raise ValueError(f"{folder} is there already; give a new folder with --out")
        measured = profile_stage(loaded, chosen, folder, steps)
        if index() == 0:
            for table in tables(measured, top):
                Console().print(table)
            print(f"trace: {folder / 'trace'} (xprof --logdir, or perfetto.dev with the .json.gz in it)")
