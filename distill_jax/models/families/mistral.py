"""Mistral: Llama without biases, every layer sliding where `sliding_window` is set."""

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
    # absent means 4096 (the default of the class); null means none
    window = cfg.get("sliding_window", 4096)
    sliding = (True,) * cfg["num_hidden_layers"] if window else ()
    attention = AttentionConfig(window=window or None, sliding=sliding, rope=read_rope(cfg))
    return ModelConfig(attention=attention, **read_common(cfg, tied=False))


def write(config: ModelConfig) -> dict[str, Any]:
    return {**write_common(config), **both_ropes(config.attention.rope), "sliding_window": config.attention.window}


FAMILY = Family(model_type="mistral", architecture="MistralForCausalLM", read=read, write=write, norms=LLAMA_NORMS)
