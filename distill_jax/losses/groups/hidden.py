"""Losses between hidden states of student and teacher. Shapes: B rows, T tokens, D width; `groups.states`."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from distill_jax.losses.groups.states import TINY, States, both, unit

Array = Any
NEG = -1e30

QUERIES = 256
"""Tokens whose relations to all others exist at a time, per row."""


def cosine_distance(student: States, teacher: States) -> Array:
    """1 - cos(x_t, y_t) for each token, x student [B,T,D], y teacher [B,T,D] -> [B,T], in [0, 2].

    DistilBERT (Sanh et al. 2019). Blind to the length of the states.
    """
    x, y = both(student, teacher)
    return jnp.where(student.mask, 1.0 - jnp.sum(unit(x) * unit(y), axis=-1), 0.0)


def mean_squared_error(student: States, teacher: States, *, normalize: bool = False) -> Array:
    """mean over D of (x_t - y_t)^2 for each token, x student [B,T,D], y teacher [B,T,D] -> [B,T].

    TinyBERT (Jiao et al. 2020, eq. 8) with its learned map as a Projector. A few dimensions of large models carry
    huge values and then are all there is to the loss: `normalize` divides both states by their root mean square.
    """
    x, y = both(student, teacher)
    if normalize:
        scale = x.shape[-1] ** 0.5
        x, y = unit(x) * scale, unit(y) * scale
    return jnp.where(student.mask, jnp.mean(jnp.square(x - y), axis=-1), 0.0)


def linear_cka(student: States, teacher: States, *, axes: tuple[str, ...] = ()) -> Array:
    """1 - CKA of all masked tokens, the same value at each of them: [B,T,D], [B,T,D'] -> [B,T], in [0, 1].

    CKA(X, Y) = ||Y'X||_F^2 / (||X'X||_F ||Y'Y||_F), columns of X [N,D] and Y [N,D'] centred: Kornblith et al. 2019,
    section 3 (linear kernel). Blind to rotation and scale, so the widths may differ without a projector. A ratio of
    sums over tokens: its value depends on how a batch is cut into micro-batches (and, with axes=(), devices).
    """
    x, y = both(student, teacher, same_width=False)
    mask = student.mask
    total = partial(jax.lax.psum, axis_name=axes) if axes else lambda v: v
    count = jnp.maximum(total(jnp.sum(mask.astype(x.dtype))), 1.0)

    def centred(x: Array) -> Array:
        """[N,D] with mean 0 and mean square 1, zero where masked out. The scale cancels: no gradient needs it."""
        kept = jnp.where(mask[..., None], x, 0.0)
        x = jnp.where(mask[..., None], x - total(jnp.sum(kept, axis=(0, 1), keepdims=True)) / count, 0.0)
        size = total(jnp.sum(jnp.square(x))) / (count * x.shape[-1])
        return (x * jax.lax.stop_gradient(jax.lax.rsqrt(jnp.maximum(size, TINY)))).reshape(-1, x.shape[-1])

    x, y = centred(x), centred(y)
    square = lambda a, b: jnp.sum(jnp.square(total(a.T @ b) / count))
    norms = square(x, x) * square(y, y)
    cka = square(x, y) * jax.lax.rsqrt(jnp.maximum(norms, TINY))
    return jnp.where(mask & (norms > TINY), 1.0 - cka, 0.0)


def relation_kl(student: States, teacher: States, *, heads: int = 1, causal: bool = True) -> Array:
    """KL(teacher || student) of each token's relations to the other tokens of its document: [B,T,D], [B,T,D'] -> [B,T].

    Relations of token t: softmax over s of x_t . x_s / sqrt(d), the states cut into `heads` parts of width d; the mean
    over heads. MiniLMv2 (Wang et al. 2021), on states of a layer where the paper has its queries, keys or
    values. The widths may differ; the number of heads must divide both. Only tokens the term is taken on are related;
    `causal` leaves out those after t, which a decoder's state has not seen. At most [heads, QUERIES, T] at a time.
    """
    x, y = both(student, teacher, same_width=False)
    for side, width in (("student", x.shape[-1]), ("teacher", y.shape[-1])):
        if width % heads:
            raise ValueError(f"heads={heads} does not divide the {side}'s width {width}")
    T = x.shape[1]
    size = min(QUERIES, T)
    starts = jnp.arange(0, T, size)

    def row(args: tuple[Array, ...]) -> Array:
        x, y, mask, segments = args
        x, y = (jnp.moveaxis(a.reshape(T, heads, -1), 1, 0) * (a.shape[-1] // heads) ** -0.25 for a in (x, y))

        @jax.checkpoint
        def chunk(start: Array) -> Array:
            at = jnp.minimum(start + jnp.arange(size), T - 1)
            seen = mask[None, :] & mask[at][:, None] & (segments[at][:, None] == segments[None, :])
            if causal:
                seen &= jnp.arange(T)[None, :] <= at[:, None]
            log_q, log_p = (jax.nn.log_softmax(jnp.where(seen[None], a[:, at] @ jnp.swapaxes(a, 1, 2), NEG), axis=-1)
                            for a in (x, y))
            kl = jnp.where(seen[None], jnp.exp(log_p) * (log_p - log_q), 0.0)
            return jnp.mean(jnp.sum(kl, axis=-1), axis=0)

        return jax.lax.map(chunk, starts).reshape(-1)[:T]

    values = jax.lax.map(row, (x, y, student.mask, student.segment_ids))
    return jnp.where(student.mask, values, 0.0)
