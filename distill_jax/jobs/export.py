"""`distill-jax export MODEL --to hf DIR`: a run as a Hugging Face folder that transformers, vLLM and others serve."""

import json
from collections.abc import Iterable
from pathlib import Path
from tempfile import TemporaryDirectory

import jax

from distill_jax.data.tokenizer import load_tokenizer
from distill_jax.jobs.context import Echo, say
from distill_jax.loading import load, local_folder, model_files
from distill_jax.models import hf
from distill_jax.sharding import make_mesh

FORMATS = ("hf",)
DTYPES = ("float32", "bfloat16", "float16")


def export(source: str, out: str | Path, *, to: str = "hf", dtype: str | None = None,
           max_shard_bytes: int = hf.MAX_SHARD_BYTES, provider: str | None = None, echo: Echo = say) -> None:
    """Write the newest parameters of a run (or any MODEL) as safetensors with configuration and tokenizer.

    dtype: of the weights; default: what config.json says, which for a run is float32, the dtype it trained in.
    Raises ValueError where `out` is not empty, or the format unknown.
    """
    if to not in FORMATS:
        raise ValueError(f"cannot export to {to!r}; known: {', '.join(FORMATS)}")
    if dtype not in (None, *DTYPES):
        raise ValueError(f"dtype {dtype!r} is unknown; known: {', '.join(DTYPES)}")
    if max_shard_bytes < 1:
        raise ValueError(f"--max-shard must be more than 0 GB, got {max_shard_bytes / 1e9:g}")
    folder = local_folder(source)
    mesh = make_mesh(fsdp=-1) if len(jax.devices()) > 1 else None  # what does not fit one device fits all of them
    model, params = load(source, mesh=mesh, dtype=None, provider=provider)
    with TemporaryDirectory() as scratch:
        extras = _companions(model_files(folder), Path(scratch))
        hf.save(out, model, params, extras, dtype=dtype, max_shard_bytes=max_shard_bytes)
    files = sorted(Path(out).iterdir())
    size = sum(f.stat().st_size for f in files)
    echo(f"{out}: {model.config.model_type}, {model.config.num_params:,} parameters, {size / 1e6:,.1f} MB in "
         f"{len(files)} files: {', '.join(f.name for f in files)}")


def _companions(folder: Path, scratch: Path) -> Iterable[Path]:
    """Configuration and tokenizer files; a missing generation_config.json is made from the tokenizer, so that a server
    knows which tokens end an answer."""
    files = hf.companions(folder)
    names = {f.name for f in files}
    if "generation_config.json" not in names and names & {"tokenizer.json", "tokenizer.model"}:
        tok = load_tokenizer(folder)
        ids = {"bos_token_id": tok.bos_id, "eos_token_id": list(tok.eos_ids) or None, "pad_token_id": tok.pad_id}
        made = scratch / "generation_config.json"
        made.write_text(json.dumps({k: v for k, v in ids.items() if v is not None}, indent=2) + "\n")
        files.append(made)
    return files
