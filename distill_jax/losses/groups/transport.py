"""Optimal transport between the states of two texts, document by document. Shapes: B rows, T, T' tokens, D width."""

from typing import Any

import jax
import jax.numpy as jnp

from distill_jax.losses.groups.sinkhorn import log_plan
from distill_jax.losses.groups.states import States, both, declare, unit

Array = Any


@declare(any_view=True)
def sequence_transport(student: States, teacher: States, *, eps: float = 0.1, iterations: int = 50) -> Array:
    """Cost of moving a document's student states onto its teacher states: [B,T,D], [B,T',D] -> [B,T].

    For each document <P, C>, P the entropic plan with marginals 1/N and 1/M over the N masked student tokens and the M
    masked teacher tokens, C_ij = 1 - cos(x_i, y_j): CoT2Align (Le et al. 2025, 2502.16806); cosine is our
    choice of cost. A token's value is N sum_j P_ij C_ij, what it costs to move it, so that
    the mean over a document's tokens is <P, C> (`per="sequence"` makes every document count as one). P is a constant
    of the gradient (envelope theorem), so nothing of size [T,T'] is kept for the backward. A document without masked
    tokens on one side costs nothing.
    """
    x, y = both(student, teacher)
    x, y = unit(x), unit(y)

    def row(args: tuple[Array, ...]) -> tuple[Array, Array]:
        """-> mass [T] that leaves each token times N (1 up to convergence), and N sum_j P_ij y_j [T,D]."""
        x, y, at, there, ids, other = args
        allowed = at[:, None] & there[None, :] & (ids[:, None] == other[None, :])
        to_log = lambda count: -jnp.log(jnp.maximum(count, 1.0)).astype(x.dtype)
        of_mine = jnp.sum(at[None, :] & (ids[:, None] == ids[None, :]), axis=1).astype(x.dtype)
        of_other = jnp.sum(there[None, :] & (other[:, None] == other[None, :]), axis=1).astype(x.dtype)
        plan = jnp.exp(log_plan(1.0 - x @ y.T, to_log(of_mine), to_log(of_other), eps=eps, iterations=iterations,
                                allowed=allowed))
        plan = jnp.where(allowed, plan, 0.0) * of_mine[:, None]
        return jnp.sum(plan, axis=1), plan @ y

    fixed = (jax.lax.stop_gradient(x), y, student.mask, teacher.mask, student.segment_ids, teacher.segment_ids)
    mass, moved = jax.lax.stop_gradient(jax.lax.map(row, fixed))
    return jnp.where(student.mask, mass - jnp.sum(x * moved, axis=-1), 0.0)
