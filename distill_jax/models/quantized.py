"""Products of the layers' kernels with operands of 8 bits, by qwix (`distill_jax[quantized]`).

Both operands are divided by scales and rounded: one scale a token, one for each output of the kernel, so that the
largest magnitude along the contracted dimension is the largest number of the format (absmax; found anew each time,
nothing is kept). The product of what is left has sums in int32 (int8) or float32 (fp8); the scales multiply the sums.

The backward pass takes rounding for the identity (straight-through): its products are those of `product`, on operands
that were not rounded. Under "..._dx" the gradient of the states is an 8-bit product too, with a scale a token for what
comes back and one for each input of the kernel. The kernel's gradient never is: it contracts over tokens, whose scale
all devices would have to agree on (as in AQT's default). Parameters and their gradients stay what they are without.
"""

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from distill_jax.models.config import ModelConfig
from distill_jax.models.product import product
from distill_jax.models.scores import wide
from distill_jax.sharding import auto_axes

Array = Any


@dataclass(frozen=True, kw_only=True)
class Format:
    """unit: the peak of `jobs.hardware` it runs at. operands: dtype of states and kernel. grad: dtype of what comes
    back, in the gradient of the states; None: that product is not quantised."""

    unit: str
    operands: Any
    grad: Any = None


MATMULS: dict[str, Format | None] = {
    "full": None,
    "int8": Format(unit="int8", operands=jnp.int8),
    "fp8": Format(unit="fp8", operands=jnp.float8_e4m3fn),
    "int8_dx": Format(unit="int8", operands=jnp.int8, grad=jnp.int8),
    "fp8_dx": Format(unit="fp8", operands=jnp.float8_e4m3fn, grad=jnp.float8_e5m2),
}
"""`Student.matmul`: "full" computes in `precision`."""


def check_matmul(name: str, config: ModelConfig) -> None:
    """Raises ValueError for an unknown name, a mixture of experts, or where qwix is missing."""
    if name not in MATMULS:
        raise ValueError(f"matmul {name!r} is unknown; known: {', '.join(MATMULS)}")
    if MATMULS[name] and config.moe:
        raise ValueError(f"matmul={name!r} is for dense models, this one has {config.moe.experts} experts a layer; "
                         "use matmul='full'")
    if MATMULS[name] and importlib.util.find_spec("qwix") is None:
        raise ValueError(f"matmul={name!r} needs qwix: pip install 'distill_jax[quantized]', or use matmul='full'")


def matmul(x: Array, kernel: Array, name: str = "full") -> Array:
    """x [B,T,in] times kernel [in,out], both in the compute dtype -> [B,T,out] in it. name: of MATMULS."""
    how = MATMULS[name]
    if how is None:
        return product(x, kernel)
    flat = x if "context" in auto_axes() else x.reshape(-1, x.shape[-1])  # as `product` has it
    y: Array = _quantized(flat, kernel, how)
    return y.reshape(*x.shape[:-1], kernel.shape[-1])


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _quantized(x: Array, kernel: Array, how: Format) -> Array:
    return _dot(x, kernel, how.operands, how.operands, 0)


def _forward(x: Array, kernel: Array, how: Format) -> tuple[Array, tuple[Array, Array]]:
    return _quantized(x, kernel, how), (x, kernel)


def _backward(how: Format, saved: tuple[Array, Array], grad: Array) -> tuple[Array, Array]:
    dx, d_kernel = jax.vjp(product, *saved)[1](grad)
    return (dx if how.grad is None else _dot(grad, saved[1], how.grad, how.operands, 1)), d_kernel


_quantized.defvjp(_forward, _backward)


def _dot(a: Array, b: Array, a_type: Any, b_type: Any, contract: int) -> Array:
    """a [..., n] with b's dimension `contract` of n -> [..., m] in a's dtype."""
    from qwix import dot_general  # pyright: ignore[reportMissingImports]

    last = a.ndim - 1
    with jax.numpy_dtype_promotion("standard"):  # qwix multiplies int32 by float32
        y = dot_general(_rounded(a, a_type, range(last)), _rounded(b, b_type, (1 - contract,)),
                        (((last,), (contract,)), ((), ())))
    return y.astype(a.dtype)


def _rounded(x: Array, dtype: Any, axes: Sequence[int]) -> Any:
    """x in the format, with a scale for each index of `axes`."""
    from qwix import quantize  # pyright: ignore[reportMissingImports]

    return quantize(x.astype(wide(x.dtype)), dtype, channelwise_axes=axes, calibration_method=calibration(dtype))


def calibration(dtype: Any) -> str:
    """qwix's absmax; of int8 with 127 for the largest number. It has 127.5: the largest of x then lies half way between
    two numbers, and the last bit of the scale, which differs between programs, decides how it is rounded."""
    return f"absmax,{127.5 / 127}" if dtype == jnp.int8 else "absmax"
