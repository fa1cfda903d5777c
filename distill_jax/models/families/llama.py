"""Llama 2 and 3 and the many models that call themselves llama; optional biases on all projections."""

from typing import Any

from distill_jax.models.config import AttentionConfig, ModelConfig
from distill_jax.models.families.base import (
    LLAMA_NORMS,
    Family,
    Json,
    both_ropes,
    read_common,
    read_rope,
    write_common,
)


def read(cfg: Json) -> ModelConfig:
    bias = bool(cfg.get("attention_bias"))
    attention = AttentionConfig(qkv_bias=bias, out_bias=bias, rope=read_rope(cfg))
    return ModelConfig(attention=attention, mlp_bias=bool(cfg.get("mlp_bias")), **read_common(cfg, tied=False))


def write(config: ModelConfig) -> dict[str, Any]:
    return {**write_common(config), **both_ropes(config.attention.rope),
            "attention_bias": config.attention.qkv_bias, "mlp_bias": config.mlp_bias}


FAMILY = Family(model_type="llama", architecture="LlamaForCausalLM", read=read, write=write, norms=LLAMA_NORMS)
