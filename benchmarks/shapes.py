"""Students of the usual sizes, from random weights, and the recipe of one training step of them."""

from distill_jax.data.source_specs import Store
from distill_jax.losses.rows.cross_entropy import cross_entropy
from distill_jax.losses.rows.divergences import forward_kl
from distill_jax.models.config import AttentionConfig, ModelConfig, MoE
from distill_jax.objective.term import Term
from distill_jax.recipe import MeshShape, Recipe, Stage, Student


def _qwen(vocab: int, width: int, inner: int, layers: int, heads: int, kv: int, dim: int, tied: bool) -> ModelConfig:
    return ModelConfig(vocab_size=vocab, hidden_size=width, mlp_size=inner, num_layers=layers, num_heads=heads,
                       num_kv_heads=kv, head_dim=dim, context_length=32768, tied=tied, norm_eps=1e-6,
                       attention=AttentionConfig(qkv_bias=True))


SHAPES: dict[str, ModelConfig] = {
    "tiny": _qwen(1024, 64, 128, 2, 4, 2, 16, True),
    "0.5B": _qwen(151936, 896, 4864, 24, 14, 2, 64, True),
    "1.5B": _qwen(151936, 1536, 8960, 28, 12, 2, 128, True),
    "7B": _qwen(152064, 3584, 18944, 28, 28, 4, 128, False),
    "moe": ModelConfig(
        model_type="qwen3_moe", vocab_size=151936, hidden_size=2048, mlp_size=6144, num_layers=16, num_heads=32,
        num_kv_heads=4, head_dim=128, context_length=40960, tied=False, attention=AttentionConfig(qk_norm=True),
        moe=MoE(experts=64, top_k=8, size=768)),
}
"""Sizes of Qwen2.5's config.json; `tiny` is for tests; `moe`: Qwen3-30B-A3B with a
third of its layers and half of its experts."""


def step_recipe(size: str, loss: str = "kd", *, rows: int, length: int = 4096, remat: str = "dots",
                micro_batches: int = 1, mesh: MeshShape | None = None, precision: str = "bfloat16") -> Recipe:
    """One stage: `rows` x `length` packed tokens, `ce` or `kd` (top-64 forward KL and a little cross-entropy)."""
    kd = loss == "kd"
    terms = {"ce": Term(cross_entropy, weight=0.1 if kd else 1.0)}
    if kd:
        terms["kl"] = Term(forward_kl, target="signals/topk64", weight=0.9)
    student = Student(config=SHAPES[size], precision=precision, remat=remat)  # type: ignore[arg-type]
    return Recipe(name=f"bench-{size}", mesh=mesh or MeshShape(), stages=(Stage(
        source=Store(path="none", signals=("topk64",) if kd else (), rows=rows, seq_len=length), terms=terms,
        providers={"student": student}, micro_batches=micro_batches),))
