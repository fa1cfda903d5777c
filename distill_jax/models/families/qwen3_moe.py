"""Qwen3-MoE (Qwen3-30B-A3B and kin): Qwen3 with experts in place of every layer's MLP.

Published checkpoints hold a tensor per expert and projection; so does what we write, and what `save_pretrained` of
transformers 5 writes. Its modules (and files saved with `save_original_format=False`) hold fused ones:
experts.gate_up_proj [E, 2F, D] and experts.down_proj [E, D, F]; they are read as views.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from distill_jax.models.config import ModelConfig, MoE
from distill_jax.models.families.base import LLAMA_NORMS, Family, Json, Tensor, require
from distill_jax.models.families.qwen3 import read as read_dense
from distill_jax.models.families.qwen3 import write as write_dense
from distill_jax.models.tensorfile import TensorInfo

FUSED = re.compile(r"(model\.layers\.\d+\.mlp\.experts)\.(gate_up_proj|down_proj)$")


def read(cfg: Json) -> ModelConfig:
    require(cfg, "num_experts_per_tok", "moe_intermediate_size")
    experts = cfg.get("num_experts", cfg.get("num_local_experts"))
    if not experts:
        raise ValueError(f"config.json of model_type 'qwen3_moe' needs num_experts, got {experts!r}; without experts "
                         "it is model_type 'qwen3'")
    dense = cfg.get("mlp_only_layers") or []
    if dense or cfg.get("decoder_sparse_step", 1) != 1:
        raise ValueError(f"config.json: mlp_only_layers = {dense}, decoder_sparse_step = "
                         f"{cfg.get('decoder_sparse_step', 1)}: layers must be alike; use a model with experts in "
                         "every layer ([] and 1)")
    coefficient = cfg.get("router_aux_loss_coef")
    moe = MoE(experts=experts, top_k=cfg["num_experts_per_tok"], size=cfg["moe_intermediate_size"],
              norm=bool(cfg.get("norm_topk_prob", False)), balance=0.001 if coefficient is None else coefficient)
    config = read_dense({"intermediate_size": cfg["moe_intermediate_size"], **cfg})
    return replace(config, moe=moe)


def write(config: ModelConfig) -> dict[str, Any]:
    m = config.moe
    if m is None:
        raise ValueError("a qwen3_moe model needs ModelConfig.moe, got None; model_type 'qwen3' is the dense family")
    return {**write_dense(config), "num_experts": m.experts, "num_experts_per_tok": m.top_k,
            "moe_intermediate_size": m.size, "norm_topk_prob": m.norm, "router_aux_loss_coef": m.balance,
            "decoder_sparse_step": 1, "mlp_only_layers": []}


def unfused(stored: Mapping[str, TensorInfo]) -> dict[str, TensorInfo]:
    """Tensors of a file by their published names: a fused one becomes the views of its experts."""
    out: dict[str, TensorInfo] = {}
    for name, info in stored.items():
        found = FUSED.search(name)
        if not found or len(info.shape) != 3:
            out[name] = info
            continue
        height = info.shape[1]
        cuts = {"down_proj": (0, height)} if found[2] == "down_proj" else {
            "gate_proj": (0, height // 2), "up_proj": (height // 2, height)}
        out |= {f"{found[1]}.{expert}.{part}.weight": info.rows(expert, *cut)
                for expert in range(info.shape[0]) for part, cut in cuts.items()}
    return out


@dataclass(frozen=True, kw_only=True)
class Sparse(Family):
    """A family whose MLP is a mixture."""

    def mlp(self, config: ModelConfig) -> list[Tensor]:
        layer = "model.layers.{}.mlp."
        return [Tensor(path="layers/moe/router/kernel", name=f"{layer}gate.weight", transpose=True),
                *(Tensor(path=f"layers/moe/{part}/kernel", name=layer + "experts.{}." + f"{part}_proj.weight",
                         transpose=True) for part in ("gate", "up", "down"))]

    def stored(self, tensors: Mapping[str, TensorInfo]) -> Mapping[str, TensorInfo]:
        return unfused(tensors)


FAMILY = Sparse(model_type="qwen3_moe", architecture="Qwen3MoeForCausalLM", read=read, write=write, norms=LLAMA_NORMS)
