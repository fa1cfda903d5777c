"""Logits of which a device has some columns only: sums over the vocabulary, and what a row loss needs of it.

Under a vocabulary-sharded head a row loss is called with logits [N,v], v = V / parts, on every device of a mesh axis at
once. What it reduces to numbers per row is the same on all of them, and so are the cotangents of these numbers: `total`
sums the parts and hands the cotangent back as it is; `spread` puts a number per row beside the columns, and sums the
parts of its cotangent. Written with these two (and with `outcomes`, `log_normalizer`, `log_prob` and `entropy`, which
are), a loss holds for whole and for cut logits alike; `reads` declares that it is.

Shapes: N rows, V vocabulary, v columns of this device, M outcomes.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from distill_jax.losses.targets import Full, Target

Array = Any


@dataclass(frozen=True)
class Part:
    """The logits are cut over `parts` devices of the mesh axis `axis`, by ids in order."""

    axis: str
    parts: int

    def first(self, width: int) -> Array:
        """The id of the first of this device's `width` columns."""
        return jax.lax.axis_index(self.axis) * width


_HERE: ContextVar[Part | None] = ContextVar("part", default=None)


@contextmanager
def cut(part: Part | None) -> Iterator[None]:
    """Row losses traced inside are given cut logits (None: whole ones)."""
    token = _HERE.set(part)
    try:
        yield
    finally:
        _HERE.reset(token)


def here() -> Part | None:
    """How the logits are cut that the row loss being traced is given; None = not at all."""
    return _HERE.get()


def over_outcomes(target: Target) -> Part | None:
    """How the outcomes of `outcomes(logits, target)` are cut: as the logits where they are all ids, else not."""
    return here() if isinstance(target, Full) else None


def size(logits: Array) -> int:
    """V of logits that may be cut."""
    part = here()
    return logits.shape[-1] * (part.parts if part else 1)


def first_id(width: int, part: Part | None) -> Array | int:
    return part.first(width) if part else 0


def summed(x: Array, part: Part | None) -> Array:
    """Sum over the parts; for values that are not differentiated."""
    return jax.lax.psum(x, part.axis) if part else x


def greatest(x: Array, part: Part | None) -> Array:
    """Maximum over the parts; for values that are not differentiated."""
    return jax.lax.pmax(x, part.axis) if part else x


def total(x: Array, part: Part | None) -> Array:
    """Sum over the last axis and the parts: [N,M] -> [N]."""
    return _total(x, part) if part else jnp.sum(x, axis=-1)


def spread(x: Array, part: Part | None) -> Array:
    """A number per row beside the columns of this device: [N] -> [N,1]."""
    beside: Any = _spread(x, part) if part else x
    return beside[:, None]


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def _total(x: Array, part: Part) -> Array:
    return summed(jnp.sum(x, axis=-1), part)


_total.defvjp(lambda x, part: (_total(x, part), jnp.zeros((0, x.shape[-1]), x.dtype)),
              lambda part, like, grad: (jnp.broadcast_to(grad[:, None], (*grad.shape, like.shape[-1])),))


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def _spread(x: Array, part: Part) -> Array:
    return x


_spread.defvjp(lambda x, part: (x, None), lambda part, _, grad: (summed(grad, part),))


@dataclass(frozen=True)
class Reads:
    """What a row loss needs of the logits.

    kinds  targets with which it may be given cut logits
    whole  it needs more of the student's distribution than the log-probabilities of the token, of the target's ids and
           of all other ids together
    """

    kinds: tuple[type, ...] = ()
    whole: bool = False


def reads(*kinds: type, whole: bool = False) -> Callable[[Any], Any]:
    """Declares `Reads` of a row loss: @reads(Full, TopKTarget). One that declares nothing is given whole logits."""
    def declare(loss: Any) -> Any:
        loss.reads = Reads(kinds, whole)
        return loss

    return declare


def reads_of(loss: Any) -> Reads:
    return getattr(loss, "reads", Reads())


def may_be_cut(loss: Any, kind: type) -> bool:
    """Whether `loss` holds for cut logits when its target is a `kind`."""
    return kind in reads_of(loss).kinds


def needs_whole(loss: Any, kind: type, kwargs: Mapping[str, Any]) -> bool:
    """Whether `loss` reads more than the target's outcomes, the token and one tail (a temperature acts on all ids)."""
    tempered = kwargs.get("temperature", 1)
    return (kind is Full or not may_be_cut(loss, kind) or reads_of(loss).whole
            or not (isinstance(tempered, int | float) and tempered == 1))
