"""What a token loss is given: log-probabilities of the tokens that stand there, and what is known about each of them.

A token loss is `fn(tokens: Tokens, **kwargs) -> f32 [B,T]`, one value a token, 0 outside the mask; it never reduces.
A value may depend on tokens of its own row (the ratio of a sequence, a preference pair), never on other rows, so the
sum of weight * value does not depend on how a batch is packed into rows or cut into micro-batches. One whose value
depends on nothing but the token itself says so with `@local`: it is then computed where the logits are, and costs
what cross-entropy costs.

Index t of every field describes token t given the earlier tokens of its segment. Shapes: B rows, T tokens.
"""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

Array = Any
Loss = TypeVar("Loss", bound=Callable[..., Any])

LIMIT = 20.0
"""Log ratios are kept in [-LIMIT, LIMIT]: beyond, e^x says nothing and only overflows. No gradient there."""


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """Inputs of a token loss, all [B,T]; for `local` losses, [N] tokens from anywhere and no `segment_ids`.

    logprobs     f32, log-probability of each token under the model that is trained: what gradients flow to
    entropies    f32, entropy in nats of the distribution each token was drawn from; differentiable too
    mask         bool: the tokens the term is taken on
    segment_ids  int32: document of the row from 1, 0 padding
    reference    f32, log-probability under the term's target, without gradient; None where it has none
    fields       `Stream.fields`: `advantages`, `behaviour_logprobs`, `old_logprobs`, `policy_mask`, `pair_ids`, ...
    """

    logprobs: Array
    entropies: Array
    mask: Array
    segment_ids: Array
    reference: Array | None = None
    fields: Mapping[str, Array] = dataclasses.field(default_factory=dict)

    def field(self, name: str) -> Array:
        """A field as float, 0 outside the mask, without gradient. Raises ValueError where the batch lacks it."""
        if name not in self.fields:
            raise ValueError(f"a token loss needs the field {name!r} of its stream; the batch has "
                             f"{sorted(self.fields)}. Its source must write it (rollouts write their log-probs and "
                             "advantages, pair builders their pairs)")
        dtype = jnp.float32 if self.logprobs is None else self.logprobs.dtype
        value = jnp.asarray(self.fields[name]).astype(dtype)
        return jax.lax.stop_gradient(self.masked(value))

    def ids(self, name: str) -> Array:
        """An int32 field as it is, such as `pair_ids`. Errors as `field`."""
        self.field(name)
        return jnp.asarray(self.fields[name]).astype(jnp.int32)

    def masked(self, values: Array) -> Array:
        return jnp.where(self.mask, values, jnp.zeros((), values.dtype))

    @property
    def against(self) -> Array:
        """`reference`. Raises ValueError where the term has no target."""
        if self.reference is None:
            raise ValueError("this loss compares log-probabilities with those of a reference: give the term a target, "
                             "a frozen provider ('reference/main') or a stored signal of kind token ('signals/token')")
        return self.masked(jax.lax.stop_gradient(self.reference).astype(self.logprobs.dtype))


jax.tree_util.register_dataclass(Tokens, data_fields=[f.name for f in dataclasses.fields(Tokens)], meta_fields=[])


def local(loss: Loss) -> Loss:
    """Declares that a token's value depends on that token alone (with `level="token"`, where the loss has levels)."""
    loss.local = True  # pyright: ignore[reportFunctionMemberAccess]
    return loss


def is_local(loss: Callable[..., Any], kwargs: Mapping[str, Any]) -> bool:
    return getattr(loss, "local", False) and kwargs.get("level", "token") == "token"


def known(*values: Any) -> bool:
    """Whether settings are plain numbers, which can be checked; those of schedules are traced."""
    return all(isinstance(v, int | float) for v in values)


def sums_by(values: Array, ids: Array) -> Array:
    """[B,T] -> [B,T]: at each token, the sum over the tokens of its row that have the same id in [0, T]."""
    def row(values: Array, ids: Array) -> Array:
        return jax.ops.segment_sum(values, ids, num_segments=values.shape[0] + 1)[ids]

    return jax.vmap(row)(values, jnp.asarray(ids).astype(jnp.int32))


def segment_sums(tokens: Tokens, values: Array) -> Array:
    """At each token, the sum of `values` over the masked tokens of its segment."""
    return sums_by(tokens.masked(values), tokens.segment_ids)


def segment_means(tokens: Tokens, values: Array) -> Array:
    """At each token, the mean of `values` over the masked tokens of its segment; 0 where there are none."""
    count = segment_sums(tokens, jnp.ones_like(values))
    return segment_sums(tokens, values) / jnp.maximum(count, 1.0)
