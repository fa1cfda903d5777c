"""Decoding: sampling rules, requests and completions, and the `Generator` that answers them with a model at hand."""

from distill_jax.decode.generator import Generator
from distill_jax.decode.request import Completer, Completion, Injection, Request
from distill_jax.decode.sampling import Sampling

__all__ = ["Completer", "Completion", "Generator", "Injection", "Request", "Sampling"]
