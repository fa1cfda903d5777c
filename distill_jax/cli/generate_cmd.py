"""`distill-jax generate`: a teacher's traces into a store."""

import sys
from typing import Annotated, Any

import typer

from distill_jax.cli.parts_options import PartOption, PartsOption, RayNeedsOption, RayOption

Opt = typer.Option


def generate(
    questions: Annotated[str, typer.Argument(help="any file `import` reads, answered or not, or a store")],
    out: Annotated[str, Opt(help="folder or gs://, s3:// URL of the store to write")],
    teacher: Annotated[str, Opt(help="run, Hugging Face folder, hub id or URL")] = "",
    engine: Annotated[str, Opt(help="instead: OpenAI-compatible server, its URL as far as /v1")] = "",
    engine_model: Annotated[str, Opt(help="model on that server; default: its first")] = "",
    api_key_env: Annotated[str, Opt(help="environment variable that holds the server's key")] = "OPENAI_API_KEY",
    parallel: Annotated[int, Opt(help="requests to the server at a time")] = 16,
    tokenizer: Annotated[str, Opt(help="the store's tokenizer; default: the teacher's")] = "",
    n: Annotated[int, Opt("--n", help="samples of each question")] = 1,
    temperature: Annotated[float, Opt(help="0: greedy")] = 0.6,
    top_p: Annotated[float, Opt(help="keep the most probable tokens up to this mass")] = 0.95,
    top_k: Annotated[int, Opt(help="keep this many tokens; 0: all")] = 0,
    min_p: Annotated[float, Opt(help="keep tokens this fraction as probable as the best")] = 0.0,
    max_new_tokens: Annotated[int, Opt(help="longest completion")] = 2048,
    seed: Annotated[int, Opt(help="of the samples; the same gives the same traces")] = 0,
    verify: Annotated[bool, Opt(help="check answers against the gold answer")] = True,
    keep: Annotated[str, Opt(help="all, correct, or not-wrong (not found wrong, and finished)")] = "not-wrong",
    map_: Annotated[list[str] | None, Opt(
        "--map", help="FIELD=PATH: where a field is, e.g. question=prompt.text, gold=target")] = None,
    join: Annotated[list[str] | None, Opt(help="FILE:SIDE_KEY=ROW_KEY: fields of a side file")] = None,
    max_questions: Annotated[int | None, Opt(help="read at most this many rows")] = None,
    batch_size: Annotated[int, Opt(help="rows decoded at a time")] = 256,
    dtype: Annotated[str, Opt(help="of the teacher's computation: auto, float32, bfloat16, float16")] = "auto",
    part: PartOption = "",
    ray: RayOption = "",
    parts: PartsOption = 0,
    ray_needs: RayNeedsOption = "cpu=1",
    mesh: Annotated[str, Opt(help="device mesh, e.g. data=1,fsdp=-1,tensor=1; default: one device")] = "",
) -> None:
    """Let a teacher answer questions: sample, split into thinking and answer, verify, render, write a store.

    The same command continues a generation that was stopped.
    """
    from distill_jax.decode import Sampling
    from distill_jax.jobs.devices import parse_mesh
    from distill_jax.jobs.generate import EngineSpec, GenerateJob, Keeping
    from distill_jax.jobs.generate import generate as run
    from distill_jax.jobs.parts import Part
    from distill_jax.jobs.questions import QuestionSet
    from distill_jax.jobs.ray_parts import RayCluster, generate_on_ray

    server = EngineSpec(url=engine, model=engine_model, api_key_env=api_key_env, parallel=parallel) if engine else None
    job = GenerateJob(
        questions=QuestionSet(source=questions, maps=tuple(map_ or ()), joins=tuple(join or ()), limit=max_questions),
        out=out, teacher=teacher, tokenizer=tokenizer, n=n, seed=seed, batch_size=batch_size, dtype=dtype,
        engine=server,
        sampling=Sampling(temperature=temperature, top_p=top_p, top_k=top_k, min_p=min_p,
                          max_new_tokens=max_new_tokens),
        keeping=Keeping(verify=verify, keep=keep), part=Part.parse(part))
    cluster = RayCluster.parse(ray, parts, ray_needs, part)
    summary = run(job, mesh=parse_mesh(mesh)) if cluster is None else generate_on_ray(job, cluster, mesh)
    print("\n".join(report(summary)), file=sys.stderr)


def report(summary: dict[str, Any]) -> list[str]:
    """The summary in a few lines."""
    lines = [f"{summary['questions']:,} questions asked, {summary['solved']:,} of them answered right; "
             f"{summary['traces']:,} traces, {summary['kept']:,} kept"]
    for title, key in (("rejected", "rejected"), ("verdicts", "verdicts"), ("flags", "flags"),
                       ("tokens", "by_role_tokens")):
        if summary[key]:
            lines.append(f"{title:>9}  " + ", ".join(f"{n:,} {k}" for k, n in summary[key].items()))
    return lines
