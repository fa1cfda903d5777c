"""Adam whose moments are kept in bfloat16 or in eight bits (Dettmers et al. 2022, 2110.02861, block-wise quantisation).

The update is computed in float32 from the new moments; what is kept of them is rounded at random, up or down so that
the mean is exact. Rounded to nearest, a second moment with b2 = 0.999 moves by less than half a step and would stand
still. The price is noise: after many updates with b2 = 0.95 the root of an eight-bit v is off by 1% (the largest of a
block) to 5% (what is sixteen times smaller), with 0.999 by seven times as much. The random bits are a function of the
count and of the place in the tree: a resumed run ends with the same bits.

Eight bits: a block is a stretch of the last axis, so codes are shaped and sharded like the parameter, and so are the
scales, one float32 a block. The codes are powers, dense near zero: m = scale sign(c) (|c| / 127)^3, which reaches
down to 5e-7 of the block's largest; v = scale (c / 255)^4, that is, its root on a grid of squares. A v that is not
zero never becomes zero: the update divides by its root. The paper's dynamic code serves the same end.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from distill_jax.core.platform import platform

Array = Any
Tree = Any
State = Literal["float32", "bfloat16", "int8"]
BLOCK = 256
"""Most numbers that share a scale."""
PARTS = 16
SMALLEST = 64


def block_size(length: int) -> int:
    """Numbers a block, for a last axis of `length`: at most BLOCK, and a divisor of `length`.

    If it can be, and a block keeps SMALLEST numbers, a divisor of a sixteenth of the axis: then no block lies on two
    of up to sixteen devices. An axis without a divisor from SMALLEST to BLOCK is one block.
    """
    for whole in (length // PARTS if length % PARTS == 0 else 0, length):
        found = next((b for b in range(min(BLOCK, whole), SMALLEST - 1, -1) if whole % b == 0), 0)
        if found:
            return found
    return length


@dataclass(frozen=True)
class Code:
    """Numbers of one block as whole numbers up to `top`: x = scale sign (c / top)^power."""

    top: int
    power: int
    signed: bool

    @property
    def dtype(self) -> Any:
        return jnp.int8 if self.signed else jnp.uint8

    def decode(self, codes: Array, scales: Array) -> Array:
        """codes [..., n], scales [..., blocks] -> float32 [..., n]."""
        c = codes.astype(jnp.float32)
        value = jnp.sign(c) * jnp.abs(c / self.top) ** self.power
        return (_blocked(value, scales.shape[-1]) * scales[..., None]).reshape(codes.shape)

    def encode(self, x: Array, chance: Array) -> tuple[Array, Array]:
        """x [..., n] and chance [..., n] in [0, 1) -> codes, scales. Exact in the mean over uniform chances."""
        blocks = _blocked(jnp.abs(x), x.shape[-1] // block_size(x.shape[-1]))
        scales = jnp.max(blocks, axis=-1)
        part = (blocks / jnp.where(scales > 0, scales, 1.0)[..., None]).reshape(x.shape)
        low = jnp.clip(jnp.floor(self.top * part ** (1.0 / self.power)), 0, self.top - 1)
        value = lambda c: (c / self.top) ** self.power
        share = (part - value(low)) / (value(low + 1) - value(low))
        c = low + (chance < share).astype(low.dtype)
        if not self.signed:
            c = jnp.where(x > 0, jnp.maximum(c, 1), c)
        return (jnp.sign(x) * c if self.signed else c).astype(self.dtype), scales


FIRST, SECOND = Code(top=127, power=3, signed=True), Code(top=255, power=4, signed=False)


def _blocked(x: Array, blocks: int) -> Array:
    return x.reshape(*x.shape[:-1], blocks, x.shape[-1] // blocks)


class Moments(NamedTuple):
    """count i32 []; mu, nu: trees like the parameters, of what is kept; in eight bits also their scales [..., blocks],
    else None. A parameter without axes is kept in float32."""

    count: Array
    mu: Tree
    nu: Tree
    mu_scale: Tree = None
    nu_scale: Tree = None


def scale_by_adam(b1: float, b2: float, eps: float, state: State) -> optax.GradientTransformationExtraArgs:
    """`optax.scale_by_adam` with moments kept in `state`; float32 is optax's own rule.

    `update(..., ok=False)` leaves the moments as they were (its direction then means nothing). Who selects afterwards
    has old and new moments at once.
    """
    make = {"float32": _whole, "bfloat16": _sixteen_bits, "int8": _eight_bits}[state]
    return make(b1, b2, eps)


def _whole(b1: float, b2: float, eps: float) -> optax.GradientTransformationExtraArgs:
    adam = optax.scale_by_adam(b1=b1, b2=b2, eps=eps)

    def update(updates: Tree, state: Any, params: Tree = None, *, ok: Array | None = None, **_: Any
               ) -> tuple[Tree, Any]:
        new: Any = adam.update(updates, state, params)[1]
        kept = select(ok, new, state)
        used = new
        if platform() == "cpu":  # it would compute the moments again for the direction, and copy the old ones for that
            kept = kept._replace(**dict(zip(("mu", "nu"), jax.lax.optimization_barrier((kept.mu, kept.nu)))))
            used = kept
        mu, nu = optax.tree.bias_correction(used.mu, b1, new.count), optax.tree.bias_correction(used.nu, b2, new.count)
        return jax.tree.map(lambda m, v: m / (jnp.sqrt(v) + eps), mu, nu), kept

    return optax.GradientTransformationExtraArgs(adam.init, update)


def select(ok: Array | None, new: Tree, old: Tree) -> Tree:
    """new where ok (None: always), else old."""
    return new if ok is None else jax.tree.map(lambda n, o: jnp.where(ok, n, o), new, old)


def _sixteen_bits(b1: float, b2: float, eps: float) -> optax.GradientTransformationExtraArgs:
    def init(params: Tree) -> Moments:
        zeros = lambda: jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.bfloat16), params)
        return Moments(jnp.zeros((), jnp.int32), zeros(), zeros())

    def leaf(number: int, g: Array, count: Array, mu: Array, nu: Array) -> tuple[Array, ...]:
        update, m, v = _adam(b1, b2, eps, g, mu.astype(jnp.float32), nu.astype(jnp.float32), count)
        low, high = _random(count, number, g.shape)
        return update, _round_bfloat16(m, low), _round_bfloat16(v, high)

    return optax.GradientTransformationExtraArgs(init, _update(leaf, 2))


def _eight_bits(b1: float, b2: float, eps: float) -> optax.GradientTransformationExtraArgs:
    def init(params: Tree) -> Moments:
        codes = lambda code: jax.tree.map(lambda p: jnp.zeros(p.shape, code.dtype if p.ndim else jnp.float32), params)
        scales = lambda: jax.tree.map(lambda p: jnp.zeros(_scales(p.shape), jnp.float32), params)
        return Moments(jnp.zeros((), jnp.int32), codes(FIRST), codes(SECOND), scales(), scales())

    def leaf(number: int, g: Array, count: Array, mu: Array, nu: Array, mu_scale: Array, nu_scale: Array
             ) -> tuple[Array, ...]:
        if not g.ndim:
            return (*_adam(b1, b2, eps, g, mu, nu, count), mu_scale, nu_scale)
        update, m, v = _adam(b1, b2, eps, g, FIRST.decode(mu, mu_scale), SECOND.decode(nu, nu_scale), count)
        low, high = (x.astype(jnp.float32) / 2**16 for x in _random(count, number, g.shape))
        (mu, mu_scale), (nu, nu_scale) = FIRST.encode(m, low), SECOND.encode(v, high)
        return update, mu, nu, mu_scale, nu_scale

    return optax.GradientTransformationExtraArgs(init, _update(leaf, 4))


def _update(leaf: Callable[..., tuple[Array, ...]], parts: int) -> Callable[..., tuple[Tree, Moments]]:
    """An optax update out of one for a single leaf: (number, gradient, count, *kept) -> (update, *kept)."""

    def update(updates: Tree, state: Any, params: Tree = None, *, ok: Array | None = None, **_: Any
               ) -> tuple[Tree, Moments]:
        flat, treedef = jax.tree.flatten(updates)
        kept = [treedef.flatten_up_to(tree) for tree in state[1:1 + parts]]
        count = state.count + 1
        new = [leaf(i, g, count, *of) for i, (g, *of) in enumerate(zip(flat, *kept))]
        directions, *trees = (treedef.unflatten(column) for column in zip(*new))
        return directions, select(ok, Moments(count, *trees, *state[1 + parts:]), state)

    return update


def _scales(shape: tuple[int, ...]) -> tuple[int, ...]:
    return (*shape[:-1], shape[-1] // block_size(shape[-1])) if shape else ()


def _adam(b1: float, b2: float, eps: float, g: Array, m: Array, v: Array, count: Array) -> tuple[Array, Array, Array]:
    """-> update, new m, new v; the bias correction is optax's."""
    dtype, g = g.dtype, g.astype(jnp.float32)
    m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * jnp.square(g)
    steps = count.astype(jnp.float32)
    update = m / (1 - b1**steps) / (jnp.sqrt(v / (1 - b2**steps)) + eps)
    return update.astype(dtype), m, v


def _random(count: Array, number: int, shape: tuple[int, ...]) -> tuple[Array, Array]:
    """Two uint32 arrays of sixteen random bits, the same on every layout."""
    bits = jax.random.bits(jax.random.fold_in(jax.random.fold_in(jax.random.key(0), count), number), shape, jnp.uint32)
    return bits & 0xFFFF, bits >> 16


def _round_bfloat16(x: Array, low: Array) -> Array:
    """float32 -> bfloat16, up with the probability that the sixteen dropped bits stand for."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32) + low
    return jax.lax.bitcast_convert_type((bits >> 16).astype(jnp.uint16), jnp.bfloat16)
