"""The estimate that `plan` prints, against what the compiler reports."""

import jax
import jax.numpy as jnp

from distill_jax.core.head import Head
from distill_jax.losses.rows.cross_entropy import cross_entropy
from distill_jax.objective.chunks import RowTerm, chunk_size
from distill_jax.objective.lift import lift_sum
from distill_jax.objective.memory import lift_bytes


def test_estimate_is_near_the_compiled_program():
    tokens, vocab, width, chunk = 4096, 4096, 64, 512
    like = jax.ShapeDtypeStruct
    shape = (4, tokens // 4)

    def total(hidden, kernel, weights, tokens):
        return lift_sum({"s": (hidden, Head(kernel=kernel))}, {"ce": RowTerm(loss=cross_entropy, source="s")},
                        {"ce": weights}, tokens=tokens, chunk=chunk)[0]

    memory = jax.jit(jax.grad(total, argnums=(0, 1))).lower(
        like((*shape, width), jnp.float32), like((vocab, width), jnp.float32), like(shape, jnp.float32),
        like(shape, jnp.int32)).compile().memory_analysis()
    real = memory.temp_size_in_bytes + 4 * vocab * width
    assert 0.6 < lift_bytes(tokens=tokens, vocab=vocab, width=width, chunk=chunk, itemsize=4) / real < 1.6
    assert real < 0.4 * tokens * vocab * 4, "less than half of one copy of the logits"


def test_chunks_are_even_and_bounded():
    assert [chunk_size(n, 512) for n in (1, 5, 512, 513, 4096, 4100)] == [1, 5, 512, 264, 512, 456]
    assert all(chunk_size(n, 64) <= 64 + 8 and chunk_size(n, 64) * -(-n // chunk_size(n, 64)) >= n
               for n in range(1, 700))
