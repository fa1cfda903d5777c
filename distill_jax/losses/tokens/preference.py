"""Preference losses on pairs of sequences, and KTO on single ones. Shapes: B rows, T tokens; `tokens.inputs`.

Layout: the chosen and the rejected sequence of a pair are two segments of the same row (the packer treats a pair as
one unit). Two fields of the stream say so:

pair_ids  int32 [B,T]  number of the pair within its row from 1, at both of its segments; 0 = no pair
chosen    [B,T]        1 at the tokens of chosen (KTO: desirable) sequences, 0 at the others

A pair then lies inside one row, whatever micro-batch or device that row goes to. A term of these losses takes
`per="sequence"` (every segment counts as one, so the term is the mean over pairs) and `where="pair_ids"`. Sums and
lengths are over the term's tokens; `where` may name a field that is 0 on a common prefix too (`apart`), which then
counts in neither. A value is the loss of the pair, the same at all its tokens; pairs with an empty side have value 0.

Which scores a loss compares: DPO sums; IPO, SimPO, ORPO and REDI means over tokens.
"""

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from distill_jax.losses.tokens.inputs import Tokens, known, segment_sums, sums_by

Array = Any
Divergence = Literal["reverse_kl", "forward_kl", "js", "alpha"]

BOUND = 80.0
"""Largest exponent: e^80 is still a float32."""


class Pairs(NamedTuple):
    """Which tokens are a pair's, and how many on each side [B,T]."""

    ids: Array
    chosen: Array
    rejected: Array
    lengths: tuple[Array, Array]

    @classmethod
    def of(cls, tokens: Tokens) -> "Pairs":
        """From the fields `pair_ids` and `chosen`; ValueError where the stream lacks them."""
        ids = tokens.ids("pair_ids")
        there, better = tokens.mask & (ids > 0), tokens.field("chosen") != 0
        sides = there & better, there & ~better
        lengths = tuple(sums_by(side.astype(tokens.logprobs.dtype), ids) for side in sides)
        return cls(ids, *sides, (lengths[0], lengths[1]))

    def sums(self, values: Array) -> tuple[Array, Array]:
        """Sum of [B,T] over the chosen and the rejected sequence, at each token of the pair."""
        zero = jnp.zeros_like(values)
        chosen, rejected = (sums_by(jnp.where(side, values, zero), self.ids) for side in (self.chosen, self.rejected))
        return chosen, rejected

    def means(self, values: Array) -> tuple[Array, Array]:
        """The same sums divided by the numbers of tokens."""
        chosen, rejected = (s / jnp.maximum(n, 1.0) for s, n in zip(self.sums(values), self.lengths))
        return chosen, rejected

    def values(self, of_pair: Array) -> Array:
        """`of_pair` at the tokens of pairs with two sides, 0 elsewhere."""
        whole = (self.chosen | self.rejected) & (self.lengths[0] > 0) & (self.lengths[1] > 0)
        return jnp.where(whole, of_pair, jnp.zeros_like(of_pair))


def dpo(tokens: Tokens, *, beta: float = 0.1, divergence: Divergence = "reverse_kl", alpha: float = 0.5,
        label_smoothing: float = 0.0) -> Array:
    """-(1 - eps) log sigmoid(u) - eps log sigmoid(-u), u = beta (s(chosen) - s(rejected)): [B,T].

    s = f'(pi / reference) of the sequence, `divergence_score`: the log ratio in DPO (Rafailov et al. 2023, 2305.18290,
    eq. 7), others in f-DPO (Wang et al. 2023, 2309.16240, eq. 10). eps is the share of wrong labels (conservative
    DPO, Mitchell 2023); ln 2 where policy and reference are equal.
    """
    pairs = Pairs.of(tokens)
    chosen, rejected = (divergence_score(x, divergence, alpha) for x in pairs.sums(tokens.logprobs - tokens.against))
    return pairs.values(_smoothed(beta * (chosen - rejected), label_smoothing))


def divergence_score(log_ratio: Array, divergence: Divergence = "reverse_kl", alpha: float = 0.5) -> Array:
    """f'(u) up to a constant, u = e^log_ratio > 0, elementwise (2309.16240, table 1).

    reverse_kl f = u log u: log u.   forward_kl f = -log u: -1/u.   js: log(2u / (1 + u)).
    alpha in (0, 1): (1 - u^-alpha) / alpha, between reverse KL (to 0) and forward KL (to 1).
    """
    if divergence == "reverse_kl":
        return log_ratio
    if divergence == "forward_kl":
        return -jnp.expm1(jnp.minimum(-log_ratio, BOUND))
    if divergence == "js":
        return jnp.log(2.0) + jax.nn.log_sigmoid(log_ratio)
    if divergence != "alpha" or not 0.0 < alpha < 1.0:
        raise ValueError(f"divergence {divergence!r}, alpha={alpha}: expected reverse_kl, forward_kl, js, or alpha "
                         "with 0 < alpha < 1")
    return -jnp.expm1(jnp.minimum(-alpha * log_ratio, BOUND)) / alpha


def ipo(tokens: Tokens, *, beta: float = 0.1) -> Array:
    """(h - 1 / (2 beta))^2, h the chosen minus the rejected mean log ratio to the reference: [B,T].

    IPO (Azar et al. 2023, 2310.12036, eq. 17, tau = beta). The paper writes sums; its authors averaged over tokens
    (so TRL), which keeps the target 1 / (2 beta) in reach of sequences of any length.
    """
    pairs = Pairs.of(tokens)
    chosen, rejected = pairs.means(tokens.logprobs - tokens.against)
    return pairs.values(jnp.square(chosen - rejected - 1.0 / (2.0 * beta)))


def simpo(tokens: Tokens, *, beta: float = 2.0, gamma: float = 1.0, label_smoothing: float = 0.0) -> Array:
    """-log sigmoid(beta (l(chosen) - l(rejected)) - gamma), l the mean log-prob; no reference: [B,T].

    SimPO (Meng et al. 2024, 2405.14734, eq. 6). `label_smoothing` as in `dpo`.
    """
    pairs = Pairs.of(tokens)
    chosen, rejected = pairs.means(tokens.logprobs)
    return pairs.values(_smoothed(beta * (chosen - rejected) - gamma, label_smoothing))


def odds_ratio(tokens: Tokens) -> Array:
    """-log sigmoid(log odds(chosen) - log odds(rejected)), odds = e^l / (1 - e^l), l the mean log-prob: [B,T].

    The second part of ORPO (Hong et al. 2024, 2403.07691, eq. 7); the first, the likelihood of the chosen, is a term
    of its own on `where="chosen"` (eq. 6: loss = NLL + lambda * this).
    """
    pairs = Pairs.of(tokens)
    chosen, rejected = pairs.means(tokens.logprobs)
    log_odds = (chosen - rejected) - (_log1mexp(chosen) - _log1mexp(rejected))
    return pairs.values(-jax.nn.log_sigmoid(log_odds))


def redi(tokens: Tokens, *, alpha: float = 0.8) -> Array:
    """-l(chosen) + alpha l(rejected), l the mean log-prob; no reference, no sigmoid: [B,T].

    REDI (Reinforcement Distillation, 2505.24850, eq. 3). Unbounded below: keep the learning rate small, and watch the
    mean log-prob of the chosen. alpha = 0 is length-normalised SFT on the chosen.
    """
    pairs = Pairs.of(tokens)
    chosen, rejected = pairs.means(tokens.logprobs)
    return pairs.values(alpha * rejected - chosen)


def kto(tokens: Tokens, *, z0: Array | float = 0.0, beta: float = 0.1, desirable: float = 1.0,
        undesirable: float = 1.0) -> Array:
    """w (1 - sigmoid(beta (r - z0))) for desirable, w (1 - sigmoid(beta (z0 - r))) for undesirable sequences: [B,T].

    r = log pi(y) - log reference(y) of the segment, w = `desirable` or `undesirable`: KTO (Ethayarajh et al. 2024,
    2402.01306, eq. 8; lambda_D, lambda_U). No pairs: the field `chosen` alone says which a segment is. z0 >= 0 is the
    mean of r over answers to other questions, without gradient; as a mean over the batch it comes from outside
    (`objective.controllers.Watched` of a `measures.sequence_log_ratio` term), one update behind.
    """
    z0 = jax.lax.stop_gradient(jnp.asarray(z0).astype(tokens.logprobs.dtype))
    r = sequence_scores(tokens, against=True)
    good = tokens.field("chosen") != 0
    value = jnp.where(good, desirable * jax.nn.sigmoid(beta * (z0 - r)), undesirable * jax.nn.sigmoid(beta * (r - z0)))
    return tokens.masked(value)


def sequence_scores(tokens: Tokens, *, against: bool) -> Array:
    """log pi(y), or with `against` log pi(y) - log reference(y), of its segment's masked tokens at each token."""
    return segment_sums(tokens, tokens.logprobs - tokens.against if against else tokens.logprobs)


def _smoothed(u: Array, eps: float) -> Array:
    if known(eps) and not 0.0 <= eps < 0.5:
        raise ValueError(f"label_smoothing is a share of wrong labels in [0, 0.5), got {eps}")
    loss = -(1.0 - eps) * jax.nn.log_sigmoid(u)
    return loss - eps * jax.nn.log_sigmoid(-u)


def _log1mexp(x: Array) -> Array:
    """log(1 - e^x) for x < 0, kept below -1e-6: a sequence that is certain would have infinite odds."""
    x = jnp.minimum(x, -1e-6)
    near = x > -0.6931472  # which of the two is exact
    small = jnp.where(near, x, -0.5)
    large = jnp.where(near, -1.0, x)
    return jnp.where(near, jnp.log(-jnp.expm1(small)), jnp.log1p(-jnp.exp(large)))
