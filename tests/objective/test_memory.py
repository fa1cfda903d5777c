"""The estimate that `plan` prints, against what the compiler reports."""

import jax
import jax.numpy as jnp
import pytest

from distill_jax.core.head import Head
from distill_jax.losses.rows.cross_entropy import cross_entropy
from distill_jax.objective.chunks import RowTerm, chunk_size
from distill_jax.objective.lift import lift_sum
from distill_jax.objective.memory import lift_bytes


@pytest.mark.parametrize("loop", ["tokens", "vocabulary"])
def test_estimate_is_near_the_compiled_program(loop):
    tokens, vocab, width, chunk = 4096, 4096, 64, 512
    like = jax.ShapeDtypeStruct
    shape = (4, tokens // 4)

    def total(hidden, kernel, weights, tokens):
        return lift_sum({"s": (hidden, Head(kernel=kernel))}, {"ce": RowTerm(loss=cross_entropy, source="s")},
                        {"ce": weights}, tokens=tokens, chunk=chunk, loop=loop)[0]

    memory = jax.jit(jax.grad(total, argnums=(0, 1))).lower(
        like((*shape, width), jnp.float32), like((vocab, width), jnp.float32), like(shape, jnp.float32),
        like(shape, jnp.int32)).compile().memory_analysis()
    real = memory.temp_size_in_bytes + 4 * vocab * width
    assert 0.6 < lift_bytes(tokens=tokens, vocab=vocab, width=width, chunk=chunk, itemsize=4, loop=loop) / real < 1.6
    assert real < 0.4 * tokens * vocab * 4, "less than half of one copy of the logits"


def test_estimates_of_what_was_compiled_for_an_h200():
    """benchmarks/results/loss_h200_compiled.txt: temporaries and the gradients returned, within a tenth."""
    for chunk, loop, real in ((512, "tokens", 1.98), (1024, "tokens", 2.52), (512, "vocabulary", 1.33),
                              (1024, "vocabulary", 1.62)):
        estimate = lift_bytes(tokens=8192, vocab=151_936, width=1536, chunk=chunk, loop=loop) / 1e9
        assert 0.9 < estimate / real < 1.1, (chunk, loop, estimate)


def test_cutting_the_head_divides_what_it_costs():
    """Over tensor (the tokens of the axis together) and, in the loop over the vocabulary, over fsdp."""
    kw = {"vocab": 151_936, "width": 3584}
    one = lift_bytes(tokens=8192, **kw)
    assert lift_bytes(tokens=8192 * 8, parts=8, **kw) < one / 2
    assert lift_bytes(tokens=8192, loop="vocabulary", shards=8, **kw) < one / 3
    assert lift_bytes(tokens=8192, shards=8, **kw) == one, "gathered whole: in the loop over tokens fsdp saves nothing"


def test_chunks_are_even_and_bounded():
    assert [chunk_size(n, 512) for n in (1, 5, 512, 513, 4096, 4100)] == [1, 5, 512, 264, 512, 456]
    assert all(chunk_size(n, 64) <= 64 + 8 and chunk_size(n, 64) * -(-n // chunk_size(n, 64)) >= n
               for n in range(1, 700))
