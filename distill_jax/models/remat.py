"""What the backward pass keeps of a layer: named policies, each with the memory and the time it costs.

`Student.remat` and `Transformer.remat` take the names; `plan` computes with the formulas and prints the table. Values
are named where they are made: "product" (with a kernel of the layer, in the compute dtype), "qkv" (rotated queries and
keys, values) and "attention" (its output, and a kernel's row statistics).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax

from distill_jax.models.config import ModelConfig

PRODUCT, QKV, ATTENTION = "product", "qkv", "attention"


@dataclass(frozen=True, kw_only=True)
class Widths:
    """Sizes of one layer on one device: tensor parallelism cuts what belongs to heads and the MLP's inner dimension.
    d: hidden size; q, k: of all query and of all key heads; f: inner size of the MLP. A mixture has on TPUs the inner
    sizes of all experts of a token and its copies for them, elsewhere none: what is inner is computed again
    (`models.tiles`)."""

    d: float
    q: float
    k: float
    f: float

    @classmethod
    def of(cls, c: ModelConfig, tensor: int = 1, platform: str = "cuda") -> "Widths":
        copies = 2 * c.moe.top_k * c.hidden_size / 3 if c.moe else 0
        f = 0 if c.moe and platform != "tpu" else c.inner_size + copies
        return cls(d=c.hidden_size, q=c.num_heads * c.head_dim / tensor, f=f / tensor,
                   k=c.num_kv_heads * c.head_dim / (tensor if c.num_kv_heads % tensor == 0 else 1))


@dataclass(frozen=True, kw_only=True)
class Policy:
    """keeps: in words. save: what `jax.checkpoint` takes; None: nothing is recomputed. The rest are numbers a token:
    kept: of each layer until its backward pass, its input included; working: of the one layer whose backward pass runs.
    again: share of the forward pass that runs a second time.
    """

    keeps: str
    save: Any
    kept: Callable[[Widths], float]
    working: Callable[[Widths], float]
    again: float = 0.0

    def bytes(self, config: ModelConfig, itemsize: int, tensor: int = 1) -> float:
        """What a token keeps for the backward pass in all layers, computing in `itemsize` bytes a number."""
        w = Widths.of(config, tensor)
        return config.num_layers * itemsize * self.kept(w)


REMAT: dict[str, Policy] = {
    "none": Policy(keeps="all that a product or a norm reads: three inner widths (gate, up, the activation)", save=None,
                   kept=lambda w: 3 * w.f + 5 * w.d + 2 * w.q + 2 * w.k, working=lambda w: 5 * w.f + 12 * w.d),
    "dots": Policy(keeps="results of the matrix products",
                   save=jax.checkpoint_policies.save_only_these_names(PRODUCT),
                   kept=lambda w: 2 * w.f + 2 * w.d + w.q + 2 * w.k, working=lambda w: 2 * w.f + 11 * w.d, again=0.1),
    "qkv_attention": Policy(keeps="queries, keys, values and the output of attention: it never runs twice",
                            save=jax.checkpoint_policies.save_only_these_names(QKV, ATTENTION),
                            kept=lambda w: w.d + 2 * w.q + 2 * w.k, working=lambda w: 4 * w.f + 10 * w.d, again=0.85),
    "full": Policy(keeps="the layer's input", save=jax.checkpoint_policies.nothing_saveable,
                   kept=lambda w: w.d, working=lambda w: 4 * w.f + 10 * w.d, again=1.0),
}
"""From most memory and least recomputation to the opposite. Formulas: what XLA was seen to keep (`benchmarks.planner`).
"""


def policy_of(name: str) -> Policy:
    """Raises ValueError for an unknown name."""
    if name not in REMAT:
        raise ValueError(f"remat {name!r} is unknown; known: {', '.join(REMAT)}")
    return REMAT[name]
