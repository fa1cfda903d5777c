"""Providers that read other providers' states instead of tokens: learned maps between the spaces of two models.

A projector has `init(rng) -> params` and `write(params, found) -> {"<field>/<view>": Written}`; `reads` says which
states it needs. What it writes is named "<provider>/<view>", or "<provider>.<field>/<view>" where it writes several.
It predicts with the head of the model into whose space it maps, which it never trains.

Shapes: B rows, T, T' tokens of the student's and the teacher's view, D_s, D_t their widths.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from distill_jax.core.batch import Stream
from distill_jax.core.head import Head, wide
from distill_jax.core.roles import SUPERVISED, Role

Array = Any
Layer = int | str
Params = Mapping[str, Any]


class Found(NamedTuple):
    """What a projector may read: `state("student/main", layer)`, `head("student")` (constant), streams by view."""

    state: Callable[[str, Layer], Array]
    head: Callable[[str], Head]
    views: Mapping[str, Stream]


class Written(NamedTuple):
    """Mapped states by the layer they come from, and the head that makes logits of them."""

    layers: dict[Layer, Array]
    head: Head


class ProjectorModel(Protocol):
    """What the training step needs of a projector."""

    @property
    def reads(self) -> tuple[tuple[str, Layer], ...]: ...
    def init(self, rng: Array) -> dict[str, Any]: ...
    def write(self, params: Params, found: Found) -> dict[str, Written]: ...


@dataclass(frozen=True, kw_only=True)
class LinearProjector:
    """x W + b of the states of `source`, each of `layers` with its own W and b, into the space of provider `like`.

    params {str(layer): {"kernel" [width_in, width_out], "bias" [width_out]}}
    """

    source: str
    like: str
    width_in: int
    width_out: int
    layers: tuple[Layer, ...] = ("final",)
    bias: bool = True

    @property
    def reads(self) -> tuple[tuple[str, Layer], ...]:
        return tuple((self.source, layer) for layer in self.layers)

    def init(self, rng: Array) -> dict[str, Any]:
        keys = jax.random.split(rng, len(self.layers))
        return {str(layer): init_linear(key, self.width_in, self.width_out, bias=self.bias)
                for layer, key in zip(self.layers, keys)}

    def write(self, params: Params, found: Found) -> dict[str, Written]:
        layers = {layer: linear(params[str(layer)], found.state(self.source, layer)) for layer in self.layers}
        return {"/" + self.source.split("/")[1]: Written(layers, found.head(self.like))}


@dataclass(frozen=True, kw_only=True)
class ValueHead:
    """A critic: V(state) = w h + b of the final states of `source`, a source with one output ("logits" [N,1]).

    detach  True: the states are constants, so that the critic does not move the policy; False: one trunk for both
    Zero at first, as every value then is. params {"kernel" [width, 1], "bias" [1]}. `losses.rows.value` reads it.
    """

    source: str
    width: int
    detach: bool = True

    @property
    def reads(self) -> tuple[tuple[str, Layer], ...]:
        return ((self.source, "final"),)

    def init(self, rng: Array) -> dict[str, Any]:
        return {"kernel": jnp.zeros((self.width, 1), jnp.float32), "bias": jnp.zeros(1, jnp.float32)}

    def write(self, params: Params, found: Found) -> dict[str, Written]:
        states = found.state(self.source, "final")
        head = Head(kernel=params["kernel"].T, bias=params["bias"])
        return {"/" + self.source.split("/")[1]: Written(
            {"final": jax.lax.stop_gradient(states) if self.detach else states}, head)}


@dataclass(frozen=True, kw_only=True)
class CrossAttention:
    """Cross-model attention of DSKD (Zhang et al. 2024, 2406.17328): fields `t2s` and `s2t`.

    With e the embedding of the token at a position and e' that of the next one, n(.) a division by the root mean
    square of each vector, and P_q, P_t2s, P_s2t the learned maps:
      Q = P_q([e; e'] of the student), K = n([e; e'] of the teacher), A = Q K' / sqrt(2 D_t)
      t2s: softmax over the teacher's positions of A, times P_t2s(n(h_T) + n(e'_T))   [B,T,D_s], the student's head
      s2t: softmax over the student's positions of A', times P_s2t(h_S)               [B,T',D_t], the teacher's head
    Only positions that predict a token with a role in `on` attend and are attended to, within one document (the same
    segment number in both views); elsewhere the result is zero. Embeddings are constants. The published code divides
    by one standard deviation of the whole padded batch, which would make a token depend on its neighbours in the
    batch. Keeps A, [B,T,T'].
    """

    student: str
    teacher: str
    student_width: int
    teacher_width: int
    on: tuple[Role, ...] = SUPERVISED

    @property
    def reads(self) -> tuple[tuple[str, Layer], ...]:
        return tuple((side, layer) for side in (self.student, self.teacher) for layer in ("final", "embedding"))

    def init(self, rng: Array) -> dict[str, Any]:
        s, t = self.student_width, self.teacher_width
        sizes = {"query": (2 * s, 2 * t), "t2s": (t, s), "s2t": (s, t)}
        return {name: init_linear(key, *size) for (name, size), key in
                zip(sizes.items(), jax.random.split(rng, len(sizes)))}

    def write(self, params: Params, found: Found) -> dict[str, Written]:
        (s_provider, s_view), (t_provider, t_view) = self.student.split("/"), self.teacher.split("/")
        states = [found.state(*read) for read in self.reads]
        fields = [self._fields(found.views[view]) for view in (s_view, t_view)]
        t2s, s2t = jax.checkpoint(_attend)(dict(params), states, fields)
        return {f".t2s/{s_view}": Written({"final": t2s}, found.head(s_provider)),
                f".s2t/{t_view}": Written({"final": s2t}, found.head(t_provider))}

    def _fields(self, stream: Stream) -> tuple[Array, Array]:
        """(mask, segment_ids) [B,T] of the token that each position predicts."""
        roles = jnp.asarray([int(r) for r in self.on], stream.roles.dtype)
        mask = jnp.isin(stream.roles, roles) & (jnp.asarray(stream.weights) > 0)
        return _next(mask), _next(jnp.asarray(stream.segment_ids))


def _attend(params: Params, states: list[Array], fields: list[tuple[Array, Array]]) -> tuple[Array, Array]:
    stop = jax.lax.stop_gradient
    student, s_embedded, teacher, t_embedded = states
    pair = lambda e: jnp.concatenate([e, _next(e)], axis=-1)
    dtype = wide(student)
    query = linear(params["query"], stop(pair(s_embedded))).astype(dtype)
    key = unit_rms(stop(pair(t_embedded))).astype(dtype)
    scores = jnp.einsum("bsd,btd->bst", query, key) / math.sqrt(key.shape[-1])
    (s_mask, s_ids), (t_mask, t_ids) = fields
    allowed = s_mask[:, :, None] & t_mask[:, None, :] & (s_ids[:, :, None] == t_ids[:, None, :])
    of_teacher = linear(params["t2s"], unit_rms(teacher) + unit_rms(stop(_next(t_embedded))))
    of_student = linear(params["s2t"], student)
    t2s = jnp.einsum("bst,btd->bsd", masked_softmax(scores, allowed, 2), of_teacher.astype(dtype))
    s2t = jnp.einsum("bst,bsd->btd", masked_softmax(scores, allowed, 1), of_student.astype(dtype))
    return t2s.astype(student.dtype), s2t.astype(teacher.dtype)


def init_linear(rng: Array, width_in: int, width_out: int, *, bias: bool = True) -> dict[str, Array]:
    """Kernel normal with variance 1 / width_in, bias 0; float32."""
    kernel = jax.random.normal(rng, (width_in, width_out), jnp.float32) / math.sqrt(width_in)
    return {"kernel": kernel, "bias": jnp.zeros(width_out, jnp.float32)} if bias else {"kernel": kernel}


def linear(params: Params, x: Array) -> Array:
    """x W + b in the dtype of x, accumulated in (at least) float32. x [...,D] -> [...,D']."""
    out = jnp.matmul(x, params["kernel"].astype(x.dtype), preferred_element_type=wide(x))
    if "bias" in params:
        out = out + params["bias"].astype(out.dtype).reshape((1,) * (out.ndim - 1) + (-1,))
    return out.astype(x.dtype)


def unit_rms(x: Array) -> Array:
    """Each vector x [...,D] divided by its root mean square; zero where it is zero."""
    full = x.astype(wide(x))
    square = jnp.mean(jnp.square(full), axis=-1, keepdims=True)
    return (full * jax.lax.rsqrt(jnp.maximum(square, 1e-20))).astype(x.dtype)


def masked_softmax(scores: Array, allowed: Array, axis: int) -> Array:
    """Softmax over the allowed entries of `axis`; all zero, with zero gradient, where none is."""
    weights = jax.nn.softmax(jnp.where(allowed, scores, -1e30), axis=axis)
    return jnp.where(allowed, weights, 0.0)


def constant(head: Head) -> Head:
    """The head without gradient."""
    stop = jax.lax.stop_gradient
    return replace(head, kernel=stop(head.kernel), bias=None if head.bias is None else stop(head.bias))


def _next(x: Array) -> Array:
    """x [B,T,...] of the next position; zero at the last."""
    return jnp.concatenate([x[:, 1:], jnp.zeros_like(x[:, :1])], axis=1)
