"""What the two loops of the lifted loss share: inputs and results, the targets of row losses, the head's products.

Shapes: B rows, T tokens, n tokens of a chunk, K kept outcomes, D width, V vocabulary.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax

from distill_jax.core.batch import Sampled, Signal, TokenLogprob, TopK
from distill_jax.core.head import Head
from distill_jax.losses.rows.vocabulary import Part, summed
from distill_jax.losses.targets import Full, Known, Labels, SampledTarget, Target, TopKTarget
from distill_jax.losses.tokens.inputs import Tokens

Array = Any


@dataclass(frozen=True, kw_only=True)
class RowTerm:
    """A row loss and where its inputs come from.

    loss     fn(logits [N,V], target, **kwargs, **dynamic) -> [N]
    source   name of the source whose logits it reads, "student/main"
    target   "tokens", "signals/<name>", or the name of another source, whose logits are the teacher's (a signal of
             hidden states is such a source)
    kwargs   static keyword arguments of the loss
    dynamic  traced scalar keyword arguments (TAID's t); no gradient flows to them
    """

    loss: Callable[..., Array]
    source: str = "student/main"
    target: str = "tokens"
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    dynamic: Mapping[str, Array] = field(default_factory=dict)


class Fields(NamedTuple):
    """Per-token inputs [B,T,...], already shifted onto the hidden state that predicts them."""

    tokens: Array
    weights: dict[str, Array]
    active: Array  # bool: some term wants this token's value or gradient
    signals: dict[str, Signal | Tokens]


@jax.tree_util.register_static
@dataclass(frozen=True)
class Wanted:
    """Which gradients of a source are wanted (a frozen head under LoRA costs neither its product nor its memory)."""

    hidden: bool = False
    kernel: bool = False
    bias: bool = False

    def __bool__(self) -> bool:
        return self.hidden or self.kernel or self.bias


class Grads(NamedTuple):
    """Of one source: hidden [B,T,D] in its dtype, kernel float32 [V,D], bias float32 [V]; None = not wanted."""

    hidden: Array | None = None
    kernel: Array | None = None
    bias: Array | None = None


class Result(NamedTuple):
    """total: sum over terms and tokens of weight * loss; values: {term: loss [B,T]}, 0 where not active."""

    total: Array
    values: dict[str, Array]
    grads: dict[str, Grads]


def through_head(d_raw: Array, d_bias: Array | None, hidden: Array, head: Head, wanted: Wanted, part: Part | None
                 ) -> Grads:
    """Gradients of `head.project(hidden)`: the cotangent in the compute dtype, sums in (at least) float32."""
    acc = d_raw.dtype
    d_raw = d_raw.astype(hidden.dtype)
    dot = lambda a, b, contract: jax.lax.dot_general(a, b, (contract, ((), ())), preferred_element_type=acc)
    return Grads(
        hidden=summed(dot(d_raw, head.kernel, ((1,), (0,))), part) if wanted.hidden else None,
        kernel=dot(d_raw, hidden, ((0,), (0,))) if wanted.kernel else None,
        bias=d_bias.astype(acc) if wanted.bias and d_bias is not None else None)


def kind_of(name: str, sources: Mapping[str, Any], fields: Fields) -> type:
    """The class of the target that `target_of` makes."""
    if name == "tokens" or name in sources:
        return Labels if name == "tokens" else Full
    kinds = {Tokens: Known, Sampled: SampledTarget}
    return kinds.get(type(fields.signals[name.removeprefix("signals/")]), TopKTarget)


def target_of(name: str, logits: dict[str, Array], fields: Fields, compute_dtype: Any) -> Target:
    if name == "tokens":
        return Labels(fields.tokens)
    if name in logits:
        return Full(jax.lax.stop_gradient(logits[name]), fields.tokens)
    signal = fields.signals[name.removeprefix("signals/")]
    if isinstance(signal, Tokens):
        return Known(fields.tokens, signal)
    if isinstance(signal, TopK):
        return TopKTarget(signal.ids, signal.logprobs, compute_dtype, fields.tokens)
    if isinstance(signal, Sampled):
        return SampledTarget(signal.ids, signal.weights, compute_dtype)
    assert isinstance(signal, TokenLogprob)  # one known outcome, the rest is tail
    return TopKTarget(fields.tokens[:, None], signal.logprobs[:, None], compute_dtype, fields.tokens)

