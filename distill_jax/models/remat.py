"""What the backward pass keeps of a layer: named policies, each with the bytes a token costs under it.

`Student.remat` and `Transformer.remat` take the names; `plan` prints the table. Values are named where they are made:
"product" (with a kernel of the layer, in the compute dtype), "qkv" (rotated queries and keys, values) and "attention"
(its output, and a kernel's row statistics).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax

from distill_jax.models.config import ModelConfig

PRODUCT, QKV, ATTENTION = "product", "qkv", "attention"


@dataclass(frozen=True, kw_only=True)
class Policy:
    """keeps: in words. save: what `jax.checkpoint` takes; None: nothing is recomputed. width: numbers a token keeps of
    one layer, its input included."""

    keeps: str
    save: Any
    width: Callable[[ModelConfig], int]

    def kept(self, config: ModelConfig, itemsize: int) -> int:
        """Bytes a token keeps for the backward pass in all layers, computing in `itemsize` bytes a number."""
        return itemsize * config.num_layers * self.width(config)


def _heads(c: ModelConfig) -> tuple[int, int]:
    return c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim


def _all(c: ModelConfig) -> int:
    q, kv = _heads(c)
    return 6 * c.hidden_size + 2 * q + 2 * kv + 3 * c.inner_size


def _dots(c: ModelConfig) -> int:
    q, kv = _heads(c)
    return 2 * c.hidden_size + q + 2 * kv + 2 * c.inner_size


def _attention(c: ModelConfig) -> int:
    q, kv = _heads(c)
    return c.hidden_size + 2 * q + 2 * kv


REMAT: dict[str, Policy] = {
    "none": Policy(keeps="everything", save=None, width=_all),
    "dots": Policy(keeps="results of the matrix products", width=_dots,
                   save=jax.checkpoint_policies.save_only_these_names(PRODUCT)),
    "qkv_attention": Policy(keeps="queries, keys, values and the output of attention: it never runs twice",
                            width=_attention, save=jax.checkpoint_policies.save_only_these_names(QKV, ATTENTION)),
    "full": Policy(keeps="the layer's input", save=jax.checkpoint_policies.nothing_saveable,
                   width=lambda c: c.hidden_size),
}
"""From most memory and least recomputation to the opposite."""
