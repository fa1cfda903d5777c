"""Qwen3-30B-A3B by its published config.json: 128 experts in each of 48 layers, 8 a token; 30.5B parameters, 3.3B
active.

For `plan` without a network: Student(config=CONFIG). To train it give the weights: Student(model="Qwen/Qwen3-30B-A3B").
"""

from distill_jax.models.config import AttentionConfig, ModelConfig, MoE
from distill_jax.models.rope import Rope

CONFIG = ModelConfig(
    model_type="qwen3_moe", vocab_size=151936, hidden_size=2048, mlp_size=6144, num_layers=48, num_heads=32,
    num_kv_heads=4, head_dim=128, context_length=40960, tied=False,
    attention=AttentionConfig(qk_norm=True, rope=Rope(theta=1e6)),
    moe=MoE(experts=128, top_k=8, size=768, norm=True, balance=0.001))
