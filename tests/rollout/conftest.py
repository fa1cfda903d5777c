"""Tokenizers of the tests of environments."""

import pytest

from distill_jax.data.tokenizer import load_tokenizer
from tests.data.conftest import tiny_folder
from tests.rollout.scripted import TEMPLATES


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tok")
    return {name: load_tokenizer(tiny_folder(folder / name, template=t)) for name, t in TEMPLATES.items()}


@pytest.fixture(scope="module")
def tok(tokenizers):
    return tokenizers["opens"]
