"""Hugging Face checkpoints in and out, without torch: `load(dir)` and `save(dir, model, params)`.

Tensors travel one at a time between the files and (sharded) device arrays: a device holds its part of the parameters,
the host never more than one tensor, and parameters that are stacked over layers are filled in place.
Conversions between float types are done by NumPy on the host, because XLA may flush subnormal numbers to zero.
"""

import functools
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding

from distill_jax.core.tree import paths
from distill_jax.models import tensorfile
from distill_jax.models.config import ModelConfig
from distill_jax.models.families import family, from_hf, to_hf
from distill_jax.models.families.base import Tensor
from distill_jax.models.tensorfile import CODES, Entry, TensorInfo, open_tensors
from distill_jax.models.transformer import Transformer
from distill_jax.sharding import DEFAULT_RULES, Rules
from distill_jax.sharding.rules import fit_spec

Array = Any

COMPANIONS = ("config.json", "generation_config.json", "tokenizer*", "special_tokens_map.json", "added_tokens.json",
              "vocab.json", "vocab.txt", "merges.txt", "spiece.model", "sentencepiece.bpe.model", "chat_template*")
"""Small files that travel with the weights, verbatim."""

IGNORED = re.compile(r"rotary_emb\.inv_freq$")
"""Buffers that old checkpoints store although they are computed."""

MAX_SHARD_BYTES = 5_000_000_000


def companions(folder: str | Path) -> list[Path]:
    """The files of a model folder that an export takes along: configuration, tokenizer, generation defaults."""
    return sorted({p for pattern in COMPANIONS for p in Path(folder).glob(pattern) if p.is_file()})


def read_config(folder: str | Path) -> dict[str, Any]:
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise ValueError(f"{folder} has no config.json: not a Hugging Face model folder")
    try:
        return json.loads(path.read_text())
    except ValueError as e:
        raise ValueError(f"{path} is not JSON: {e}") from None


def load(folder: str | Path, *, mesh: Mesh | None = None, rules: Rules = DEFAULT_RULES,
         param_dtype: Any = jnp.float32, **model_kwargs: Any) -> tuple[Transformer, dict[str, Any]]:
    """The model of a checkpoint folder and its parameters, laid out over `mesh` (or on the first device).

    param_dtype: dtype of the parameters, None for what each tensor has in the file. model_kwargs: dtype (compute),
    remat, attention of `Transformer`.
    Raises one ValueError that lists every missing, surplus or wrongly shaped tensor.
    """
    folder = Path(folder)
    config = from_hf(read_config(folder))
    model = Transformer(config, **model_kwargs)
    kind = family(config.model_type)
    stored, tensors = kind.stored(open_tensors(folder)), kind.tensors(config)
    wanted = dict(paths(param_shapes(model)))
    check(folder, config, tensors, wanted, stored)
    params: dict[str, Any] = {}
    for t in tensors:
        shape, spec = wanted[t.path].shape, rules.param_spec(t.path)
        whole = _sharding(mesh, spec, shape)
        if t.stacked:
            infos = {index: stored[name] for index, name in names(t, shape).items()}
            one = _sharding(mesh, PartitionSpec(*tuple(spec)[t.stacked:]), shape[t.stacked:])
            value = _read_stacked(infos, t.transpose, shape, whole, one, param_dtype)
        else:
            value = _fetch(stored[t.name], whole, param_dtype)
        node = params
        *parents, leaf = t.path.split("/")
        for key in parents:
            node = node.setdefault(key, {})
        node[leaf] = value
    return model, params


def stored_tensors(folder: str | Path) -> dict[str, TensorInfo]:
    """The tensors of a model folder, by the names `save` gives them."""
    return dict(family(read_config(folder).get("model_type")).stored(open_tensors(Path(folder))))


def names(tensor: Tensor, shape: tuple[int, ...]) -> dict[tuple[int, ...], str]:
    """{index into the leading dimensions of the parameter: name of the tensor that lies there}."""
    return {index: tensor.name.format(*index) for index in np.ndindex(shape[:tensor.stacked])}


def param_shapes(model: Transformer) -> Any:
    """Tree of ShapeDtypeStructs of the parameters."""
    return jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32)))["params"]


def check(folder: Path, config: ModelConfig, tensors: Iterable[Tensor], wanted: Mapping[str, Any],
          stored: Mapping[str, TensorInfo]) -> None:
    """The files hold exactly the tensors the configuration asks for, in their shapes; one error lists the rest."""
    expected: dict[str, tuple[int, ...]] = {}
    for t in tensors:
        shape = wanted[t.path].shape
        one: tuple[int, ...] = shape[t.stacked:]
        one = one[::-1] if t.transpose else one
        expected |= dict.fromkeys(names(t, shape).values(), one)
    surplus = {n for n in stored if n not in expected and not IGNORED.search(n)}
    if config.tied:  # some writers store the tied head again
        surplus.discard("lm_head.weight")
    wrong = [f"  missing: {n} {list(s)}" for n, s in expected.items() if n not in stored]
    wrong += [f"  surplus: {n} {list(stored[n].shape)}" for n in sorted(surplus)]
    wrong += [f"  wrong shape: {n} is {list(stored[n].shape)}, config.json wants {list(s)}"
              for n, s in expected.items() if n in stored and stored[n].shape != s]
    wrong += [f"  not a float: {n} is {stored[n].dtype}" for n in expected
              if n in stored and stored[n].dtype.name not in ("float64", "float32", "float16", "bfloat16")]
    if wrong:
        raise ValueError(f"{folder}: the tensors do not fit its config.json ({config.model_type}), "
                         f"{len(wrong)} problems:\n" + "\n".join(wrong))


def _sharding(mesh: Mesh | None, spec: PartitionSpec, shape: tuple[int, ...]) -> Sharding:
    if mesh is None:
        return SingleDeviceSharding(jax.devices()[0])
    return NamedSharding(mesh, fit_spec(spec, shape, mesh.shape))


def _transposed(sharding: Sharding) -> Sharding:
    """The sharding of the transpose of a matrix."""
    if not isinstance(sharding, NamedSharding):
        return sharding
    spec = tuple(sharding.spec) + (None,) * (2 - len(sharding.spec))
    return NamedSharding(sharding.mesh, PartitionSpec(*spec[::-1]))


def _fetch(info: TensorInfo, sharding: Sharding, dtype: Any) -> Array:
    """The tensor as a device array: every device's part is read, converted and sent by itself."""
    kind = info.dtype if dtype is None else np.dtype(dtype)
    part = lambda index: info.read(index or ()).astype(kind, copy=False)
    return jax.make_array_from_callback(info.shape, sharding, part)


@functools.cache
def _filler(sharding: Sharding, transpose: bool) -> Callable[..., Array]:
    """buffer [L,...], value of a layer, its index -> the buffer with the layer filled in, in place."""
    def fill(buffer: Array, value: Array, index: tuple[Array, ...]) -> Array:
        value = value.T if transpose else value
        start = (*index, *(0,) * value.ndim)
        return jax.lax.dynamic_update_slice(buffer, value.reshape((1,) * len(index) + value.shape), start)

    return jax.jit(fill, donate_argnums=0, out_shardings=sharding)


def _read_stacked(infos: Mapping[tuple[int, ...], TensorInfo], transpose: bool, shape: tuple[int, ...],
                  whole: Sharding, one: Sharding, dtype: Any) -> Array:
    """[L,...] or [L,E,...] = shape from a tensor per index. whole, one: shardings of the result, of one entry of it."""
    kind = max((i.dtype for i in infos.values()), key=lambda d: d.itemsize) if dtype is None else np.dtype(dtype)
    buffer = jax.jit(lambda: jnp.zeros(shape, kind), out_shardings=whole)()
    for index, info in infos.items():
        value = _fetch(info, _transposed(one) if transpose else one, kind)
        buffer = _filler(whole, transpose)(buffer, value, tuple(map(jnp.int32, index)))
        jax.block_until_ready(buffer)  # dispatch is asynchronous: without this all layers would be in flight
    return buffer


def save(folder: str | Path, model: Transformer, params: Mapping[str, Any], extra_files: Iterable[str | Path] = (), *,
         dtype: str | Mapping[str, str] | None = None, max_shard_bytes: int = MAX_SHARD_BYTES) -> None:
    """Write a checkpoint folder that transformers, vLLM and others load.

    extra_files      copied verbatim (see `companions`); a config.json among them must describe this model
    dtype            of the weights: "float32", "bfloat16", "float16", or a mapping from tensor names; by default
                     what that config.json says, else that of the parameters
    max_shard_bytes  size above which the weights are split
    The folder appears at once, complete, or not at all; one that exists and is not empty is refused.
    """
    folder, extras = Path(folder), [Path(p) for p in extra_files]
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} exists and is not empty; choose another folder or remove it")
    given = next((read_config(p.parent) for p in extras if p.name == "config.json"), None)
    _check_config(given, model.config)
    said = (given or {}).get("dtype") or (given or {}).get("torch_dtype")
    default = said if dtype is None or isinstance(dtype, Mapping) else dtype
    default = default or jax.tree.leaves(params)[0].dtype.name
    tensors = entries(model.config, params, default, dtype if isinstance(dtype, Mapping) else {})
    main = jax.process_index() == 0
    partial = folder.parent / f".{folder.name}.partial"
    try:
        if main:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        tensorfile.write_tensors(partial, tensors, max_shard_bytes, writes=main)
        if main:
            for p in extras:
                shutil.copyfile(p, partial / p.name)
            if given is None:
                (partial / "config.json").write_text(json.dumps(to_hf(model.config, default), indent=2) + "\n")
            elif said != default:
                _rewrite_dtype(partial / "config.json", given, default)
            if folder.exists():
                folder.rmdir()
            os.replace(partial, folder)
    except BaseException:
        if main:
            shutil.rmtree(partial, ignore_errors=True)
        raise


def _check_config(given: Mapping[str, Any] | None, config: ModelConfig) -> None:
    if given is None:
        return
    there = from_hf(given)
    differ = [f"  {name}: config.json {getattr(there, name)}, model {getattr(config, name)}"
              for name in there.__dataclass_fields__
              if name != "real_vocab" and getattr(there, name) != getattr(config, name)]
    if differ:
        raise ValueError("the config.json to export describes another model:\n" + "\n".join(differ))


def _rewrite_dtype(path: Path, given: Mapping[str, Any], dtype: str) -> None:
    key = "torch_dtype" if "torch_dtype" in given and "dtype" not in given else "dtype"
    path.write_text(json.dumps({**given, key: dtype}, indent=2) + "\n")


def entries(config: ModelConfig, params: Mapping[str, Any], dtype: str, named: Mapping[str, str]) -> list[Entry]:
    """The tensors that a checkpoint of `params` holds, layer by layer, in the order a reader wants them.

    dtype: of the weights; named: dtypes of single tensors that differ.
    """
    leaves = dict(paths(params))

    def entry(t: Tensor, name: str, index: tuple[int, ...]) -> Entry:
        value = leaves[t.path]
        shape = value.shape[len(index):]
        kind = np.dtype(jnp.dtype(named.get(name, dtype)))
        if kind not in CODES:
            raise ValueError(f"weights cannot be written as {kind}; known: {', '.join(map(str, CODES))}")
        fetch = functools.partial(_to_host, value, index, t.transpose, kind)
        return Entry(name, kind, shape[::-1] if t.transpose else shape, fetch)

    tensors = family(config.model_type).tensors(config)
    absent = [t.path for t in tensors if t.path not in leaves]
    if absent or len(leaves) != len(tensors):
        surplus = sorted(set(leaves) - {t.path for t in tensors})
        raise ValueError(f"parameters are not those of a {config.model_type} model: "
                         f"missing {absent}, surplus {surplus}")
    first = next(i for i, t in enumerate(tensors) if t.stacked)
    out = [entry(t, t.name, ()) for t in tensors[:first]]
    stacked = [(t, names(t, leaves[t.path].shape)) for t in tensors if t.stacked]
    for layer in range(config.num_layers):
        out += [entry(t, name, index) for t, those in stacked for index, name in those.items() if index[0] == layer]
    return out + [entry(t, t.name, ()) for t in tensors[first:] if not t.stacked]


@functools.cache
def _picker(transpose: bool, replicated: Sharding | None) -> Callable[..., Array]:
    def pick(x: Array, index: tuple[Array, ...]) -> Array:
        one = x[index]
        return one.T if transpose else one

    return jax.jit(pick, out_shardings=replicated)


def _to_host(value: Array, index: tuple[int, ...], transpose: bool, kind: np.dtype) -> np.ndarray | None:
    """One layer of a parameter on the host; on the main process only, when the array spans several."""
    sharding = getattr(value, "sharding", None)
    gathered = NamedSharding(sharding.mesh, PartitionSpec()) if isinstance(sharding, NamedSharding) else None
    one = _picker(transpose, gathered)(value, tuple(map(jnp.int32, index)))
    if jax.process_index() != 0:
        jax.block_until_ready(one)
        return None
    return np.asarray(one.addressable_data(0)).astype(kind, copy=False)
