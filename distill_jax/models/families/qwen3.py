"""Qwen3 (dense): q and k are normalised per head; no biases unless `attention_bias`."""

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
from distill_jax.models.families.qwen2 import read_window, write_window


def read(cfg: Json) -> ModelConfig:
    window, sliding = read_window(cfg)
    bias = bool(cfg.get("attention_bias"))
    attention = AttentionConfig(qkv_bias=bias, out_bias=bias, qk_norm=True, window=window, sliding=sliding,
                                rope=read_rope(cfg))
    common = read_common(cfg, tied=False)
    return ModelConfig(attention=attention, **{**common, "head_dim": cfg.get("head_dim") or 128})


def write(config: ModelConfig) -> dict[str, Any]:
    return {**write_common(config), **both_ropes(config.attention.rope), **write_window(config),
            "attention_bias": config.attention.qkv_bias}


FAMILY = Family(model_type="qwen3", architecture="Qwen3ForCausalLM", read=read, write=write, norms=LLAMA_NORMS)
