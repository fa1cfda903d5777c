"""`distill-jax world`: questions of the generated reasoning world."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from distill_jax.jobs.world import print_summary, show_world, write_world
from distill_jax.traces.world.facts import LAYOUTS
from distill_jax.traces.world.generate import KINDS, RENDERINGS, SPLITS, WorldSpec
from distill_jax.traces.world.thoughts import STYLES
from distill_jax.traces.world.tokenizer import build_tokenizer

Opt = typer.Option


def world(
    kind: Annotated[str, Opt(help=f"one of {', '.join(KINDS)}")] = "two_hop",
    k: Annotated[int, Opt(help="documents, sentences, pairs, people or digits")] = 8,
    n: Annotated[int, Opt("--n", help="how many traces to write")] = 1000,
    rendering: Annotated[str, Opt(help=" or ".join(RENDERINGS))] = "compact",
    style: Annotated[str, Opt(help="oracle trace: " + " or ".join(STYLES))] = "minimal",
    split: Annotated[str, Opt(help=" or ".join(SPLITS))] = "train",
    layout: Annotated[str, Opt(help="where the first hop stands: " + ", ".join(LAYOUTS))] = "random",
    position: Annotated[int | None, Opt(help="of the document with the answer, from 0; default: drawn")] = None,
    seed: Annotated[int, Opt(help="of the questions; the same gives the same")] = 0,
    out: Annotated[Path | None, Opt(help="JSON lines file to write")] = None,
    show: Annotated[int, Opt(help="print this many questions instead")] = 0,
    tokenizer: Annotated[Path | None, Opt(help="folder to build the rendering's tokenizer in")] = None,
) -> None:
    """Make questions with oracle reasoning: documents, puzzles, arithmetic; every answer is right by construction."""
    spec = WorldSpec(kind=kind, k=k, rendering=rendering, style=style, split=split, layout=layout,  # type: ignore[arg-type]
                     position=position, seed=seed)
    if not (show or out or tokenizer):
        raise ValueError("nothing to do: give --out FILE.jsonl, --show N or --tokenizer DIR")
    for text in show_world(spec, show):
        print(text)
    if tokenizer:
        build_tokenizer(tokenizer, rendering)
        print(f"tokenizer of the {rendering} rendering in {tokenizer}", file=sys.stderr)
    if out:
        print_summary(write_world(spec, n, out), sys.stderr)
