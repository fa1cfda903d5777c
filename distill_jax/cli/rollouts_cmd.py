"""`distill-jax rollouts`: what a student wrote while it was trained on its own answers."""

from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True, help="Read what a student wrote while it was trained on its own answers.")


@app.callback()
def _() -> None:
    """Commands about rollouts."""


@app.command()
def inspect(
    run: Annotated[str, typer.Argument(help="folder of a run, or of its stage")],
    step: Annotated[int | None, typer.Option(help="update whose rollouts to read; default: the newest")] = None,
    group: Annotated[list[int] | None, typer.Option(help="group shown in full, repeatable; default 0")] = None,
    samples: Annotated[int, typer.Option(help="answers of a group that are shown", min=0)] = 4,
    clip: Annotated[bool, typer.Option(
        "--clip", help="mark tokens that the policy loss clips under the first checkpoint after the round")] = False,
    low: Annotated[float | None, typer.Option(help="with --clip: PPO's lower bound, in place of the recipe's")] = None,
    high: Annotated[float | None, typer.Option(help="with --clip: PPO's upper bound, in place of the recipe's")] = None,
) -> None:
    """Print a round: its numbers, a line for each question, and groups in full with rewards, advantages, and where
    answers were cut."""
    if not clip and (low, high) != (None, None):
        raise ValueError("--low and --high are bounds for --clip; give it as well")
    from rich.console import Console

    from distill_jax.jobs.show_rollouts import show_rollouts

    console = Console(highlight=False)
    show_rollouts(run, step, console if console.is_terminal else Console(highlight=False, width=160),
                  groups=group or [0], samples=samples, clip=(low, high) if clip else None)
