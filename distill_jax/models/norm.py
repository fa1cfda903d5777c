"""RMSNorm that keeps nothing for the backward pass but its input.

Left to itself, differentiation keeps three float32 arrays of each norm: a good part of what a student keeps without
remat. Here the backward computes them again, from x in the compute dtype.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from distill_jax.models.scores import wide

Array = Any


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def rms_norm(x: Array, scale: Array, eps: float, offset: float) -> Array:
    """x [..., D] / sqrt(mean(x^2) + eps) * (offset + scale [D]) -> [..., D] in x's dtype, computed in float32."""
    y, _ = _normalised(x, eps)
    return (y * _factor(scale, offset, x)).astype(x.dtype)


def _normalised(x: Array, eps: float) -> tuple[Array, Array]:
    """x / rms(x) and 1 / rms(x), in float32 (float64 of float64)."""
    f = x.astype(wide(x.dtype))
    inverse = jax.lax.rsqrt(jnp.mean(jnp.square(f), axis=-1, keepdims=True) + eps)
    return f * inverse, inverse


def _factor(scale: Array, offset: float, x: Array) -> Array:
    return (offset + scale.astype(wide(x.dtype))).reshape((1,) * (x.ndim - 1) + (-1,))


def _forward(x: Array, scale: Array, eps: float, offset: float) -> tuple[Array, tuple[Array, Array]]:
    return rms_norm(x, scale, eps, offset), (x, scale)


def _backward(eps: float, offset: float, saved: tuple[Array, Array], grad: Array) -> tuple[Array, Array]:
    x, scale = saved
    y, inverse = _normalised(x, eps)
    g = grad.astype(y.dtype)
    d_y = g * _factor(scale, offset, x)
    dx = inverse * (d_y - y * jnp.mean(d_y * y, axis=-1, keepdims=True))
    return dx.astype(x.dtype), jnp.sum(g * y, axis=tuple(range(x.ndim - 1))).astype(scale.dtype)


rms_norm.defvjp(_forward, _backward)
