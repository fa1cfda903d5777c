"""Hugging Face folders in and out: bit-identical round trips, sharded reading, errors that list all, memory."""

import dataclasses
import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open

from distill_jax.core.tree import paths
from distill_jax.models import hf, tensorfile
from distill_jax.models.config import AttentionConfig
from distill_jax.models.families import FAMILIES, family, from_hf, to_hf
from distill_jax.models.tensorfile import Entry, open_tensors, write_tensors
from distill_jax.sharding import make_mesh, param_shardings
from tests.models.common import PLAIN, SPARSE, make, tokens

LLAMA = dataclasses.replace(PLAIN, model_type="llama", tied=False, attention=AttentionConfig())
SMALL = 4000  # bytes a file: many shards


def equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A saved Llama with the small files a real one has."""
    root = tmp_path_factory.mktemp("hf")
    model, params = make(LLAMA)
    hf.save(root / "plain", model, params)
    for name, text in (("tokenizer.json", "{}"), ("generation_config.json", '{"top_p":  0.9}'), ("README.md", "no")):
        (root / "plain" / name).write_text(text)
    return root / "plain"


def wide_values(shape, dtype, seed):
    """Values of every magnitude, with the numbers that conversions damage: subnormals, -0, infinities."""
    rng = np.random.default_rng(seed)
    bits = rng.integers(0, 2**16, shape, dtype=np.uint16)
    exponent = 0x7F80 if dtype == ml_dtypes.bfloat16 else 0x7C00
    is_nan = ((bits & exponent) == exponent) & (bits & 0x7FFF != exponent)
    return np.where(is_nan, np.uint16(0x8000), bits).view(dtype)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("shard_bytes", [SMALL, 10**9], ids=["sharded", "single"])
def test_round_trip_is_bit_identical(tmp_path, folder, dtype, shard_bytes):
    """File -> float32 parameters -> file, through values of every magnitude."""
    kind = np.dtype(getattr(ml_dtypes, dtype, None) or dtype)
    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    infos = open_tensors(folder)
    values = {n: wide_values(i.shape, kind, k) for k, (n, i) in enumerate(infos.items())}
    write_tensors(source, [Entry(n, kind, v.shape, lambda v=v: v) for n, v in values.items()], shard_bytes)
    cfg = json.loads((folder / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**cfg, "dtype": dtype, "torch_dtype": dtype}))
    model, params = hf.load(source)
    assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    hf.save(out, model, params, hf.companions(source), max_shard_bytes=shard_bytes)
    again = open_tensors(out)
    assert set(again) == set(values) and (out / tensorfile.INDEX).exists() == (shard_bytes == SMALL)
    for name, value in values.items():
        assert again[name].dtype == kind
        np.testing.assert_array_equal(again[name].read().view(np.uint16), value.view(np.uint16), err_msg=name)


def test_files_are_what_the_library_reads(tmp_path):
    model, params = make(LLAMA)
    hf.save(tmp_path / "m", model, params, dtype="float32", max_shard_bytes=SMALL)
    index = json.loads((tmp_path / "m" / "model.safetensors.index.json").read_text())
    files = sorted(p.name for p in (tmp_path / "m").glob("*.safetensors"))
    assert files == sorted(set(index["weight_map"].values()))
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert index["metadata"]["total_size"] == 4 * LLAMA.num_params
    seen = 0
    for name in files:
        with safe_open(tmp_path / "m" / name, framework="numpy") as f:
            assert f.metadata() == {"format": "pt"}
            for key in f.keys():  # noqa: SIM118 (not a mapping)
                assert index["weight_map"][key] == name
                seen += f.get_tensor(key).size
            if "model.layers.1.mlp.up_proj.weight" in f.keys():  # noqa: SIM118
                got = f.get_tensor("model.layers.1.mlp.up_proj.weight")
                np.testing.assert_array_equal(got, params["layers"]["mlp"]["up"]["kernel"][1].T)
    assert seen == LLAMA.num_params


@pytest.mark.parametrize("model_type", list(FAMILIES))
def test_every_family_round_trips(tmp_path, model_type):
    tensor_config = {"model_type": model_type, "vocab_size": 61, "hidden_size": 32, "intermediate_size": 48,
                     "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
                     "max_position_embeddings": 64, "sliding_window": 4, "num_experts": 3,
                     "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    model, params = make(from_hf(tensor_config))
    hf.save(tmp_path / "m", model, params)
    back, there = hf.load(tmp_path / "m")
    assert back.config == model.config
    equal(params, there)
    names = set(open_tensors(tmp_path / "m"))
    assert len(names) == sum((1, 2, 2 * 3)[t.stacked] for t in family(model_type).tensors(model.config))


def test_experts_are_read_where_they_belong(tmp_path):
    mesh = make_mesh(expert=4, tensor=2)
    model, params = make(SPARSE)
    hf.save(tmp_path / "m", model, params)
    _, there = hf.load(tmp_path / "m", mesh=mesh)
    equal(params, there)
    for (path, leaf), (_, want) in zip(paths(there), paths(param_shardings(mesh, params))):
        assert leaf.sharding == want, path
    assert there["layers"]["moe"]["up"]["kernel"].addressable_shards[0].data.shape == (2, 2, 32, 8)


def test_loading_onto_a_mesh(folder):
    mesh = make_mesh(data=1, fsdp=4, tensor=2)
    model, here = hf.load(folder)
    _, there = hf.load(folder, mesh=mesh)
    equal(here, there)
    for (path, leaf), (_, want) in zip(paths(there), paths(param_shardings(mesh, here))):
        assert leaf.sharding == want, path
    assert there["layers"]["mlp"]["up"]["kernel"].addressable_shards[0].data.shape == (2, 8, 24)
    hf.save(folder.parent / "from_mesh", model, there)
    equal(hf.load(folder.parent / "from_mesh")[1], here)


def test_dtypes_of_parameters(folder):
    _, params = hf.load(folder, param_dtype=jnp.bfloat16)
    assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype(jnp.bfloat16)}
    model, kept = hf.load(folder, param_dtype=None, dtype=jnp.bfloat16)
    assert kept["final_norm"]["scale"].dtype == jnp.float32 and model.dtype == jnp.bfloat16


def test_companions_travel_verbatim(folder, tmp_path):
    model, params = hf.load(folder)
    assert [p.name for p in hf.companions(folder)] == ["config.json", "generation_config.json", "tokenizer.json"]
    hf.save(tmp_path / "m", model, params, hf.companions(folder))
    for p in hf.companions(folder):
        assert (tmp_path / "m" / p.name).read_bytes() == p.read_bytes()
    hf.save(tmp_path / "half", model, params, hf.companions(folder), dtype="bfloat16")
    assert json.loads((tmp_path / "half" / "config.json").read_text())["dtype"] == "bfloat16"
    assert open_tensors(tmp_path / "half")["lm_head.weight"].dtype == ml_dtypes.bfloat16


def rewrite(folder, target, change):
    """A copy of a checkpoint whose dictionary of tensors was changed."""
    tensors = {n: i.read() for n, i in open_tensors(folder).items()}
    change(tensors)
    target.mkdir()
    (target / "config.json").write_text((folder / "config.json").read_text())
    write_tensors(target, [Entry(n, v.dtype, v.shape, lambda v=v: v) for n, v in tensors.items()], 10**9)
    return target


def test_one_error_lists_every_problem(folder, tmp_path):
    def spoil(tensors):
        del tensors["model.norm.weight"], tensors["model.layers.1.mlp.up_proj.weight"]
        tensors["model.layers.2.mlp.up_proj.weight"] = np.zeros((48, 32), np.float32)
        tensors["lm_head.weight"] = np.zeros((60, 32), np.float32)
        tensors["model.layers.0.input_layernorm.weight"] = np.zeros((32,), np.int8)

    with pytest.raises(ValueError) as e:
        hf.load(rewrite(folder, tmp_path / "bad", spoil))
    for line in ("missing: model.norm.weight [32]", "missing: model.layers.1.mlp.up_proj.weight [48, 32]",
                 "surplus: model.layers.2.mlp.up_proj.weight [48, 32]", "lm_head.weight is [60, 32]",
                 "wants [61, 32]", "input_layernorm.weight is int8", "5 problems"):
        assert line in str(e.value), str(e.value)


def test_harmless_surplus_is_ignored(folder, tmp_path):
    def old(tensors):
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.zeros((4,), np.float32)

    equal(hf.load(rewrite(folder, tmp_path / "old", old))[1], hf.load(folder)[1])
    model, params = make(PLAIN)
    hf.save(tmp_path / "tied", model, params)
    again = rewrite(tmp_path / "tied", tmp_path / "twice",
                    lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"]}))
    equal(hf.load(again)[1], params)


def test_broken_folders(folder, tmp_path):
    with pytest.raises(ValueError, match=r"no config\.json"):
        hf.load(tmp_path)
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    (tmp_path / "pytorch_model.bin").write_text("")
    with pytest.raises(ValueError, match=r"pytorch_model\.bin: only safetensors"):
        hf.load(tmp_path)
    whole = (folder / "model.safetensors").read_bytes()
    for cut, words in [(5, "not a whole"), (100, "not a whole"), (len(whole) - 10, "is cut")]:
        (tmp_path / "model.safetensors").write_bytes(whole[:cut])
        with pytest.raises(ValueError, match=words):
            hf.load(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "model-9.safetensors"}}))
    with pytest.raises(ValueError, match=r"not there: model-9\.safetensors"):
        hf.load(tmp_path)


def test_save_is_all_or_nothing(folder, tmp_path, monkeypatch):
    model, params = hf.load(folder)
    with pytest.raises(ValueError, match="not empty"):
        hf.save(folder, model, params)
    other = dataclasses.replace(LLAMA, context_length=77)
    with pytest.raises(ValueError, match=r"context_length: config\.json 4096, model 77"):
        hf.save(tmp_path / "m", dataclasses.replace(model, config=other), params, hf.companions(folder))
    with pytest.raises(ValueError, match=r"missing \['lm_head/kernel'\]"):
        hf.save(tmp_path / "m", model, {k: v for k, v in params.items() if k != "lm_head"})
    calls = iter(range(3))
    write = tensorfile.os.fsync

    def full(fd):
        if next(calls) == 2:
            raise OSError(28, "No space left on device")
        write(fd)

    monkeypatch.setattr(tensorfile.os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        hf.save(tmp_path / "m", model, params, max_shard_bytes=SMALL)
    assert list(tmp_path.iterdir()) == []


def test_loaded_model_gives_the_same_logits(folder):
    model, params = make(LLAMA)
    back, there = hf.load(folder)
    t = tokens(2, 7)
    np.testing.assert_array_equal(back.apply({"params": there}, t), model.apply({"params": params}, t))


MEMORY = """
import resource, sys, json
sys.path.insert(0, {root!r})
import jax.numpy as jnp
from distill_jax.models import hf
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
jnp.zeros(1).block_until_ready()
before = peak()
model, params = hf.load({folder!r}, param_dtype=None)
loaded = peak()
hf.save({out!r}, model, params)
print(json.dumps([before, loaded, peak()]))
"""


def test_host_memory_is_bounded_by_the_largest_tensor(tmp_path):
    """112 MB of parameters in tensors of at most 8 MB: beyond the parameters themselves, a few tensors of memory."""
    config = dataclasses.replace(LLAMA, num_layers=7, hidden_size=512, mlp_size=2048, head_dim=64, num_heads=8,
                                 num_kv_heads=8, vocab_size=64)
    size = 4 * config.num_params / 2**20
    rng = np.random.default_rng(0)
    source = tmp_path / "source"
    source.mkdir()
    shapes = hf.param_shapes(hf.Transformer(config))
    wanted = dict(paths(shapes))
    entries = []
    for t in family("llama").tensors(config):
        shape = wanted[t.path].shape
        one = shape[1:] if "{}" in t.name else shape
        one = one[::-1] if t.transpose else one
        value = rng.normal(size=one).astype(np.float32)
        for name in [t.name.format(i) for i in range(7)] if "{}" in t.name else [t.name]:
            entries.append(Entry(name, value.dtype, value.shape, lambda v=value: v))
    write_tensors(source, entries, 10**9)
    (source / "config.json").write_text(json.dumps(to_hf(config)))
    root = tensorfile.Path(hf.__file__).parents[2]
    code = MEMORY.format(root=str(root), folder=str(source), out=str(tmp_path / "out"))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    before, loaded, saved = json.loads(done.stdout)
    assert size > 110
    assert loaded - before < size + 60, (before, loaded, size)  # compiled helpers and a few 4 MB tensors
    assert saved - before < size + 80, (before, saved, size)
