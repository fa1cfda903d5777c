"""How much to trust the teacher at each token, learned: KD and cross-entropy fused by a small network (TGeo-KD).

TGeo-KD (Hu et al. 2024, 2312.15112) looks at the triangle of the student's prediction S, the teacher's T and the truth
G, and learns a fusion ratio per sample from it. Over a vocabulary the vertices are too large, so the network reads the
lengths of the sides and the spread of the vertices instead (a guess): see `triangle`. Its parameters are one flat
vector, so that a controller can hold them (`objective.controllers.FusionNet`); `train.bilevel` learns them.
Shapes: N rows, V vocabulary, F = 6 features, H hidden units, P = H (F + 2) + 1 parameters.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from distill_jax.losses.rows.cross_entropy import cross_entropy
from distill_jax.losses.rows.divergences import forward_kl
from distill_jax.losses.rows.logprob import entropy
from distill_jax.losses.rows.outcomes import ABSENT, outcomes
from distill_jax.losses.targets import Full, Labels, Target, TopKTarget

Array = Any
FEATURES = ("student_nll", "teacher_nll", "kl", "student_entropy", "teacher_entropy", "teacher_right")
STEEP = 6.0
"""Largest |logit| of the ratio: it stays in (0.0025, 0.9975), so that its gradient never vanishes altogether."""


def triangle(logits: Array, target: Target) -> Array:
    """float32 [N,F]: log(1 + x) of the sides S-G: -log q(y), T-G: -log p(y), S-T: KL(p || q), and of the entropies of
    q and p; then 1 where y is the teacher's most probable outcome. No gradient.

    logits [N,V]; `Full` or `TopKTarget` with `token` y. A token that the teacher has not kept is taken to have the
    whole mass of the tail: -log p(y) is then a lower bound.
    """
    if not isinstance(target, Full | TopKTarget) or target.token is None:
        raise ValueError(f"the triangle needs a teacher's distribution and the token that stands there (a topk signal, "
                         f"or a provider as the term's target), got {type(target).__name__}")
    logits, token = jax.lax.stop_gradient(logits), target.token
    log_q, log_p = outcomes(logits, target)
    log_q, log_p = jax.lax.stop_gradient((log_q, log_p))
    if isinstance(target, Full):
        of_token = jnp.take_along_axis(log_p, jnp.clip(token, 0, log_p.shape[-1] - 1)[:, None], axis=-1)[:, 0]
    else:
        here = (target.ids == token[:, None]) & (log_p[:, :-1] > ABSENT)
        of_token = jnp.where(jnp.any(here, axis=-1), jnp.max(jnp.where(here, log_p[:, :-1], ABSENT), axis=-1),
                             log_p[:, -1])
    p = jnp.exp(log_p)
    sides = (cross_entropy(logits, Labels(token)), -of_token, jnp.sum(p * (log_p - log_q), axis=-1))
    spread = (entropy(logits), -jnp.sum(jnp.where(p > 0, p * log_p, 0.0), axis=-1))
    lengths = [jnp.log1p(jnp.clip(x, 0.0, 1e4)) for x in (*sides, *spread)]
    right = of_token >= jnp.max(log_p, axis=-1)
    return jax.lax.stop_gradient(jnp.stack([*lengths, right.astype(lengths[0].dtype)], axis=-1))


def side(logits: Array, target: Target, *, index: int) -> Array:
    """Feature number `index` of the triangle [N]: a row loss, for reading the features of all tokens."""
    return triangle(logits, target)[:, index]


def parameters(width: int) -> int:
    """P of a network of `width` hidden units."""
    return width * (len(FEATURES) + 2) + 1


def ratio(fusion: Array, features: Array) -> Array:
    """alpha [N] in (0, 1): sigmoid of a two-layer network. fusion [P], features [N,F]; 0.5 for fusion 0."""
    f = features.shape[-1]
    width = (fusion.shape[0] - 1) // (f + 2)
    first, rest = fusion[:width * f].reshape(f, width), fusion[width * f:]
    hidden = jnp.tanh(features @ first + rest[None, :width])
    raw = hidden @ rest[width:2 * width] + rest[2 * width]
    return jax.nn.sigmoid(STEEP * jnp.tanh(raw / STEEP))


def fusion_ratio(logits: Array, target: Target, *, fusion: Array) -> Array:
    """alpha of every token [N], without gradient: as a term of weight 0 it reports the mean ratio by role."""
    return jax.lax.stop_gradient(ratio(fusion, triangle(logits, target)))


@dataclass(frozen=True, kw_only=True)
class Fused:
    """Row loss alpha * KD + (1 - alpha) * CE with alpha = `ratio(fusion, triangle)`; no gradient through alpha.

    TGeo-KD, eq. of the inner loss; pure `kd` for alpha = 1 and pure cross-entropy for alpha = 0.

    kd  row loss (logits [N,V], target) -> [N] against the teacher
    """

    kd: Callable[..., Array] = forward_kl

    @property
    def __name__(self) -> str:
        return f"fused {self.kd.__name__}"

    def __call__(self, logits: Array, target: Target, *, fusion: Array) -> Array:
        """logits float32 [N,V], fusion f32 [P] -> float32 [N]."""
        alpha = fusion_ratio(logits, target, fusion=fusion)
        assert isinstance(target, Full | TopKTarget)
        return alpha * self.kd(logits, target) + (1.0 - alpha) * cross_entropy(logits, Labels(target.token))
