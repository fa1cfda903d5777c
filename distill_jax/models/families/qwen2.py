"""Qwen2 and Qwen2.5 (also the R1 distillations of them): biases on q, k, v; optional windows in upper layers."""

from typing import Any

from distill_jax.models.config import AttentionConfig, ModelConfig
from distill_jax.models.families.base import (
    LLAMA_NORMS,
    Family,
    Json,
    both_ropes,
    read_common,
    read_layer_types,
    read_rope,
    write_common,
    write_layer_types,
)


def read_window(cfg: Json) -> tuple[int | None, tuple[bool, ...]]:
    """`sliding_window` counts only with `use_sliding_window`, and for layers from `max_window_layers` on."""
    if not cfg.get("use_sliding_window"):
        return None, ()
    layers, first = cfg["num_hidden_layers"], cfg.get("max_window_layers", 28)
    sliding = read_layer_types(cfg, [i >= first for i in range(layers)])
    return (cfg.get("sliding_window") or 4096, sliding) if sliding else (None, ())


def write_window(config: ModelConfig) -> dict[str, Any]:
    window = config.attention.window if any(config.sliding) else None
    first = next((i for i, s in enumerate(config.sliding) if s), config.num_layers)
    return {"use_sliding_window": window is not None, "sliding_window": window, "max_window_layers": first,
            "layer_types": write_layer_types(config)}


def read(cfg: Json) -> ModelConfig:
    window, sliding = read_window(cfg)
    attention = AttentionConfig(qkv_bias=True, window=window, sliding=sliding, rope=read_rope(cfg))
    return ModelConfig(attention=attention, **read_common(cfg, tied=False))


def write(config: ModelConfig) -> dict[str, Any]:
    return {**write_common(config), **both_ropes(config.attention.rope), **write_window(config)}


FAMILY = Family(model_type="qwen2", architecture="Qwen2ForCausalLM", read=read, write=write, norms=LLAMA_NORMS)
