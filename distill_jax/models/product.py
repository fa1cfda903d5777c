"""The products and the gated activation of a layer, in the form that each platform runs fastest.

On accelerators these are `jnp.dot` and `activation(gate) * up`. What is said here of the CPU was measured there
(`benchmarks.peers`); none of it changes what is computed, beyond rounding.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from distill_jax.core.platform import platform
from distill_jax.sharding import auto_axes

Array = Any


def product(x: Array, kernel: Array) -> Array:
    """x [B,T,in] times kernel [in,out], both in the compute dtype -> [B,T,out] in it.

    Rows and tokens are one dimension to the product: two-dimensional ones are what every backend runs fastest. Not
    where a mesh cuts the tokens of a row: no cut of that one dimension says so, and the states would be gathered.
    The CPU has fast routines for row-major operands, and in bfloat16 for float32 results only (half the time of what
    it does otherwise); so there, results are float32 and then rounded, and the kernel's gradient takes x transposed.
    """
    if "context" in auto_axes():
        return jnp.dot(x, kernel)
    flat = x.reshape(-1, x.shape[-1])
    y = _on_cpu(flat, kernel) if platform() == "cpu" else jnp.dot(flat, kernel)
    return y.reshape(*x.shape[:-1], kernel.shape[-1])


def _forward(x: Array, kernel: Array) -> tuple[Array, tuple[Array, Array]]:
    return _dot(x, kernel, 0).astype(x.dtype), (x, kernel)


def _dot(a: Array, b: Array, contract_b: int) -> Array:
    wide = jnp.float32 if a.dtype == jnp.bfloat16 else a.dtype
    return jax.lax.dot_general(a, b, (((1,), (contract_b,)), ((), ())), preferred_element_type=wide)


def _backward(saved: tuple[Array, Array], grad: Array) -> tuple[Array, Array]:
    x, kernel = saved
    return _dot(grad, kernel, 1).astype(x.dtype), _dot(_transposed(x), grad, 0).astype(kernel.dtype)


def _transposed(x: Array) -> Array:
    """x.T [in,N] in memory. The compiler would leave a plain transposition to the product, which is slow at it."""
    n, width = x.shape
    eights = x.reshape(-1, 8 if n % 8 == 0 else 1, width)
    return jax.lax.optimization_barrier(jnp.moveaxis(eights, 2, 0)).reshape(width, n)


_on_cpu = jax.custom_vjp(lambda x, kernel: _forward(x, kernel)[0])
_on_cpu.defvjp(_forward, _backward)


def gated(activation: Callable[[Array], Array], gate: Array, up: Array) -> Array:
    """activation(gate) * up in their dtype, the activation in float32. Of the forward pass only gate and up are kept.
    """
    @jax.custom_vjp
    def glu(gate: Array, up: Array) -> Array:
        return (activation(_wide(gate)) * _wide(up)).astype(gate.dtype)

    def backward(saved: tuple[Array, Array], grad: Array) -> tuple[Array, Array]:
        gate, up = saved
        acted, back = jax.vjp(activation, _wide(gate))
        d_gate, = back(_wide(grad) * _wide(up))
        return d_gate.astype(gate.dtype), (_wide(grad) * acted).astype(up.dtype)

    glu.defvjp(lambda gate, up: (glu(gate, up), (gate, up)), backward)
    return glu(gate, up)


def _wide(x: Array) -> Array:
    return x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x
