"""Decoding: sampling rules, the KV-cache loop, and the `Generator` that feeds it."""

from distill_jax.decode.generator import Completion, Generator
from distill_jax.decode.sampling import Sampling

__all__ = ["Completion", "Generator", "Sampling"]
