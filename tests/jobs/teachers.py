"""A tiny random teacher on disk, with a tokenizer, for tests of commands."""

import functools
from pathlib import Path

import jax

from distill_jax.data.source_specs import Store
from distill_jax.data.tokenizer import Tokenizer, load_tokenizer
from distill_jax.losses.rows.cross_entropy import cross_entropy
from distill_jax.models import hf
from distill_jax.models.config import AttentionConfig, ModelConfig
from distill_jax.models.transformer import Transformer, init_params
from distill_jax.objective.term import Term
from distill_jax.recipe import Stage, Student
from distill_jax.train.optim import AdamW
from tests.data.conftest import tiny_folder
from tests.data.storing import make_store, some_traces


@functools.cache
def tiny_model(real: int, padded: int = 448, context: int = 128, seed: int = 0):
    """(model, params) with a head padded beyond the tokenizer's ids; large enough weights that it has opinions."""
    config = ModelConfig(vocab_size=padded, hidden_size=16, mlp_size=24, num_layers=1, num_heads=2, num_kv_heads=1,
                         head_dim=8, context_length=context, init_std=0.5, real_vocab=real,
                         attention=AttentionConfig(qkv_bias=True))
    model = Transformer(config)
    return model, init_params(model, jax.random.key(seed))


def teacher_folder(folder: Path, tok: Tokenizer, **kwargs) -> Path:
    """A Hugging Face directory of `tiny_model`."""
    model, params = tiny_model(tok.real, **kwargs)
    hf.save(folder, model, params)
    tok.save(folder)
    return folder


def small_stage(root: Path, **kwargs) -> Stage:
    """Four updates of cross-entropy on a small store, both made below `root`."""
    tok = load_tokenizer(tiny_folder(root / "tokenizer"))
    make_store(root / "store", some_traces(24), tok)
    student = teacher_folder(root / "student", tok)
    return Stage(name="train", source=Store(path=str(root / "store"), rows=8, seq_len=96), steps=4, log_every=1,
                 providers={"student": Student(model=str(student))}, terms={"ce": Term(cross_entropy)},
                 optim=AdamW(peak_lr=0.01, warmup=1), **kwargs)
