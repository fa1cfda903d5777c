"""`distill-jax doctor`."""

from typing import Annotated

import typer

Opt = typer.Option


def doctor(
    recipe: Annotated[str, typer.Argument(help="a recipe (.py, .yaml), or the folder or URL of a trace store")],
    stage: Annotated[str | None, Opt(help="training stage of the recipe; default: the first")] = None,
    tokenizer: Annotated[str | None, Opt(help="instead of the student's or the store's own")] = None,
    teacher: Annotated[list[str] | None, Opt(help="tokenizer of a teacher, repeatable; default: the recipe's")] = None,
    against: Annotated[list[str] | None, Opt(
        help="store or data file whose questions must not be among the training questions, repeatable")] = None,
    holdout: Annotated[float | None, Opt(help="share of questions held out, instead of the recipe's")] = None,
    set_: Annotated[list[str] | None, Opt("--set", help="path=value of the recipe, repeatable")] = None,
    as_json: Annotated[bool, Opt("--json", help="print JSON instead")] = False,
) -> None:
    """Look for what silently ruins a run: masks, tags, templates, vocabularies, cut answers, leaks, end tokens, shifts.

    Exits with 1 when something is wrong enough to stop for (an error).
    """
    import json

    from rich.console import Console

    from distill_jax.data.tokenizer import load_tokenizer
    from distill_jax.jobs.doctor import examine, print_report
    from distill_jax.jobs.opening import open_feed
    from distill_jax.jobs.patient import Patient

    feed = open_feed(recipe, overrides=set_, stage=stage, tokenizer=tokenizer, holdout=holdout)
    teachers = {**feed.teachers, **{t: load_tokenizer(t) for t in teacher or ()}}
    reports = [examine(Patient(spec, feed.tokenizer, teachers=teachers, vocabularies=feed.vocabularies,
                               against=against or ())) for spec in feed.stores]
    if as_json:
        print(json.dumps([{"path": r.path, "rows": r.rows, "looked_at": r.looked_at, "checks": r.checks,
                           "findings": [f.to_json() for f in r.findings]} for r in reports], indent=1))
    else:
        console = Console(highlight=False)
        for report in reports:
            print_report(report, console if console.is_terminal else Console(highlight=False, width=140))
    if any(r.worst() == "error" for r in reports):
        raise typer.Exit(1)
