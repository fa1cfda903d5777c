"""`distill-jax ops`: the traces of a store, changed or chosen by text Ops, into a new store."""

import json
import sys
from typing import Annotated, Any

import typer

from distill_jax.cli.parts_options import PartOption, PartsOption, RayNeedsOption, RayOption

Opt = typer.Option


def ops(
    store: Annotated[str, typer.Argument(help="folder or gs://, s3:// URL of the store to read")],
    op: Annotated[list[str], Opt(help="in their order: keep_correct, 'max_length: {chars: 4000}', module:Class, ...")],
    out: Annotated[str, Opt(help="folder or URL of the store to write")],
    tokenizer: Annotated[str, Opt(help="the new store's; default: the one that made the old one")] = "",
    seed: Annotated[int, Opt(help="of Ops that draw")] = 0,
    shard_rows: Annotated[int, Opt(help="traces written at once, and the most that a kill makes do again")] = 256,
    part: PartOption = "",
    ray: RayOption = "",
    parts: PartsOption = 0,
    ray_needs: RayNeedsOption = "cpu=1",
    as_json: Annotated[bool, Opt("--json", help="print the summary as JSON")] = False,
) -> None:
    """Apply text Ops to the traces of a store and write what is left to a new one, rendered; signals stay behind.

    The same command continues a run that was stopped.
    """
    from distill_jax.jobs.ops import OpsJob, parse_op, run_ops
    from distill_jax.jobs.parts import Part
    from distill_jax.jobs.ray_parts import RayCluster, ops_on_ray

    job = OpsJob(store=store, out=out, ops=tuple(parse_op(o) for o in op), tokenizer=tokenizer, seed=seed,
                 shard_rows=shard_rows, part=Part.parse(part))
    cluster = RayCluster.parse(ray, parts, ray_needs, part)
    summary = run_ops(job) if cluster is None else ops_on_ray(job, cluster)
    print(json.dumps(summary, indent=1) if as_json else "\n".join(report(summary)),
          file=sys.stdout if as_json else sys.stderr)


def report(summary: dict[str, Any]) -> list[str]:
    """The summary in a few lines."""
    lines = [f"{summary['traces']:,} traces read, {summary['kept']:,} written, {summary['tokens']:,} tokens"]
    for op, left in zip(summary["settings"]["ops"], summary["after"]):
        fields = ", ".join(f"{k}={v}" for k, v in op.items() if k != "type")
        lines.append(f"  {left:>9,} after {op['type'].rpartition(':')[2]}({fields})")
    bad = summary["rejected"]["cannot_render"]
    return lines + ([f"  {bad:,} of them cannot be rendered: rejects.jsonl"] if bad else [])
