"""The output head: the only thing that turns hidden states into logits."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

Array = Any

NEG = -1e30
"""Logit of a token id that does not exist (vocabulary padding). Finite, so that 0 * NEG is not NaN."""


def wide(*arrays: Array) -> Any:
    """dtype to accumulate in: float32, or float64 when one of the arrays is."""
    return jnp.dtype(jnp.float64 if any(x.dtype == jnp.float64 for x in arrays) else jnp.float32)


def _register(cls: Any) -> Any:
    return jax.tree_util.register_dataclass(
        cls, data_fields=["kernel", "bias"], meta_fields=["scale", "soft_cap", "real"])


@_register
@dataclass(frozen=True, kw_only=True)
class Head:
    """Kernel, bias, scale, soft cap and the number of real ids.

    kernel    [V, D]: the embedding itself when tied, else the stored head matrix (Hugging Face layout)
    bias      [V] or None
    scale     logits are multiplied by it (before the cap); 1 for most families
    soft_cap  cap * tanh(logits / cap) when given (Gemma 2)
    real      number of real token ids; logits at ids >= real are NEG. None: all of them
    """

    kernel: Array
    bias: Array | None = None
    scale: float = 1.0
    soft_cap: float | None = None
    real: int | None = None

    @property
    def vocab(self) -> int:
        return self.kernel.shape[0]

    def project(self, hidden: Array) -> Array:
        """hidden [N, D] -> raw products [N, V]; runs in hidden's dtype, accumulates in float32 (float64 stays)."""
        kernel = self.kernel.astype(hidden.dtype)
        return jax.lax.dot_general(hidden, kernel, (((1,), (1,)), ((), ())), preferred_element_type=wide(hidden))

    def finish(self, raw: Array, first: Array | int = 0) -> Array:
        """Raw products [N, V] -> logits [N, V]: bias, scale, soft cap, NEG for ids that do not exist.

        Of a head that holds rows of a larger one, `first` is the id of the first.
        """
        out = raw
        if self.bias is not None:
            out = out + self.bias.astype(out.dtype)[None, :]
        if self.scale != 1.0:
            out = out * self.scale
        if self.soft_cap is not None:
            out = self.soft_cap * jnp.tanh(out / self.soft_cap)
        if self.real is not None and not (isinstance(first, int) and first + self.vocab <= self.real):
            # An addition, not a selection: finite logits vanish in it all the same, and its gradient is free.
            exists = first + jnp.arange(self.vocab, dtype=jnp.int32) < self.real
            out = out + jnp.where(exists, 0.0, NEG).astype(out.dtype)[None, :]
        return out

    def logits(self, hidden: Array) -> Array:
        """hidden [..., D] -> float32 logits [..., V]."""
        out = self.finish(self.project(hidden.reshape(-1, hidden.shape[-1])))
        return out.reshape(*hidden.shape[:-1], self.vocab)
