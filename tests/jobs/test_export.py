"""`export` and `verify-hf`: what leaves the house is what was trained, and a damaged folder does not pass."""

import importlib.util
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers

from distill_jax.cli.main import main
from distill_jax.data.tokenizer import load_tokenizer
from distill_jax.jobs import verify_hf as verifying
from distill_jax.jobs.export import export
from distill_jax.jobs.verify_hf import verify_hf
from distill_jax.loading import load
from distill_jax.models import hf
from distill_jax.models.tensorfile import open_tensors
from tests.models.common import PLAIN, make
from tests.test_loading import write_run


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A trained run with a tokenizer of 50 real ids for a head of 61."""
    folder = write_run(tmp_path_factory.mktemp("runs") / "one", make(PLAIN)[1])
    pieces = {"<s>": 0, "</s>": 1, **{chr(97 + i % 26) + str(i): i for i in range(2, 50)}}
    fast = tokenizers.Tokenizer(tokenizers.models.WordLevel(pieces, "<s>"))
    fast.add_special_tokens(["<s>", "</s>"])
    fast.save(str(folder / "model" / "tokenizer.json"))
    (folder / "model" / "tokenizer_config.json").write_text('{"bos_token": "<s>", "eos_token": "</s>"}')
    return folder


@pytest.fixture
def no_torch(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "torch" else find(name))


def test_export_is_the_run(run, tmp_path, capsys):
    """Through the command line, on eight devices, in several files."""
    with pytest.raises(SystemExit) as done:
        main(["export", str(run), str(tmp_path / "out"), "--to", "hf", "--max-shard", "0.00002"])
    assert done.value.code == 0
    assert "17,600 parameters" in capsys.readouterr().out
    names = {p.name for p in (tmp_path / "out").iterdir()}
    assert {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
            "model.safetensors.index.json", "model-00001-of-00004.safetensors"} <= names
    ids = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert ids == {"bos_token_id": 0, "eos_token_id": [1]}
    assert load_tokenizer(tmp_path / "out").hash == load_tokenizer(run).hash
    model, params = load(tmp_path / "out")
    want_model, want = load(run)
    assert model == want_model and model.config.real_vocab == 50
    jax.tree.map(np.testing.assert_array_equal, params, want)


def test_export_in_bfloat16(run, tmp_path):
    export(str(run), tmp_path / "half", dtype="bfloat16")
    assert json.loads((tmp_path / "half" / "config.json").read_text())["dtype"] == "bfloat16"
    assert {i.dtype.name for i in open_tensors(tmp_path / "half").values()} == {"bfloat16"}
    want = load(run)[1]["embed"]["embedding"].astype(jnp.bfloat16)
    np.testing.assert_array_equal(load(tmp_path / "half", dtype=None)[1]["embed"]["embedding"], want)


@pytest.mark.parametrize("kwargs, words", [({"to": "gguf"}, "known: hf"), ({"dtype": "int8"}, "bfloat16"),
                                           ({"max_shard_bytes": 0}, "--max-shard must be more than 0")])
def test_what_cannot_be_exported(run, tmp_path, kwargs, words):
    with pytest.raises(ValueError, match=words):
        export(str(run), tmp_path / "x", **kwargs)
    assert not (tmp_path / "x").exists()


def test_errors_end_in_one_line(run, tmp_path, capsys):
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "file").write_text("mine")
    for argv in (["export", str(run), str(tmp_path / "there")], ["export", str(tmp_path), str(tmp_path / "y")],
                 ["verify-hf", str(tmp_path / "nowhere")]):
        with pytest.raises(SystemExit) as e:
            main(argv)
        err = capsys.readouterr().err
        assert e.value.code == 2 and err.startswith("error: ") and err.count("\n") == 1
    assert (tmp_path / "there" / "file").read_text() == "mine"


def test_verify_passes_what_we_wrote(run, tmp_path, no_torch):
    export(str(run), tmp_path / "a")
    model, params = hf.load(tmp_path / "a")
    hf.save(tmp_path / "b", model, params, hf.companions(tmp_path / "a"), max_shard_bytes=20_000)
    lines = []
    verify_hf(str(tmp_path / "b"), against=str(tmp_path / "a"), echo=lines.append)
    text = "\n".join(lines)
    assert "26 of 26 tensors bit-identical" in text and "26 of 26 bit-identical to" in text
    assert "max |logit difference| 0 over 2 x 65 tokens" in text and "torch is not installed" in text


def test_verify_fails_what_was_changed(run, tmp_path, no_torch):
    export(str(run), tmp_path / "a")
    model, params = hf.load(tmp_path / "a")
    params["final_norm"]["scale"] = params["final_norm"]["scale"] * 1.5
    hf.save(tmp_path / "b", model, params)
    lines = []
    with pytest.raises(ValueError, match="failed: tensors, original"):
        verify_hf(str(tmp_path / "b"), against=str(tmp_path / "a"), echo=lines.append)
    assert "FAIL  tensors      25 of 26 bit-identical" in "\n".join(lines) and "model.norm.weight" in "\n".join(lines)
    params["final_norm"]["scale"] = params["final_norm"]["scale"] * jnp.nan
    hf.save(tmp_path / "c", model, params)
    with pytest.raises(ValueError, match="failed: finite"):
        verify_hf(str(tmp_path / "c"), echo=lines.append)


@pytest.mark.parity
def test_verify_against_transformers(run, tmp_path, monkeypatch):
    pytest.importorskip("torch")
    export(str(run), tmp_path / "a")
    lines = []
    verify_hf(str(tmp_path / "a"), echo=lines.append)
    assert any(line.startswith("ok    transformers max") for line in lines)
    monkeypatch.setattr(verifying, "TOLERANCE", 0.0)
    with pytest.raises(ValueError, match="failed: transformers"):
        verify_hf(str(tmp_path / "a"), echo=lines.append)
