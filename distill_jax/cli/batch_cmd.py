"""`distill-jax batch`."""

from typing import Annotated

import typer

Opt = typer.Option


def batch(
    recipe: Annotated[str, typer.Argument(help="a recipe (.py, .yaml), or the folder or URL of a trace store")],
    step: Annotated[int, Opt(help="which batch", min=0)] = 0,
    row: Annotated[list[int] | None, Opt(help="row of the batch to show, repeatable; default 0")] = None,
    tokens: Annotated[int, Opt(help="tokens of each row listed one a line", min=0)] = 64,
    start: Annotated[int | None, Opt(help="first token listed; default: where supervision begins")] = None,
    stage: Annotated[str | None, Opt(help="training stage of the recipe; default: the first")] = None,
    tokenizer: Annotated[str | None, Opt(help="instead of the student's or the store's own")] = None,
    seq_len: Annotated[int | None, Opt(help="instead of the recipe's; a store: its longest row")] = None,
    rows: Annotated[int | None, Opt(help="rows of the batch")] = None,
    signal: Annotated[list[str] | None, Opt(help="signal to show beside the tokens, repeatable")] = None,
    set_: Annotated[list[str] | None, Opt("--set", help="path=value of the recipe, repeatable")] = None,
) -> None:
    """Print a training batch token by token, coloured by role, with weights and the teacher's signal."""
    from rich.console import Console

    from distill_jax.data.sources import open_source
    from distill_jax.jobs.opening import open_feed
    from distill_jax.jobs.show_batch import show_batch

    feed = open_feed(recipe, overrides=set_, stage=stage, tokenizer=tokenizer, seq_len=seq_len, rows=rows,
                     signals=tuple(signal) if signal else None)
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=160)
    source = open_source(feed.source, feed.tokenizer, seed=feed.seed, readings=feed.readings)
    show_batch(source, step, feed.tokenizer, console, rows=row or [0], tokens=tokens, start=start)
