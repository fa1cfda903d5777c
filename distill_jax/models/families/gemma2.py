"""Gemma 2: soft caps, norms before and after, (1 + weight) scales, embeddings times sqrt(D), alternating windows."""

import math
from typing import Any

from distill_jax.models.config import AttentionConfig, ModelConfig
from distill_jax.models.families.base import (
    GEMMA_NORMS,
    Family,
    Json,
    both_ropes,
    read_common,
    read_layer_types,
    read_rope,
    refuse,
    write_common,
    write_layer_types,
)

ONE_WAY = {"use_bidirectional_attention": "only causal attention is supported"}


def read_gemma(cfg: Json) -> dict[str, Any]:
    """What Gemma 2 and 3 share beyond `read_common`."""
    refuse(cfg, **ONE_WAY)
    common = read_common({"hidden_activation": "gelu_pytorch_tanh", **cfg}, tied=True, activation="hidden_activation")
    return {**common, "head_dim": cfg.get("head_dim") or 256, "norm_offset": 1.0, "post_norms": True,
            "embed_scale": math.sqrt(cfg["hidden_size"])}


def read(cfg: Json) -> ModelConfig:
    bias = bool(cfg.get("attention_bias"))
    sliding = read_layer_types(cfg, [i % 2 == 0 for i in range(cfg["num_hidden_layers"])])
    attention = AttentionConfig(
        qkv_bias=bias, out_bias=bias, scale=cfg.get("query_pre_attn_scalar", 256) ** -0.5, sliding=sliding,
        soft_cap=cfg.get("attn_logit_softcapping", 50.0), window=cfg.get("sliding_window", 4096) if sliding else None,
        rope=read_rope(cfg))
    cap = cfg.get("final_logit_softcapping", 30.0)
    return ModelConfig(attention=attention, logit_soft_cap=cap, **read_gemma(cfg))


def write_gemma(config: ModelConfig) -> dict[str, Any]:
    a = config.attention
    scale = config.head_dim ** -0.5 if a.scale is None else a.scale
    return {**write_common(config, activation="hidden_activation"), "hidden_act": "gelu_pytorch_tanh",
            "attention_bias": a.qkv_bias, "query_pre_attn_scalar": round(scale ** -2), "sliding_window": a.window,
            "layer_types": write_layer_types(config), "final_logit_softcapping": config.logit_soft_cap,
            "attn_logit_softcapping": a.soft_cap}


def write(config: ModelConfig) -> dict[str, Any]:
    return {**write_gemma(config), **both_ropes(config.attention.rope)}


FAMILY = Family(model_type="gemma2", architecture="Gemma2ForCausalLM", read=read, write=write, norms=GEMMA_NORMS)
