"""`distill-jax score`: a teacher's signal beside the rows of a store."""

import json
import sys
from typing import Annotated, Any

import typer

from distill_jax.cli.parts_options import PartOption, PartsOption, RayNeedsOption, RayOption

Opt = typer.Option


def score(
    store: Annotated[str, typer.Argument(help="folder or gs://, s3:// URL of the store")],
    teacher: Annotated[str, Opt(help="run, Hugging Face folder, hub id or URL")],
    signal: Annotated[str, Opt(help="topk:K (the K most probable tokens, and the tail's mass), sampled:N (N draws), "
                                "hidden or hidden:int8 (final states, the head once), token")] = "topk:64",
    name: Annotated[str, Opt(help="name of the signal in the store; default: topkK, sampledN, hidden, token")] = "",
    batch_tokens: Annotated[int, Opt(help="padded tokens of a batch")] = 16384,
    dtype: Annotated[str, Opt(help="of the computation: auto, float32, bfloat16, float16")] = "auto",
    on: Annotated[str, Opt(help="roles to score, or all")] = "think,answer,tool_call",
    precision: Annotated[str, Opt(help="of the stored values: u8, u16, f16, f32; default by kind")] = "",
    skip_long: Annotated[bool, Opt(help="leave rows beyond the teacher's context without signal")] = False,
    tokenizer: Annotated[str, Opt(help="the teacher's tokenizer, where it is not beside the teacher")] = "",
    student_tokenizer: Annotated[str, Opt(help="the store's tokenizer, for a teacher of another vocabulary; default: "
                                               "the one the store names")] = "",
    across: Annotated[str, Opt(help="another vocabulary, outcomes the student lacks: match (kept apart, for ULD) or "
                                    "prefix (to the longest token they begin with, for divergences)")] = "match",
    part: PartOption = "",
    ray: RayOption = "",
    parts: PartsOption = 0,
    ray_needs: RayNeedsOption = "cpu=1",
    mesh: Annotated[str, Opt(help="device mesh, e.g. data=1,fsdp=-1,tensor=1; default: one device")] = "",
    as_json: Annotated[bool, Opt("--json", help="print the report as JSON")] = False,
) -> None:
    """Write what a teacher thinks of every token of a store: its top K outcomes, draws from it, its final states, or
    the log-prob of the token itself.

    The same command continues a scoring that was stopped.
    """
    from distill_jax.core.roles import parse_roles
    from distill_jax.jobs.devices import parse_mesh
    from distill_jax.jobs.parts import Part
    from distill_jax.jobs.ray_parts import RayCluster, score_on_ray
    from distill_jax.jobs.score import ScoreJob
    from distill_jax.jobs.score import score as run

    job = ScoreJob(store=store, teacher=teacher, signal=signal, name=name, batch_tokens=batch_tokens, dtype=dtype,
                   on=None if on == "all" else parse_roles(on), precision=precision, skip_long=skip_long,
                   tokenizer=tokenizer, student_tokenizer=student_tokenizer, across=across,
                   part=Part.parse(part))
    cluster = RayCluster.parse(ray, parts, ray_needs, part)
    report = run(job, mesh=parse_mesh(mesh)) if cluster is None else score_on_ray(job, cluster, mesh)
    print(json.dumps(report, indent=1) if as_json else "\n".join(lines(report)),
          file=sys.stdout if as_json else sys.stderr)


def lines(report: dict[str, Any]) -> list[str]:
    """The report for a person."""
    if "part" in report:
        return [f"part {report['part']} of signal {report['signal']} is whole: {report['rows']:,} rows in "
                f"{report['shards']} shards, {report['shards_scored_now']} of them scored now; when all parts are, "
                f"`distill-jax store join STORE {report['signal']}` makes the signal"]
    where = "stored tokens" if report["attached"] == "tokens" else (
        f"the teacher's own rendering, attached by byte offsets to {report['coverage']:.1%} of the supervised tokens")
    if report["attached"].startswith("groups"):
        where = (f"the teacher's own tokens, which cover the same bytes as {report['coverage']:.1%} of the supervised "
                 f"tokens; {report['with_distribution']:.1%} have a distribution")
    out = [f"signal {report['signal']} ({report['kind']}): {report['rows']:,} rows, {report['tokens']:,} tokens with "
           f"signal, from {where}"]
    out += [f"  {n:,} rows without signal: {why}" for why, n in report["rows_without_signal"].items()]
    shows_mass = report["kind"].startswith(("topk", "sampled"))
    kept = lambda r: f", retained mass {r['mass']:.4f}" if shows_mass else ""
    for title, r in (("all", report), *report["by_role"].items()):
        if r.get("tokens"):
            out.append(f"  {title:>9}  {r['tokens']:>12,} tokens, teacher NLL {r['nll']:.4f}, entropy "
                       f"{r['entropy']:.4f} nats{kept(r)}")
    if report["tokens_read"]:
        out.append(f"  read {report['tokens_read']:,} tokens in {report['seconds']:.1f} s: "
                   f"{report['tokens_per_second']:,.0f} tokens/s")
    else:
        out.append("  it was complete already: nothing to do")
    return out
