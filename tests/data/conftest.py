"""Tokenizers of the real data, loaded once. Tests that need one skip where the data are absent."""

import gzip
import shutil
from pathlib import Path

import pytest

from distill_jax.data.tokenizer import Tokenizer, load_tokenizer


@pytest.fixture(scope="session")
def tokenizers_dir(data_dir) -> Path:
    return data_dir / "7_tokenizers"


@pytest.fixture(scope="session")
def load(tokenizers_dir, tmp_path_factory):
    """`load("qwen2.5")`: by the names the golden files use, each loaded once."""
    cache: dict[str, Tokenizer] = {}

    def assemble(name: str, *files: Path) -> Path:
        folder = tmp_path_factory.mktemp(name)
        for f in files:
            shutil.copy(f, folder / f.name)
        return folder

    def path(name: str) -> Path:
        d = tokenizers_dir
        known = {
            "mistral_v1": d / "mistral/tokenizer.model.v1", "mistral_v3": d / "mistral/tokenizer.model.v3",
            "t5": d / "t5_spm/t5_sentencepiece.model", "spm_test_1k": d / "sentencepiece_test/test_model.model",
            "hf_bytefallback": d / "hf_fixture_spm/test_sentencepiece_with_bytefallback.model",
        }
        if name == "gpt2":  # two folders, still gzipped
            return assemble(name, d / "gpt2/vocab.json.gz", d / "gpt2_merges/merges.txt.gz")
        if name == "qwen3":  # Qwen2.5's files with Qwen3's configuration
            q = d / "qwen2.5"
            return assemble(name, q / "vocab.json.gz", q / "merges.txt.gz", d / "qwen3_config/tokenizer_config.json")
        return known.get(name, d / name)

    def get(name: str) -> Tokenizer:
        if name not in cache:
            template = "mistral_v1" if name == "mistral_v1" else None
            cache[name] = load_tokenizer(path(name), chat_template=template)
        return cache[name]

    return get


@pytest.fixture(scope="session")
def golden(tokenizers_dir) -> list[dict]:
    import json
    with gzip.open(tokenizers_dir / "golden_multi/golden_ids.jsonl.gz", "rt") as f:
        return [json.loads(line) for line in f]
