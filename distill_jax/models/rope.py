"""Rotary position embeddings and the ways models stretch them beyond their first context.

Frequencies are NumPy constants (they depend on the configuration only); angles, cosine and sine are float32.
`scaling` objects are frozen dataclasses, so that a model configuration stays hashable.
"""

import math
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np

from distill_jax.models.scores import wide

Array = Any


def _plain(theta: float, dim: int) -> np.ndarray:
    return 1.0 / theta ** (np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim))


@dataclass(frozen=True, kw_only=True)
class Linear:
    """Positions divided by `factor` (position interpolation, Chen et al. 2023)."""

    factor: float

    def frequencies(self, theta: float, dim: int, length: int) -> tuple[np.ndarray, float]:
        return _plain(theta, dim) / self.factor, 1.0


@dataclass(frozen=True, kw_only=True)
class Dynamic:
    """NTK-aware scaling whose base grows with the length of the row once that exceeds `original`.

    The length is the static one of the call (tokens of a row, or capacity of the cache), never data: otherwise
    one packed document would change another. A full unpadded row gives what transformers gives.
    """

    factor: float
    original: int

    def frequencies(self, theta: float, dim: int, length: int) -> tuple[np.ndarray, float]:
        stretch = self.factor * max(length, self.original) / self.original - (self.factor - 1)
        return _plain(theta * stretch ** (dim / (dim - 2)), dim), 1.0


@dataclass(frozen=True, kw_only=True)
class Llama3:
    """Llama 3.1: long wavelengths divided by `factor`, short ones kept, a linear blend between."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original: int

    def frequencies(self, theta: float, dim: int, length: int) -> tuple[np.ndarray, float]:
        freq = _plain(theta, dim)
        turns = self.original * freq / (2 * np.pi)  # rotations within the original context
        keep = np.clip((turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor), 0.0, 1.0)
        return (freq * keep + freq / self.factor * (1 - keep)).astype(np.float32), 1.0


@dataclass(frozen=True, kw_only=True)
class Yarn:
    """YaRN (Peng et al. 2023): a ramp between interpolated and kept frequencies, and a scaled cosine and sine.

    attention_factor: scale of cosine and sine; None derives it from `factor` (and `mscale`, `mscale_all_dim`).
    truncate: whether the ends of the ramp are rounded to whole dimensions.
    """

    factor: float
    original: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True

    def _scale(self, m: float = 1.0) -> float:
        return 1.0 if self.factor <= 1 else 0.1 * m * math.log(self.factor) + 1.0

    def _magnitude(self) -> float:
        if self.attention_factor is not None:
            return self.attention_factor
        if self.mscale and self.mscale_all_dim:
            return self._scale(self.mscale) / self._scale(self.mscale_all_dim)
        return self._scale()

    def frequencies(self, theta: float, dim: int, length: int) -> tuple[np.ndarray, float]:
        def at_turns(turns: float) -> float:
            """The dimension that makes `turns` rotations within the original context."""
            return dim * math.log(self.original / (turns * 2 * math.pi)) / (2 * math.log(theta))

        low, high = at_turns(self.beta_fast), at_turns(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, dim - 1)
        high = high + 0.001 if high == low else high  # a ramp of width zero would divide by zero
        keep = 1.0 - np.clip((np.arange(dim // 2, dtype=np.float32) - low) / (high - low), 0.0, 1.0)
        freq = _plain(theta, dim)
        return (freq / self.factor * (1 - keep) + freq * keep).astype(np.float32), self._magnitude()


Scaling = Linear | Dynamic | Llama3 | Yarn


@dataclass(frozen=True, kw_only=True)
class Rope:
    """theta: base of the frequencies; fraction: share of head_dim that is rotated; scaling: beyond the context."""

    theta: float = 10000.0
    fraction: float = 1.0
    scaling: Scaling | None = None

    def rotary_dim(self, head_dim: int) -> int:
        return int(head_dim * self.fraction)

    def tables(self, positions: Array, head_dim: int, length: int) -> tuple[Array, Array]:
        """positions i32 [B,T] -> cosine and sine, f32 [B,T,rotary_dim/2]; length: static length of the row."""
        dim = self.rotary_dim(head_dim)
        if self.scaling is None:
            freq, magnitude = _plain(self.theta, dim), 1.0
        else:
            freq, magnitude = self.scaling.frequencies(self.theta, dim, length)
        angles = positions.astype(jnp.float32)[..., None] * jnp.asarray(freq, jnp.float32)[None, None, :]
        return jnp.cos(angles) * magnitude, jnp.sin(angles) * magnitude


def rotate(x: Array, cos: Array, sin: Array) -> Array:
    """Rotate the first 2R of head_dim of x [B,H,T,head_dim] by cos, sin [B,T,R]; halves pair up (not neighbours)."""
    r = cos.shape[-1]
    cos, sin = cos[:, None], sin[:, None]
    part = x[..., :2 * r].astype(wide(x.dtype))
    cos, sin = cos.astype(part.dtype), sin.astype(part.dtype)
    a, b = part[..., :r], part[..., r:]
    turned = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)
    return turned if 2 * r == x.shape[-1] else jnp.concatenate([turned, x[..., 2 * r:]], axis=-1)
