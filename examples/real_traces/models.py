"""Sizes used by the recipes beside this file. Qwen2 architecture, small enough for two CPU cores."""

from distill_jax.models.config import AttentionConfig, ModelConfig
from distill_jax.models.rope import Rope


def qwen2(width: int, layers: int, vocab: int, context: int = 1024, tied: bool = True) -> ModelConfig:
    """A Qwen2 decoder of the given width with heads of 32, half as many key-value heads, and a 4x MLP."""
    heads = width // 32
    return ModelConfig(
        vocab_size=vocab, hidden_size=width, mlp_size=4 * width, num_layers=layers, num_heads=heads,
        num_kv_heads=max(1, heads // 2), head_dim=32, context_length=context, model_type="qwen2", tied=tied,
        attention=AttentionConfig(qkv_bias=True, rope=Rope(theta=10000.0)))
