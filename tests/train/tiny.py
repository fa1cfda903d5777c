"""A tiny model, a synthetic source of packed rows, and a state: what the training tests train."""

import dataclasses

import jax
import numpy as np

from distill_jax.core.batch import Batch, Stream, TopK
from distill_jax.core.roles import ANSWER, PAD, QUESTION, THINK
from distill_jax.losses.rows.cross_entropy import cross_entropy
from distill_jax.losses.rows.divergences import forward_kl
from distill_jax.models.config import ModelConfig
from distill_jax.models.transformer import Transformer, init_params
from distill_jax.objective.term import Term, build_objective
from distill_jax.sharding import make_mesh
from distill_jax.train.optim import AdamW
from distill_jax.train.state import create_state
from distill_jax.train.step import StepConfig

VOCAB, K = 48, 4
CONFIG = ModelConfig(vocab_size=VOCAB, hidden_size=16, mlp_size=32, num_layers=2, num_heads=4, num_kv_heads=2,
                     head_dim=4)
OPTIM = AdamW(peak_lr=3e-3, warmup=2)
CE = {"ce": Term(cross_entropy)}
CE_AND_KD = {"ce": Term(cross_entropy, weight=0.5), "kd": Term(forward_kl, target="signals/topk", on=(THINK,))}


@dataclasses.dataclass(frozen=True)
class Synthetic:
    """Rows of random documents; the next token is the last one plus 1 or 2, so that there is something to learn."""

    batch_size: int = 8
    seq_len: int = 24
    seed: int = 0
    poison: tuple[int, ...] = ()  # steps whose weights are infinite

    def documents(self, step: int) -> list[list[np.ndarray]]:
        rng = np.random.default_rng((self.seed, step))
        rows = []
        for _ in range(self.batch_size):
            lengths, room = [], self.seq_len
            while room >= 5:
                lengths.append(min(room, int(rng.integers(5, 12))))
                room -= lengths[-1]
            rows.append([(rng.integers(VOCAB) + np.cumsum(rng.integers(1, 3, n))) % VOCAB for n in lengths])
        return rows

    def batch(self, step: int) -> Batch:
        out = pack(self.documents(step), self.seq_len)
        if step in self.poison:
            out.main.weights[out.main.weights > 0] = np.inf
        return out


def pack(rows: list[list[np.ndarray]], seq_len: int) -> Batch:
    """Documents of a third question, a third thinking, a third answer, with a top-k signal made from their tokens."""
    B, T = len(rows), seq_len
    s = {n: np.zeros((B, T), np.int32) for n in ("tokens", "positions", "segment_ids", "roles", "step_ids")}
    s["roles"][:] = PAD
    weights, row_ids = np.zeros((B, T), np.float32), np.full((B, T), -1, np.int32)
    for b, documents in enumerate(rows):
        at = 0
        for d, doc in enumerate(documents):
            n, span = len(doc), slice(at, at + len(doc))
            s["tokens"][b, span], s["positions"][b, span], s["segment_ids"][b, span] = doc, np.arange(n), d + 1
            s["roles"][b, span] = np.array([QUESTION, THINK, ANSWER])[np.arange(n) * 3 // n]
            weights[b, span], weights[b, at], row_ids[b, span] = 1.0, 0.0, b
            at += n
    ids = (s["tokens"][..., None] + np.arange(K)) % VOCAB
    logprobs = np.broadcast_to(np.log(np.array([0.5, 0.2, 0.1, 0.1], np.float32)), ids.shape)
    return Batch(views={"main": Stream(**s, weights=weights, row_ids=row_ids)},
                 signals={"topk": TopK(ids=ids.astype(np.int32), logprobs=logprobs.copy(), mask=weights > 0)})


def setup(terms=None, mesh=None, *, micro_batches=1, optim=OPTIM, total=100, seed=0,
          config=CONFIG, dtype="float32", **kwargs):
    """-> (StepConfig, TrainState) of a student trained from random weights."""
    mesh = mesh or make_mesh(devices=jax.devices()[:1])
    model = Transformer(config, dtype=np.dtype(dtype))
    objective = build_objective(terms or CE)
    step_config = StepConfig(objective=objective, models={"student": model}, mesh=mesh, micro_batches=micro_batches,
                             optimizers={"student": optim.build(total)}, **kwargs)
    params = {"student": init_params(model, jax.random.key(seed), mesh=mesh)}
    return step_config, create_state(params, step_config.optimizers, mesh=mesh, seed=seed,
                                     controllers=objective.init())
