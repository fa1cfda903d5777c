"""`load(MODEL)`: a model and its parameters from a run, a Hugging Face directory, a hub id or an object-store URL.

In a notebook:

    model, params = distill_jax.load("runs/kd")
    logits = model.apply({"params": params}, tokens)        # tokens int32 [B, T] -> float32 [B, T, V]
"""

import json
import re
from collections.abc import Sequence
from dataclasses import replace
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from distill_jax.core.tree import paths
from distill_jax.data.tokenizer import load_tokenizer
from distill_jax.jobs.mirror import Remote, mirror
from distill_jax.models import hf
from distill_jax.models.config import ModelConfig
from distill_jax.models.families import from_hf
from distill_jax.models.lora import from_json, merge
from distill_jax.models.transformer import Transformer
from distill_jax.sharding import DEFAULT_RULES, Rules, param_shardings
from distill_jax.train.checkpoint import COMMITTED, checkpoints_of, latest_params, latest_step

WEIGHTS = ("model.safetensors", "model-*.safetensors", "model.safetensors.index.json")
TOKENIZER = ("tokenizer.json*", "tokenizer.model*", "vocab.json*", "*.model")


def load(source: str | Path, *, mesh: Mesh | None = None, rules: Rules = DEFAULT_RULES, dtype: Any = jnp.float32,
         compute: Any = None, provider: str | None = None, step: int | None = None, **model_kwargs: Any,
         ) -> tuple[Transformer, dict[str, Any]]:
    """The model and its parameters, laid out over `mesh` by `rules` (or on the first device).

    source    run (`runs/<name>` or a stage in it), Hugging Face directory, hub id, `gs://` or `s3://` URL of either
    dtype     of the parameters; None keeps what is stored
    compute   dtype of the computation (default: the parameters', float32 where they keep the stored one)
    provider  which trained model of a run; default: `student`, or the only one there is
    step      update whose checkpoint of a run; default: the newest
    model_kwargs: remat, attention, matmul of `Transformer`.
    Ids that the tokenizer beside the model does not have get no probability (`ModelConfig.real_vocab`).
    Raises ValueError saying what was found where no model could be read.
    """
    folder = local_folder(source)
    adapter = folder / "model" / "adapter.json"
    if adapter.is_file():
        model, params = _merged(adapter, mesh=mesh, rules=rules, dtype=dtype, compute=compute, provider=provider,
                                step=step, **model_kwargs)
        return model.clone(config=_with_real_ids(model.config, folder)), params
    model_kwargs["dtype"] = compute or dtype or jnp.float32
    if is_run(folder):
        model = Transformer(from_hf(hf.read_config(folder / "model")), **model_kwargs)
        params = _from_checkpoint(folder, model, provider, mesh=mesh, rules=rules, dtype=dtype, step=step)
    else:
        model, params = hf.load(folder, mesh=mesh, rules=rules, param_dtype=dtype, **model_kwargs)
    return model.clone(config=_with_real_ids(model.config, folder)), params


def is_run(folder: Path) -> bool:
    return (folder / "model" / "config.json").is_file()


def model_files(folder: Path) -> Path:
    """Where config.json and tokenizer of what `local_folder` gave lie."""
    return folder / "model" if is_run(folder) else folder


def local_folder(source: str | Path) -> Path:
    """The local folder of a MODEL: a run's trained stage, a directory, or what was downloaded (once a host)."""
    text = str(source)
    if "://" in text and not text.startswith("file://"):
        return _download(text)
    path = Path(text.removeprefix("file://")).expanduser()
    if path.is_dir():
        return _local(path)
    if text.startswith((".", "/", "~")) or text.count("/") > 1 or path.exists():
        raise ValueError(f"no model at {text!r}: there is no such directory")
    return _from_hub(text)


def _local(path: Path) -> Path:
    """A directory that holds a model; a run of several stages means that of its last training stage."""
    pointer = path / "run.json"
    final = json.loads(pointer.read_text()).get("final") if pointer.is_file() else ""
    folder = path / final if final else path
    if is_run(folder):
        if latest_step(checkpoints_of(folder)) is None:
            raise ValueError(f"the run {folder} has no complete checkpoint yet; let it train (distill-jax train)")
        return folder
    if pointer.is_file():
        raise ValueError(f"the run {path} has not come to its last stage {final!r} yet; name an earlier one: "
                         f"{sorted(p.parent.name for p in path.glob('*/model'))}")
    if not (folder / "config.json").is_file():
        there = sorted(p.name for p in folder.iterdir())[:12]
        raise ValueError(f"{path} is neither a run nor a Hugging Face directory: no config.json, no model/; it has "
                         f"{there}")
    return folder


def hub_config(name: str) -> Path:
    """`config.json` of a hub id, without its weights. Raises ValueError where the hub does not give it."""
    return _from_hub(name, ("config.json",)) / "config.json"


def _from_hub(name: str, patterns: Sequence[str] = (*WEIGHTS, *hf.COMPANIONS)) -> Path:
    """huggingface_hub locks its files, so the processes of a host share one download."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=list(patterns)))
    except Exception as e:  # the hub client raises a dozen kinds
        reason = str(e).strip().splitlines()[0] if str(e).strip() else type(e).__name__
        raise ValueError(f"no model {name!r}: it is not a local directory, and the hub did not give it ({reason}). "
                         "Offline, download it elsewhere and pass its directory") from None


def _download(url: str) -> Path:
    """What `load` needs of a run or model in an object store: configuration, tokenizer, newest parameters."""
    remote = Remote(url)
    keys = remote.keys()
    final = json.loads(remote.read("run.json")).get("final") if "run.json" in keys else ""
    base = f"{final}/" if final else ""
    if f"{base}model/config.json" in keys:
        complete = re.compile(rf"{re.escape(base)}checkpoints/(\d+)/{COMMITTED}")
        steps = [int(m.group(1)) for k in keys if (m := complete.fullmatch(k))]
        step = f"{base}checkpoints/{max(steps, default=-1)}/"
        keys = [k for k in keys if k == "run.json" or (k.startswith((f"{base}model/", step))
                and not k.startswith(f"{step}opt_state"))]
    else:
        keys = [k for k in keys if any(fnmatch(k, w) for w in (*WEIGHTS, *hf.COMPANIONS))]
    return _local(mirror(remote, keys))


def _from_checkpoint(folder: Path, model: Transformer, provider: str | None, *, mesh: Mesh | None, rules: Rules,
                     dtype: Any, step: int | None) -> dict[str, Any]:
    checkpoints = checkpoints_of(folder)
    if provider is None:
        trained = checkpoints / str(latest_step(checkpoints)) / "params"
        names: list[str] = sorted(p.name for p in trained.iterdir()) if trained.is_dir() else []
        provider = names[0] if len(names) == 1 else "student"
    shardings = None if mesh is None else lambda shapes: param_shardings(mesh, shapes, rules)
    params = latest_params(checkpoints, provider, shardings=shardings, dtype=dtype, step=step)
    want = {name: leaf.shape for name, leaf in paths(hf.param_shapes(model))}
    have = {name: leaf.shape for name, leaf in paths(params)}
    if want != have:
        lines = [f"{n}: config.json wants {want.get(n)}, the checkpoint has {have.get(n)}"
                 for n in sorted(want.keys() | have.keys()) if want.get(n) != have.get(n)]
        more = f"; and {len(lines) - 4} more" if len(lines) > 4 else ""
        raise ValueError(f"{checkpoints} is of another model than {folder}/model/config.json: {'; '.join(lines[:4])}"
                         f"{more}. Put the config.json back that the run was trained with")
    return params


def _merged(adapter: Path, *, mesh: Mesh | None, rules: Rules, dtype: Any, compute: Any, provider: str | None,
            step: int | None, **model_kwargs: Any) -> tuple[Transformer, dict[str, Any]]:
    """A run of adapters: the model they belong to with them in it. Raises ValueError where it is not there, or another.
    """
    lora, base, base_step = from_json(json.loads(adapter.read_text()))
    try:
        model, params = load(base, mesh=mesh, rules=rules, dtype=dtype, step=base_step, compute=compute, **model_kwargs)
    except ValueError as e:
        raise ValueError(f"{adapter.parent.parent} holds adapters of {base!r}, which cannot be read: {e}; put it back, "
                         f'or correct "base" in {adapter}') from None
    wanted = jax.eval_shape(lora.init, hf.param_shapes(model), jax.random.key(0))
    checkpoints = checkpoints_of(adapter.parent.parent)
    adapters = latest_params(checkpoints, provider or "student", step=step, dtype=jnp.float32,
                             shardings=None if mesh is None else lambda shapes: param_shardings(mesh, shapes, rules))
    if {n: x.shape for n, x in paths(wanted)} != {n: x.shape for n, x in paths(adapters)}:
        raise ValueError(f"{checkpoints} holds adapters of another model than {base!r}; correct \"base\" in {adapter}")
    placed = jax.tree.map(lambda x: x.sharding, params)
    return model, jax.jit(partial(merge, scale=lora.scale), out_shardings=placed)(params, adapters)


def _with_real_ids(config: ModelConfig, folder: Path) -> ModelConfig:
    """The configuration with the number of ids the tokenizer beside it has; unchanged where there is no tokenizer."""
    files = model_files(folder)
    if not any(path for pattern in TOKENIZER for path in files.glob(pattern)):
        return config
    return replace(config, real_vocab=min(load_tokenizer(files).real, config.vocab_size))
