import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distill_jax.core import tree
from distill_jax.core.batch import Batch, Stream, TopK
from distill_jax.core.head import NEG, Head
from distill_jax.core.roles import ANSWER, THINK, Role, parse_roles
from distill_jax.core.schedules import Linear, WarmupCosine, at, until


def test_roles_are_frozen():
    assert [(r.name, int(r)) for r in Role] == [
        ("PAD", 0), ("TEMPLATE", 1), ("SYSTEM", 2), ("QUESTION", 3), ("THINK", 4), ("ANSWER", 5),
        ("TOOL_CALL", 6), ("TOOL", 7), ("INJECTED", 8)]
    assert parse_roles("think, answer") == (THINK, ANSWER)
    with pytest.raises(ValueError, match="known roles"):
        parse_roles("thinking")


def test_batch_is_a_pytree():
    z = np.zeros((2, 3), np.int32)
    s = Stream(tokens=z, positions=z, segment_ids=z, roles=z, step_ids=z, weights=z.astype(np.float32), row_ids=z)
    b = Batch(views={"main": s}, signals={"topk": TopK(ids=z[..., None], logprobs=z[..., None], mask=z > 0)})
    out = jax.tree.map(lambda x: x + 1 if x.dtype == np.int32 else x, b)
    assert out.main.tokens.max() == 1 and isinstance(out.signals["topk"], TopK)


def test_head_pads_caps_and_accumulates_in_f32():
    k = jnp.array([[1.0, 0.0], [0.0, 2.0], [5.0, 5.0]], jnp.bfloat16)
    h = jnp.array([[3.0, 4.0]], jnp.bfloat16)
    out = Head(kernel=k, real=2, soft_cap=10.0).logits(h)
    assert out.dtype == jnp.float32
    np.testing.assert_allclose(out[0], [10 * np.tanh(0.3), 10 * np.tanh(0.8), NEG], rtol=1e-6)


def test_schedules():
    assert float(at(0.5, 7)) == 0.5
    assert [float(Linear(start=0, stop=1, steps=4)(s)) for s in (0, 2, 9)] == [0, 0.5, 1]
    assert float(until(Linear(start=0, stop=1), 4)(2)) == 0.5  # the stage's updates where it names none
    assert until(Linear(start=0, stop=1, steps=8), 4).steps == 8 and until(0.5, 4) == 0.5
    with pytest.raises(ValueError, match=r"Linear.steps is not known outside of a stage"):
        Linear(start=0, stop=1)(0)
    w = WarmupCosine(peak=1.0, warmup=2, total=12, end=0.1)
    np.testing.assert_allclose([float(w(s)) for s in (0, 1, 2, 7, 12)], [0.5, 1, 1, 0.55, 0.1], rtol=1e-6)


def test_tree_helpers():
    t = {"a": jnp.ones((2, 2)), "b": {"c": jnp.full((3,), 2.0, jnp.bfloat16)}}
    assert dict(tree.paths(t)).keys() == {"a", "b/c"}
    assert tree.count(t) == 7 and tree.nbytes(t) == 22
    assert float(tree.global_norm(t)) == 4.0
