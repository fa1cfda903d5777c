"""`distill-jax import`: files of traces into a trace store."""

import json
import sys
from typing import Annotated, Any

import typer

Opt = typer.Option


def import_(
    files: Annotated[list[str], typer.Argument(
        help="JSONL, JSON, Parquet or CSV, also gzipped; the format is detected")],
    tokenizer: Annotated[str | None, Opt(help="run, Hugging Face folder, hub id or sentencepiece file")] = None,
    out: Annotated[str | None, Opt(help="folder or gs://, s3:// URL of the store to write")] = None,
    map_: Annotated[list[str] | None, Opt(
        "--map", help="FIELD=PATH: where a field is, e.g. question=prompt.text; a+b joins two")] = None,
    join: Annotated[list[str] | None, Opt(
        help="FILE:SIDE_KEY=ROW_KEY: fields of a side file, e.g. items.json:id=item_id (# = row number)")] = None,
    verify: Annotated[bool, Opt(help="check answers against the gold answer")] = True,
    keep: Annotated[str, Opt(help="all, correct, or not-wrong (found right, or not to be checked)")] = "not-wrong",
    max_rows: Annotated[int | None, Opt(help="read at most this many rows of each file")] = None,
    chat_template: Annotated[str | None, Opt(help="Jinja file or built-in name, instead of the tokenizer's")] = None,
    workers: Annotated[int | None, Opt(help="processes that check formulas")] = None,
    check_timeout: Annotated[float, Opt(help="seconds of CPU time for one comparison of formulas")] = 5.0,
    shard_rows: Annotated[int, Opt(help="traces written at once")] = 256,
    show: Annotated[int, Opt(help="print the first traces of each file, coloured by role, and write nothing")] = 0,
) -> None:
    """Import traces of any common format: detect, verify answers, render for a tokenizer, write a store.

    The same command continues an import that was stopped.
    """
    from distill_jax.jobs.import_rows import Inputs

    inputs = Inputs(files=tuple(files), maps=tuple(map_ or ()), joins=tuple(join or ()), verify=verify,
                    keep=keep, max_rows=max_rows)  # type: ignore[arg-type]
    if show:
        _show(inputs, show)
        return
    if tokenizer is None or out is None:
        raise ValueError("an import needs --tokenizer MODEL and --out DIR (or --show N to look at the traces)")
    from distill_jax.jobs.import_traces import ImportJob, import_traces

    summary = import_traces(ImportJob(inputs=inputs, tokenizer=tokenizer, out=out, chat_template=chat_template,
                                      workers=workers, timeout=check_timeout, shard_rows=shard_rows))
    print("\n".join(report(summary)), file=sys.stderr)


def report(summary: dict[str, Any]) -> list[str]:
    """The summary in a few lines."""
    lines = [f"{summary['rows_in']:,} rows in, {summary['traces']:,} traces, {summary['kept']:,} kept"]
    for title, key in (("rejected", "rejected"), ("verdicts", "verdicts"), ("flags", "flags"),
                       ("tokens", "by_role_tokens")):
        if summary[key]:
            lines.append(f"{title:>9}  " + ", ".join(f"{n:,} {k}" for k, n in summary[key].items()))
    if summary["timeouts"]:
        lines.append(f"{summary['timeouts']:,} checks timed out and count as unchecked")
    return lines


def _show(inputs: Any, count: int) -> None:
    from rich.console import Console
    from rich.text import Text

    from distill_jax.core.roles import ROLE_STYLE
    from distill_jax.jobs.import_rows import open_sources

    console = Console(highlight=False, soft_wrap=True)
    for source in open_sources(inputs):
        console.print(f"[bold]{source.file}[/]: {source.format.name}")
        shown = 0
        for c in source.candidates():
            if shown == count:
                break
            shown += 1
            if c.trace is None:
                console.print(Text(f"row {c.index}: rejected, {c.rejected} {c.detail}", "red"))
                continue
            known = {"gold": c.trace.gold, "verdict": c.trace.verdict, "flags": list(c.trace.flags)}
            console.print(Text(f"row {c.index}: {json.dumps(known, ensure_ascii=False)}", "bold"))
            for s in c.trace.segments:
                console.print(Text(f"[{s.role.name.lower()}] {s.text}", ROLE_STYLE[s.role]))
