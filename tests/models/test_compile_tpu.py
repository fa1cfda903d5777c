"""Splash attention compiled for TPUs that are not there: forward and backward, every head size. Needs libtpu."""

import functools
import importlib.util

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import SingleDeviceSharding

from distill_jax.core.platform import compiling_for
from distill_jax.models.attention import attend
from distill_jax.models.scores import Layout, Score

pytestmark = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None,
                                reason="libtpu is not installed (pip install 'jax[tpu]' of jax's version)")


@pytest.mark.parametrize("chip", ["v6e:2x2", "v5p:2x2x1"])
@pytest.mark.parametrize("head_dim, window, cap", [(64, None, None), (96, None, None), (128, 1024, None),
                                                   (256, None, 30.0)])
def test_splash_compiles(chip, head_dim, window, cap, monkeypatch):
    from jax.experimental import topologies

    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
    monkeypatch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    where = SingleDeviceSharding(topologies.get_topology_desc(chip, "tpu").devices[0])
    array = functools.partial(jax.ShapeDtypeStruct, sharding=where)
    q, k = (array((2, n, 4096, head_dim), jnp.bfloat16) for n in (8, 2))
    ids = array((2, 4096), jnp.int32)
    score = Score(scale=head_dim ** -0.5, window=window, soft_cap=cap)

    def loss(q, k, v, ids):
        order = jnp.arange(4096)[None]
        layout = Layout(q_index=order, k_index=order, q_segments=ids, k_segments=ids, plain=True)
        return jnp.sum(attend(q, k, v, layout, score).astype(jnp.float32))

    with compiling_for("tpu"):
        program = jax.jit(jax.grad(loss, (0, 1, 2))).lower(q, k, k, ids).compile()
    assert "splash" in program.as_text()
    assert program.memory_analysis().temp_size_in_bytes < 2 * 8 * 4096 * 4096, "no square of the row"
