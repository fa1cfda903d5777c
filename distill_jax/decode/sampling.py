"""How the next token is chosen: greedy, or temperature with top-k, top-p and min-p composed.

B rows, N outcomes: the vocabulary, or the top-k of it. A rule is a pure function on float32 logits [B,N] that sets
what it excludes to -inf; it never excludes the most probable outcome. Rules apply in the order in which
they are written below, each to the renormalised distribution that the one before left (as in Hugging Face).
"""

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp

Array = Any

IMPL = "threefry2x32"
"""Generator of the random bits: named, so that samples do not depend on jax's default."""


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """What to draw, and when to stop.

    temperature     logits are divided by it; 0 is greedy, and then the other rules do nothing
    top_k           keep the k most probable tokens (ties: the lower ids); 0 keeps all
    top_p           keep the smallest set of most probable tokens that holds at least this mass (with ties)
    min_p           keep tokens at least this fraction as probable as the most probable one
    max_new_tokens  most tokens a completion may have, the stop token included
    stop_ids        a completion ends after any of these; they are part of it
    stop_strings    a completion ends with the token that completes any of these in the sampled text; it is part of it
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    max_new_tokens: int = 256
    stop_ids: tuple[int, ...] = ()
    stop_strings: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        checks = (("temperature", self.temperature >= 0, "at least 0"), ("top_k", self.top_k >= 0, "at least 0"),
                  ("top_p", 0 < self.top_p <= 1, "in (0, 1]"), ("min_p", 0 <= self.min_p <= 1, "in [0, 1]"),
                  ("max_new_tokens", self.max_new_tokens >= 1, "at least 1"))
        for name, good, rule in checks:
            if not good:
                raise ValueError(f"Sampling.{name} must be {rule}, got {getattr(self, name)}")
        if isinstance(self.stop_strings, str) or not all(self.stop_strings):
            raise ValueError(f"Sampling.stop_strings must be strings that are not empty, got {self.stop_strings!r}")
        object.__setattr__(self, "stop_ids", tuple(int(i) for i in self.stop_ids))
        object.__setattr__(self, "stop_strings", tuple(self.stop_strings))

    @property
    def greedy(self) -> bool:
        return self.temperature == 0

    def to_json(self) -> dict[str, Any]:
        """Its fields; no stop strings are not mentioned."""
        out = {**vars(self), "stop_ids": list(self.stop_ids), "stop_strings": list(self.stop_strings)}
        return out if self.stop_strings else {k: v for k, v in out.items() if k != "stop_strings"}

    @property
    def rules(self) -> "Sampling":
        """What a compiled step depends on: lengths and strings are the business of who calls it."""
        return replace(self, max_new_tokens=1, stop_strings=())

    @property
    def unchanged(self) -> bool:
        """Whether tokens are drawn from the model's own distribution."""
        return self.temperature == 1 and self.top_k == 0 and self.top_p == 1 and self.min_p == 0


def keep_top_k(logits: Array, k: int) -> tuple[Array, Array]:
    """logits [B,V] -> the k largest, descending [B,k], and their ids i32 [B,k]; among equals the lower id wins."""
    return jax.lax.top_k(logits, min(k, logits.shape[-1]))


def keep_top_p(logits: Array, p: float) -> Array:
    """Keep the most probable outcomes until their mass reaches p; outcomes that tie with the last one stay too."""
    probs = jax.nn.softmax(logits, axis=-1)
    ordered = -jnp.sort(-probs, axis=-1)
    before = jnp.cumsum(ordered, axis=-1) - ordered  # mass of what is strictly more probable
    last = jnp.min(jnp.where(before < p, ordered, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(probs >= last, logits, -jnp.inf)


def keep_min_p(logits: Array, p: float) -> Array:
    """Keep outcomes with probability >= p * (largest probability)."""
    return jnp.where(logits >= jnp.max(logits, axis=-1, keepdims=True) + jnp.log(p), logits, -jnp.inf)


def filtered(logits: Array, sampling: Sampling) -> tuple[Array, Array | None]:
    """float32 logits [B,V] -> tempered logits [B,N], -inf where excluded, and the ids i32 [B,N] they are of (None:
    the vocabulary in order)."""
    logits, ids = logits / sampling.temperature, None
    if sampling.top_k:
        logits, ids = keep_top_k(logits, sampling.top_k)
    if sampling.top_p < 1:
        logits = keep_top_p(logits, sampling.top_p)
    if sampling.min_p > 0:
        logits = keep_min_p(logits, sampling.min_p)
    return logits, ids


def row_keys(seeds: Array) -> Array:
    """uint32 seeds [B] -> a random key per row."""
    return jax.vmap(lambda s: jax.random.key(s, impl=IMPL))(seeds)


def choose(logits: Array, keys: Array, sampling: Sampling) -> tuple[Array, Array]:
    """float32 logits [B,V] and a key per row -> token i32 [B], and float32 [B] its log-prob under the rules.

    Gumbel-max with the row's own key: a row's token depends on its logits and key only.
    """
    if sampling.greedy:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32), jnp.zeros(logits.shape[0], jnp.float32)
    logits, ids = filtered(logits, sampling)
    noise = jax.vmap(lambda key: jax.random.gumbel(key, logits.shape[1:], jnp.float32))(keys)
    pick = jnp.argmax(logits + noise, axis=-1)
    token = pick if ids is None else at(ids, pick)
    return token.astype(jnp.int32), logprob(logits, pick)


def at(values: Array, index: Array) -> Array:
    """values [B,N] at index i32 [B] -> [B]."""
    return jnp.take_along_axis(values, index[:, None], axis=-1)[:, 0]


def logprob(logits: Array, token: Array) -> Array:
    """float32 logits [B,N] -> float32 [B]: log-softmax at token i32 [B]."""
    return at(logits, token) - jax.nn.logsumexp(logits, axis=-1)
