"""`load(MODEL)`: a model and its parameters from a run, a Hugging Face directory, a hub id or an object-store URL.

In a notebook:

    model, params = distill_jax.load("runs/kd")
    logits = model.apply({"params": params}, tokens)        # tokens int32 [B, T] -> float32 [B, T, V]
"""

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from jax.sharding import Mesh

from distill_jax.data.tokenizer import load_tokenizer
from distill_jax.models import families, hf
from distill_jax.models.transformer import Transformer
from distill_jax.sharding.rules import param_shardings
from distill_jax.traces.store.kv import Kv
from distill_jax.train.checkpoint import latest_params, latest_step

HUB_FILES = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja")


def load(source: str | Path, *, mesh: Mesh | None = None, dtype: Any = jnp.float32, provider: str = "student",
         compute: Any = None, **model_kwargs: Any) -> tuple[Transformer, dict[str, Any]]:
    """The model and its parameters, laid out over `mesh` (or on the first device).

    source    run (`runs/<name>` or a stage in it), Hugging Face directory, hub id, `gs://` or `s3://` URL of either
    dtype     of the parameters; None keeps what is stored
    provider  which trained model of a run
    compute   dtype of the computation (default: the parameters', float32 where they keep the stored one)
    model_kwargs: remat, attention of `Transformer`.
    Raises ValueError saying what was found where no model could be read.
    """
    folder = local_folder(source)
    model_kwargs["dtype"] = compute or dtype or jnp.float32
    if is_run(folder):
        config = families.from_hf(json.loads((folder / "model" / "config.json").read_text()))
        shardings = None if mesh is None else lambda shapes: param_shardings(mesh, shapes)
        params = latest_params(folder / "checkpoints", provider, shardings=shardings, dtype=dtype)
        return Transformer(_with_real_ids(config, folder), **model_kwargs), params
    if not (folder / "config.json").is_file():
        there = sorted(p.name for p in folder.iterdir())[:12]
        raise ValueError(f"{source} is neither a run nor a Hugging Face directory: no config.json, no model/; it has "
                         f"{there}")
    model, params = hf.load(folder, mesh=mesh, param_dtype=dtype, **model_kwargs)
    return model.clone(config=_with_real_ids(model.config, folder)), params


def is_run(folder: Path) -> bool:
    return (folder / "model" / "config.json").is_file()


def _with_real_ids(config: Any, folder: Path) -> Any:
    """The configuration with the number of ids the tokenizer beside it has; unchanged where there is no tokenizer."""
    try:
        real = load_tokenizer(folder).real
    except ValueError:
        return config
    return dataclasses.replace(config, real_vocab=real) if real < config.vocab_size else config


def local_folder(source: str | Path) -> Path:
    """The local folder of a MODEL: a run's trained stage, a directory, or what was downloaded (once a host)."""
    text = str(source)
    if "://" in text and not text.startswith("file://"):
        return _download(text)
    path = Path(text.removeprefix("file://"))
    if path.is_dir():
        return _stage_of_run(path)
    if text.startswith((".", "/", "~")) or text.count("/") > 1 or path.exists():
        raise ValueError(f"no model at {text!r}: there is no such directory")
    return _from_hub(text)


def _stage_of_run(path: Path) -> Path:
    """A run of several stages means the model of its last training stage."""
    pointer = path / "run.json"
    final = json.loads(pointer.read_text()).get("final") if pointer.is_file() else ""
    folder = path / final if final else path
    if is_run(folder) and latest_step(folder / "checkpoints") is None:
        raise ValueError(f"the run {folder} has no complete checkpoint yet; let it train (distill-jax train)")
    if pointer.is_file() and not is_run(folder):
        raise ValueError(f"the run {path} has not come to its last stage {final!r} yet; name an earlier one: "
                         f"{sorted(p.parent.name for p in path.glob('*/model'))}")
    return folder


def _from_hub(name: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=list(HUB_FILES)))
    except Exception as e:  # the hub client raises a dozen kinds
        reason = str(e).strip().splitlines()[0] if str(e).strip() else type(e).__name__
        raise ValueError(f"no model {name!r}: it is not a local directory, and the hub did not give it ({reason}). "
                         "Offline, download it elsewhere and pass its directory") from None


def cache_dir() -> Path:
    """Where downloads are kept: $DISTILL_JAX_CACHE, else the user's cache folder."""
    return Path(os.environ.get("DISTILL_JAX_CACHE") or Path.home() / ".cache" / "distill_jax")


def _download(url: str) -> Path:
    """Copy everything below an object-store URL to the cache, file by file; the next call finds it there."""
    target = cache_dir() / hashlib.blake2b(url.rstrip("/").encode(), digest_size=10).hexdigest()
    with _only_one(target.with_suffix(".lock")):
        if (target / ".complete").is_file():
            return _stage_of_run(target)
        store = Kv(url)
        names = store.list("")
        if not names:
            raise ValueError(f"nothing at {url}")
        for name in names:
            data = store.read(name)
            assert data is not None, name
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            (target / name).write_bytes(data)
        (target / ".complete").touch()
    return _stage_of_run(target)


@contextlib.contextmanager
def _only_one(lock: Path) -> Iterator[None]:
    """One process of this host at a time: the others wait and then find the files there."""
    lock.parent.mkdir(parents=True, exist_ok=True)
    with open(lock, "w") as f:
        fcntl.flock(f, fcntl.LOCK_EX)
        yield
