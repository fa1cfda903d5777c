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


CHATML = """{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endfor %}\
{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""
CORPUS = ["What is 12 + 30? Let me think step by step. 12 plus 30 is 42. The answer is 42.",
          "Alice has three apples, and Bob gives her two more. How many apples does Alice have now?",
          "First I add the numbers; then I check the result again. So the final answer is five."] * 4


def tiny_folder(folder: Path, *, think: bool = True, end: str = "<|im_end|>", template: str = CHATML,
                vocabulary: int = 400) -> Path:
    """A byte-level BPE tokenizer of a few hundred ids with a ChatML template, trained on the spot."""
    import json

    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers

    tok = tokenizers.Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tok.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=vocabulary, initial_alphabet=alphabet,
                                                        show_progress=False))
    tok.add_special_tokens(["<|endoftext|>", "<|im_start|>", end])
    if think:
        tok.add_tokens(["<think>", "</think>"])
    folder.mkdir(parents=True, exist_ok=True)
    tok.save(str(folder / "tokenizer.json"))
    config = {"eos_token": end, "pad_token": "<|endoftext|>", "tokenizer_class": "PreTrainedTokenizerFast",
              "chat_template": template.replace("<|im_end|>", end)}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Tokenizer:
    return load_tokenizer(tiny_folder(tmp_path_factory.mktemp("tiny") / "student"))


@pytest.fixture(scope="session")
def tiny_teacher(tmp_path_factory) -> Tokenizer:
    """The same learned vocabulary; other added tokens, another template: no think tokens, another end of turn."""
    template = "[{% for m in messages %}{{ m.role + ': ' + m.content + '<|im_end|>' }}{% endfor %}" \
               "{% if add_generation_prompt %}{{ 'teacher: ' }}{% endif %}"
    return load_tokenizer(tiny_folder(tmp_path_factory.mktemp("tiny") / "teacher", think=False, end="<|stop|>",
                                      template=template))


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DISTILL_JAX_CACHE", str(tmp_path / "cache"))
