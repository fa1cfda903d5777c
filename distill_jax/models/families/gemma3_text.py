"""Gemma 3 (text): Gemma 2 with q and k norms instead of the attention cap, five sliding layers to a full one, and a
rotary embedding of its own for each kind."""

from typing import Any

from distill_jax.models.config import AttentionConfig, ModelConfig
from distill_jax.models.families.base import (
    GEMMA_NORMS,
    Family,
    Json,
    read_layer_types,
    read_rope,
    scaling_of,
    write_rope,
)
from distill_jax.models.families.gemma2 import read_gemma, write_gemma
from distill_jax.models.rope import Rope


def read(cfg: Json) -> ModelConfig:
    bias = bool(cfg.get("attention_bias"))
    period = cfg.get("sliding_window_pattern") or cfg.get("_sliding_window_pattern") or 6
    sliding = read_layer_types(cfg, [bool((i + 1) % period) for i in range(cfg["num_hidden_layers"])])
    nested = (cfg.get("rope_parameters") or {}).get("sliding_attention")
    local = {"rope_parameters": nested, "max_position_embeddings": cfg["max_position_embeddings"]} if nested else {}
    attention = AttentionConfig(
        qkv_bias=bias, out_bias=bias, qk_norm=True, scale=cfg.get("query_pre_attn_scalar", 256) ** -0.5,
        window=cfg.get("sliding_window", 4096) if sliding else None, sliding=sliding,
        rope=read_rope(cfg, layer_type="full_attention", theta=1e6),
        local_rope=read_rope(local, theta=cfg.get("rope_local_base_freq", 1e4)))
    return ModelConfig(attention=attention, logit_soft_cap=cfg.get("final_logit_softcapping"), **read_gemma(cfg))


def write(config: ModelConfig) -> dict[str, Any]:
    full, local = config.attention.rope, config.attention.local_rope or Rope()
    new = write_rope(full)
    return {**write_gemma(config), "rope_parameters": {"full_attention": new, "sliding_attention": write_rope(local)},
            "rope_theta": full.theta, "rope_scaling": scaling_of(new), "rope_local_base_freq": local.theta}


FAMILY = Family(model_type="gemma3_text", architecture="Gemma3ForCausalLM", read=read, write=write, norms=GEMMA_NORMS)
