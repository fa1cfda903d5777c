"""`distill-jax export` and `distill-jax verify-hf`."""

from pathlib import Path
from typing import Annotated

import typer


def export(
    model: Annotated[str, typer.Argument(help="a run, Hugging Face folder, hub id or gs:// / s3:// URL")],
    out: Annotated[Path, typer.Argument(help="folder to write; must not exist or be empty")],
    to: Annotated[str, typer.Option(help="format")] = "hf",
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16, float16; default: of config.json")] = None,
    max_shard: Annotated[float, typer.Option(help="GB of one safetensors file")] = 5.0,
    provider: Annotated[str | None, typer.Option(help="which trained model of the run")] = None,
) -> None:
    """Write a run as a Hugging Face folder: safetensors, config.json, tokenizer, generation_config.json."""
    from distill_jax.jobs.export import export as job

    job(model, out, to=to, dtype=dtype, max_shard_bytes=int(max_shard * 1e9), provider=provider)


def verify_hf(
    folder: Annotated[str, typer.Argument(help="Hugging Face folder, hub id or URL")],
    against: Annotated[str | None, typer.Option(help="the folder it should be identical to")] = None,
) -> None:
    """Check a folder: tensors bit by bit through us and back, logits against transformers + torch if installed."""
    from distill_jax.jobs.verify_hf import verify_hf as job

    job(folder, against=against)
