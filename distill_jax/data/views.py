"""Further views of a batch, made from its `main` view on the device. A view is `fn(Stream) -> Stream`, rows kept.

Rows and segment numbers stay those of `main`, which is how losses find the same document in two views. A view of
other tokens is not made here but by the source (`source_specs.Retokenised`); `Derived` makes a view of that one.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from distill_jax.core.batch import Stream
from distill_jax.core.roles import PAD, THINK

Array = Any


@dataclasses.dataclass(frozen=True)
class Derived:
    """A view that `make` makes of view `of`, where that is not `main`."""

    of: str
    make: Callable[[Stream], Stream]


def with_made(views: Mapping[str, Stream], makers: Mapping[str, Callable[[Stream], Stream] | Derived]
              ) -> dict[str, Stream]:
    """The views of a batch and those that `makers` make of them. Raises ValueError for a view that is not there."""
    out = dict(views)
    for name, make in makers.items():
        made = make if isinstance(make, Derived) else Derived("main", make)
        if made.of not in out:
            raise ValueError(f"view {name!r} is made of view {made.of!r}; there are {sorted(out)}")
        out[name] = made.make(out[made.of])
    return out


def without_thinking(stream: Stream) -> Stream:
    """The documents without their thinking (the tags included), packed to the left: questions answered at once."""
    return _keep(stream, (stream.roles != int(THINK)) & (stream.segment_ids != 0))


def _keep(stream: Stream, keep: Array) -> Stream:
    """Only the tokens where keep bool [B,T] is True, in order, then padding."""
    order = jnp.argsort(~keep, axis=1, stable=True)
    there = jnp.arange(keep.shape[1], dtype=jnp.int32)[None, :] < jnp.sum(keep, axis=1, dtype=jnp.int32)[:, None]

    def moved(x: Array, empty: Any) -> Array:
        x = jnp.asarray(x)
        at, here = (a.reshape(a.shape + (1,) * (x.ndim - 2)) for a in (order, there))
        return jnp.where(here, jnp.take_along_axis(x, at, axis=1), jnp.asarray(empty, x.dtype))

    empty = {"roles": int(PAD), "row_ids": -1}
    plain = [f.name for f in dataclasses.fields(Stream) if f.name not in ("positions", "fields")]
    arrays = {name: moved(getattr(stream, name), empty.get(name, 0)) for name in plain}
    index = jnp.broadcast_to(jnp.arange(keep.shape[1], dtype=jnp.int32)[None, :], keep.shape)
    ids = arrays["segment_ids"]
    starts = jnp.concatenate([jnp.ones_like(ids[:, :1], bool), ids[:, 1:] != ids[:, :-1]], axis=1)
    positions = jnp.where(there, index - jax.lax.cummax(jnp.where(starts, index, 0), axis=1), 0)
    return Stream(positions=positions, fields={k: moved(v, 0) for k, v in stream.fields.items()}, **arrays)
