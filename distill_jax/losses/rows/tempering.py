"""What a temperature does to a tail of which only the mass is known.

p_tau(v) = p(v)^(1/tau) / Z acts on every token of the tail, not on the tail as a lump. From K kept probabilities and
the tail's mass: the kept ones keep their exact ratios, and all that is missing is one number per row, S = sum of
p(v)^(1/tau) over the tail, in Z = (sum of the kept p^(1/tau)) + S. `tail_bounds` says between which values it lies.
"""

from typing import Any, Literal, get_args

import jax.numpy as jnp

Array = Any

Temper = Literal["exact", "student", "even", "packed"]
"""What is taken for S of a top-k target.

exact    nothing: a temperature other than 1 is refused
student  the teacher's tail has the shape of the student's: S = sum (m q(v) / q(tail))^(1/tau), kept within the bounds.
         Exact where the student's tail has the teacher's shape, so a divergence is still zero, with zero gradient, at
         student = teacher; at tau = 1 it is the tail bucket
even     every token of the tail is equally probable: S = n^(1 - 1/tau) m^(1/tau)
packed   as few tokens as can hold it: S = m c^(1/tau - 1)
"""


def tail_bounds(log_mass: Array, log_top: Array, count: Array, temperature: Any) -> tuple[Array, Array]:
    """log S if the tail is spread evenly, and if it is packed as densely as can be: S lies between the two.

    log_mass  float32 [N]  log m of the tail's mass
    log_top   float32 [N]  log c of a probability that no token of the tail exceeds (the smallest kept one)
    count     [N]          n tokens the tail has
    Returns (even, packed) float32 [N], even = log n^(1-a) m^a and packed = log m c^(a-1), a = 1/tau. By Jensen S is at
    most `even` where x^a is concave (tau > 1) and at least `even` where it is convex; by the chord from 0 to c, x^a is
    at least x c^(a-1) where concave and at most where convex, whence `packed`. So packed <= log S <= even for tau > 1,
    the other way round for tau < 1, and both are log m at tau = 1. With P = sum of the kept p^a, what this leaves open
    moves every tempered kept probability by one factor, at most (P + S_high) / (P + S_low).
    """
    power = 1.0 / temperature
    even = (1.0 - power) * jnp.log(jnp.maximum(count, 1).astype(log_mass.dtype)) + power * log_mass
    return even, log_mass + (power - 1.0) * log_top


def check_temper(temperature: Any, temper: str) -> None:
    """Raise ValueError for a temperature that is not positive (when it is a number) or an unknown rule."""
    if isinstance(temperature, int | float) and not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}: 0 would be a teacher that is always sure; "
                         "use cross_entropy on its tokens for that")
    if temper not in get_args(Temper):
        raise ValueError(f"temper={temper!r}: expected one of {list(get_args(Temper))}")


def untempered(temperature: Any, instead: str) -> ValueError:
    """What to say where a temperature meets a stored top-k signal. instead: what could be used, besides 1."""
    return ValueError(f"temperature={temperature} with a top-k target: the tail is a sum over ids and cannot be "
                      f"tempered exactly. Use temperature=1, {instead}")
