"""What a group loss is given: the states of both sides, and which tokens belong together.

A group loss is `fn(student: States, teacher: States, **kwargs) -> f32 [B,T]`, one value for each token of the student,
0 where the mask is False. A token's value may depend on other tokens: of its document (relations, transport), or of
all rows at hand (Sinkhorn, CKA). The latter take `axes`, the mesh axes the rows are spread over, to reduce over; with
`axes=()` the rows of one device are a group of their own.

Index t of every field describes the token that the state at t predicts (the caller has shifted the fields), so a
supervised token is represented by the state it is predicted from.
Shapes: B rows, T tokens, D width, K kept outcomes.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from distill_jax.core.batch import Signal
from distill_jax.core.head import Head, wide

Array = Any
Loss = TypeVar("Loss", bound=Callable[..., Any])


@dataclass(frozen=True, kw_only=True)
class States:
    """One side of a group loss.

    x            [B,T,D] states in the compute dtype; None where the side is a stored signal
    mask         bool [B,T]: tokens the term is taken on
    segment_ids  int32 [B,T]: in one row, the same number on both sides is the same document
    head         turns `x` into logits; only for losses that declare it
    signal       stored outcomes [B,T,K] of the tokens; only where the side is a stored signal
    """

    x: Array | None
    mask: Array
    segment_ids: Array
    head: Head | None = None
    signal: Signal | None = None


jax.tree_util.register_dataclass(States, data_fields=[f.name for f in dataclasses.fields(States)], meta_fields=[])


def declare(*, head: bool = False, any_view: bool = False) -> Callable[[Loss], Loss]:
    """What a group loss needs beyond states of the same tokens.

    head      it computes logits of a few tokens (never of all): both sides come with their `head`
    any_view  it finds by itself which tokens of the two sides belong together, so the sides may be different views
    """

    def mark(loss: Loss) -> Loss:
        loss.needs_head, loss.any_view = head, any_view  # pyright: ignore[reportFunctionMemberAccess]
        return loss

    return mark


def both(student: States, teacher: States, *, same_width: bool = True) -> tuple[Array, Array]:
    """The states of both sides in (at least) float32, the teacher's without gradient.

    Raises ValueError where a side has no states, or the widths differ and must not.
    """
    if student.x is None or teacher.x is None:
        raise ValueError("this loss compares hidden states, and a stored signal has none: run the teacher beside the "
                         "student (a frozen provider) and name it as the term's target")
    x, y = (s.astype(wide(s)) for s in (student.x, teacher.x))
    if same_width and x.shape[-1] != y.shape[-1]:
        raise ValueError(f"states of width {x.shape[-1]} (student) and {y.shape[-1]} (teacher) cannot be compared: add "
                         "a Projector provider and name it as the term's student")
    return x, jax.lax.stop_gradient(y)


def unit(x: Array) -> Array:
    """x [...,D] divided by its L2 norm; zero, with a finite gradient, where x is zero."""
    return x * jax.lax.rsqrt(jnp.maximum(jnp.sum(jnp.square(x), axis=-1, keepdims=True), TINY))


TINY = 1e-20
"""Smallest squared norm that is told from zero."""
