"""`distill-jax store`: look into a trace store and check it."""

import json
import sys
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


@app.command()
def join(
    url: Url,
    signal: Annotated[str, typer.Argument(help="a signal's name, e.g. topk64; without it the store's rows")] = "",
) -> None:
    """Put together what `score`, `generate` or `ops` with --part I/N have written; names the parts that are missing."""
    from distill_jax.jobs.parts import join as join_signal
    from distill_jax.jobs.store_parts import join_rows
    from distill_jax.traces.store import TraceStore

    if signal:
        print(f"signal {signal}: {join_signal(TraceStore.open(url), signal):,} rows", file=sys.stderr)
    else:
        print(f"{url}: {join_rows(url)['kept']:,} rows", file=sys.stderr)


@app.command()
def ingest(
    url: Url,
    dump: Annotated[str, typer.Argument(help="JSONL or Parquet: vLLM or SGLang prompt log-probs, OpenAI-style "
                                             "logprobs, or columns of ids and log-probs; a line a row of the store")],
    k: Annotated[int, typer.Option(help="outcomes kept a token at most; 0: only the token's own log-prob", min=0)] = 64,
    name: Annotated[str, typer.Option(help="of the signal; default: topkK or token")] = "",
    teacher: Annotated[str, typer.Option(help="who said it, for the header")] = "",
    precision: Annotated[str, typer.Option(help="of the stored log-probs: u8, u16, f16, f32")] = "",
    on: Annotated[str, typer.Option(help="roles to keep, or all")] = "think,answer,tool_call",
    max_wrong: Annotated[float, typer.Option(help="share of rows that may not fit the store")] = 0.01,
    tokenizer: Annotated[str, typer.Option(help="where tokens are named by their text; default: the store's")] = "",
) -> None:
    """Log-probs that an engine has computed already become a signal of the store, without scoring anything.

    Its tokens must be the stored ones: a row is used up to its first token that differs.
    """
    from distill_jax.core.roles import parse_roles
    from distill_jax.jobs.ingest import IngestJob
    from distill_jax.jobs.ingest import ingest as run
    from distill_jax.jobs.inspect_store import open_tokenizer
    from distill_jax.traces.store import TraceStore

    tok, _ = open_tokenizer(TraceStore.open(url), tokenizer or None)
    report = run(IngestJob(store=url, dump=dump, k=k, name=name, teacher=teacher, precision=precision,
                           on=None if on == "all" else parse_roles(on), max_wrong=max_wrong), tok)
    print(f"signal {report['signal']}: {report['rows_with_signal']:,} of {report['rows']:,} rows, "
          f"{report['tokens']:,} tokens", file=sys.stderr)
    for why, count in report["wrong"].items():
        print(f"  {count:,} rows: {why}", file=sys.stderr)
    if report["unknown_outcomes"]:
        print(f"  at {report['unknown_outcomes']:,} tokens an outcome has no id here: its mass is the tail's",
              file=sys.stderr)


@app.command()
def fidelity(
    url: Url,
    teacher: Annotated[str, typer.Option(help="the MODEL that made the signals")],
    student: Annotated[str, typer.Option(help="a MODEL at the start of its training")],
    signals: Annotated[str, typer.Option(help="names, separated by commas; default: all")] = "",
    out: Annotated[str, typer.Option(help="folder for fidelity.json, .md and .png")] = "",
    holdout: Annotated[float, typer.Option(help="share of the questions held out; 0: any row")] = 0.02,
    tokens: Annotated[int, typer.Option(help="tokens measured at most", min=1)] = 4096,
    dtype: Annotated[str, typer.Option(help="of the computation")] = "float32",
) -> None:
    """What the stored signals are worth: KL and gradients against the whole teacher, calibration, bytes a token.

    Angles are between gradients of forward KL from the signal and from the whole teacher, over all tokens: of the
    student's head (summed over tokens) and of its logits (every token by itself).
    """
    from pathlib import Path

    from distill_jax.eval.fidelity import table, write
    from distill_jax.jobs.fidelity import FidelityJob
    from distill_jax.jobs.fidelity import fidelity as run

    report = run(FidelityJob(store=url, teacher=teacher, student=student, holdout=holdout, tokens=tokens, dtype=dtype,
                             signals=tuple(s for s in signals.split(",") if s)))
    print(table(report), end="")
    if out:
        print("\n".join(str(p) for p in write(report, Path(out))), file=sys.stderr)
