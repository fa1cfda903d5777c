"""`distill-jax store`: look into a trace store and check it."""

import json
from typing import Annotated

import typer
from rich.console import Console

app = typer.Typer(no_args_is_help=True, help="Look into a trace store, or check every byte of it.")

Url = Annotated[str, typer.Argument(help="folder, gs:// or s3:// URL of a trace store")]


@app.command()
def inspect(
    url: Url,
    row: Annotated[int, typer.Option(help="row to show token by token")] = 0,
    tokens: Annotated[int, typer.Option(help="tokens of that row listed one a line", min=0)] = 32,
    start: Annotated[int | None, typer.Option(help="first token listed; default: where supervision begins")] = None,
    tokenizer: Annotated[str | None, typer.Option(help="to decode with; default: the one the header names")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print the counts as JSON instead")] = False,
) -> None:
    """Print the manifest, counts by role, lengths, verdicts, signals with their retained mass, and one row."""
    from distill_jax.jobs.inspect_store import open_tokenizer, print_row, print_summary, summary
    from distill_jax.traces.store import TraceStore

    store = TraceStore.open(url)
    facts = summary(store)
    if as_json:
        print(json.dumps(facts, indent=1, ensure_ascii=False))
        return
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=160)
    print_summary(facts, console)
    if len(store):
        tok, why = open_tokenizer(store, tokenizer)
        if tok is None:
            console.print(f"\ntokens are slices of the stored text (--tokenizer to decode them): {why}", markup=False)
        print_row(store, row, tok, console, tokens=tokens, start=start)


@app.command()
def verify(url: Url) -> None:
    """Read every byte and compare it with its checksums; names the first damaged shard and row."""
    from distill_jax.traces.store import TraceStore

    store = TraceStore.open(url)
    store.verify()
    print(f"{url}: {len(store)} rows in {len(store.shards)} shards and the signals {store.signals()} are whole")
