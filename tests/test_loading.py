"""`distill_jax.load`: Hugging Face folders, runs, hub ids and object stores give the same model and parameters."""

import json
import os
import uuid

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import distill_jax
from distill_jax.jobs import mirror as mirroring
from distill_jax.loading import load, local_folder, model_files
from distill_jax.models import hf
from distill_jax.models.families import to_hf
from distill_jax.sharding import make_mesh, param_shardings
from distill_jax.train.checkpoint import Checkpoints
from distill_jax.train.state import TrainState
from tests.models.common import PLAIN, make, tokens
from tests.s3 import s3_bucket


def equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def write_run(folder, params, steps=(3,), providers=("student",)):
    """A run as the trainer leaves it: checkpoints of `steps`, the later ones with larger parameters."""
    (folder / "model").mkdir(parents=True)
    (folder / "model" / "config.json").write_text(json.dumps(to_hf(PLAIN)))
    checkpoints = Checkpoints(folder / "checkpoints", keep=9)
    for step in steps:
        scaled = jax.tree.map(lambda x, s=step: x * np.float32(s), params)
        state = TrainState(step=jnp.int32(step), params=dict.fromkeys(providers, scaled), controllers={},
                           opt_state={"count": jnp.int32(step)}, rng=jnp.zeros(2, jnp.uint32), skipped=jnp.int32(0))
        checkpoints.save(step, state, {})
    checkpoints.wait()
    checkpoints.close()
    return folder


@pytest.fixture(scope="module")
def params():
    return make(PLAIN)[1]


@pytest.fixture(scope="module")
def run(tmp_path_factory, params):
    return write_run(tmp_path_factory.mktemp("runs") / "one", params, steps=(1, 2))


@pytest.fixture(scope="module")
def hf_folder(tmp_path_factory, params):
    folder = tmp_path_factory.mktemp("hf") / "m"
    hf.save(folder, make(PLAIN)[0], params)
    return folder


def test_folder(hf_folder, params):
    model, there = distill_jax.load(str(hf_folder))
    equal(there, params)
    assert model.apply({"params": there}, tokens(2, 5)).shape == (2, 5, 61)
    assert model.dtype == jnp.float32 and model.config.real_vocab is None  # no tokenizer in the folder


def test_dtype_is_of_parameters_and_computation(hf_folder):
    model, there = load(hf_folder, dtype=jnp.bfloat16, attention="chunked")
    assert model.dtype == jnp.bfloat16 and model.attention == "chunked"
    assert {x.dtype for x in jax.tree.leaves(there)} == {jnp.dtype(jnp.bfloat16)}
    model, there = load(hf_folder, dtype=None, compute=jnp.bfloat16)
    assert model.dtype == jnp.bfloat16 and there["final_norm"]["scale"].dtype == jnp.float32


def test_newest_checkpoint_of_a_run(run, params):
    _, there = load(run)
    equal(there, jax.tree.map(lambda x: x * np.float32(2), params))


def test_run_onto_a_mesh(run):
    mesh = make_mesh(fsdp=4, tensor=2)
    _, there = load(run, mesh=mesh)
    assert jax.tree.map(lambda x: x.sharding, there) == param_shardings(mesh, there)
    equal(there, load(run)[1])


def test_run_of_several_stages_means_the_last(tmp_path, params):
    write_run(tmp_path / "run" / "warmup", params, steps=(1,))
    write_run(tmp_path / "run" / "kd", params, steps=(5,))
    (tmp_path / "run" / "run.json").write_text('{"final": "kd"}')
    equal(load(tmp_path / "run")[1], load(tmp_path / "run" / "kd")[1])
    assert model_files(local_folder(tmp_path / "run")) == tmp_path / "run" / "kd" / "model"
    (tmp_path / "run" / "run.json").write_text('{"final": "rl"}')
    with pytest.raises(ValueError, match=r"last stage 'rl' yet.*\['kd', 'warmup'\]"):
        load(tmp_path / "run")


def test_provider(tmp_path, params):
    only = write_run(tmp_path / "a", params, providers=("policy",))
    equal(load(only)[1], load(only, provider="policy")[1])
    two = write_run(tmp_path / "b", params, providers=("student", "critic"))
    equal(load(two)[1], load(two, provider="critic")[1])
    with pytest.raises(ValueError, match=r"'critics'.*\['critic', 'student'\]"):
        load(two, provider="critics")


def test_real_vocab_comes_from_the_tokenizer(tmp_path, hf_folder, params):
    import tokenizers

    pieces = {chr(97 + i % 26) + str(i): i for i in range(50)}
    tokenizers.Tokenizer(tokenizers.models.WordLevel(pieces, "a0")).save(str(tmp_path / "tokenizer.json"))
    hf.save(tmp_path / "m", make(PLAIN)[0], params, [tmp_path / "tokenizer.json"])
    model, there = load(tmp_path / "m")
    assert model.config.real_vocab == 50
    logits = model.apply({"params": there}, tokens(1, 3, vocab=50))
    assert float(logits[..., 50:].max()) < -1e29 < float(logits[..., :50].min())


def test_checkpoint_of_another_model(run, tmp_path):
    import dataclasses
    import shutil

    shutil.copytree(run, tmp_path / "r")
    other = to_hf(dataclasses.replace(PLAIN, mlp_size=40))
    (tmp_path / "r" / "model" / "config.json").write_text(json.dumps(other))
    with pytest.raises(ValueError, match=r"layers/mlp/up/kernel: config.json wants \(2, 32, 40\), .* \(2, 32, 48\)"):
        load(tmp_path / "r")


@pytest.mark.parametrize("source, words", [
    ("/no/such/place", "no such directory"), ("./runs/none", "no such directory"), ("a/b/c", "no such directory"),
    ("nobody/nothing-xyz", "the hub did not give it"), ("ftp://x/y", "unknown scheme"),
])
def test_nothing_there(source, words):
    with pytest.raises(ValueError, match=words):
        load(source)


def test_a_folder_that_is_no_model(tmp_path):
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(ValueError, match=r"neither a run.*notes\.txt"):
        load(tmp_path)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(to_hf(PLAIN)))
    with pytest.raises(ValueError, match="no complete checkpoint"):
        load(tmp_path)


def test_hub_ids_download_only_what_is_needed(hf_folder, params, monkeypatch):
    import huggingface_hub

    asked = {}

    def snapshot_download(name, allow_patterns):
        asked.update(name=name, patterns=allow_patterns)
        return str(hf_folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    equal(load("Qwen/Qwen2.5-0.5B")[1], params)
    assert asked["name"] == "Qwen/Qwen2.5-0.5B" and "model-*.safetensors" in asked["patterns"]
    assert "tokenizer*" in asked["patterns"] and not {"*", "*.bin", "*.safetensors"} & set(asked["patterns"])


@pytest.fixture(scope="module")
def bucket():
    """An S3 server on this machine; the environment points to it."""
    name = f"bucket-{uuid.uuid4().hex[:8]}"
    with s3_bucket(name) as client:
        yield name, client


def upload(client, bucket, folder, prefix):
    for path in folder.rglob("*"):
        if path.is_file():
            client.upload_file(str(path), bucket, f"{prefix}/{path.relative_to(folder)}")


def test_object_store(bucket, hf_folder, run, params, tmp_path, monkeypatch):
    """Folders and runs by URL: downloaded once, in pieces, again when they change; only what is needed."""
    name, client = bucket
    monkeypatch.setenv("DISTILL_JAX_CACHE", str(tmp_path))
    monkeypatch.setattr(mirroring, "PIECE", 1000)
    upload(client, name, hf_folder, "models/m")
    client.put_object(Bucket=name, Key="models/m/pytorch_model.bin", Body=b"not wanted")
    upload(client, name, run, "runs/one")
    equal(load(f"s3://{name}/models/m")[1], params)
    first = local_folder(f"s3://{name}/models/m")
    assert sorted(p.name for p in first.iterdir()) == ["config.json", "model.safetensors"]
    monkeypatch.setattr(mirroring.Remote, "download", None)  # a second time nothing may be fetched
    equal(load(f"s3://{name}/models/m")[1], params)
    monkeypatch.undo()
    monkeypatch.setenv("DISTILL_JAX_CACHE", str(tmp_path))
    client.put_object(Bucket=name, Key="models/m/config.json", Body=json.dumps({**to_hf(PLAIN), "new": 1}).encode())
    assert local_folder(f"s3://{name}/models/m") != first
    checkpoints = local_folder(f"s3://{name}/runs/one") / "checkpoints"
    assert [p.name for p in checkpoints.iterdir()] == ["2"] and not (checkpoints / "2" / "opt_state").exists()
    equal(load(f"s3://{name}/runs/one")[1], load(run)[1])
    with pytest.raises(ValueError, match="nothing at s3://"):
        load(f"s3://{name}/none")


def test_pieces_of_every_size(tmp_path, monkeypatch):
    """Objects shorter than, equal to and around multiples of a piece arrive whole."""
    monkeypatch.setattr(mirroring, "PIECE", 10)
    (tmp_path / "in").mkdir()
    for size in (0, 1, 9, 10, 11, 20, 25):
        (tmp_path / "in" / str(size)).write_bytes(os.urandom(size))
    remote = mirroring.Remote((tmp_path / "in").as_uri())
    for key in remote.keys():  # noqa: SIM118
        remote.download(key, tmp_path / "out" / key)
        assert (tmp_path / "out" / key).read_bytes() == (tmp_path / "in" / key).read_bytes(), key
