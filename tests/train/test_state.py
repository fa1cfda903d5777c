import jax
import pytest

from distill_jax.core import tree
from distill_jax.sharding import make_mesh
from distill_jax.train.state import create_state
from tests.train.tiny import setup


def test_moments_lie_like_their_parameters():
    """Adam's moments are sharded as the parameters are, not replicated, and so is the state after creation."""
    _, state = setup(mesh=make_mesh(data=2, fsdp=2, tensor=2))
    adam = next(s for s in jax.tree.leaves(state.opt_state["student"], is_leaf=lambda s: hasattr(s, "mu"))
                if hasattr(s, "mu"))
    sharded = 0
    for moments in (adam.mu, adam.nu):
        for (name, p), (_, m) in zip(tree.paths(state.params["student"]), tree.paths(moments), strict=True):
            assert m.sharding == p.sharding, name
            assert m.addressable_shards[0].data.shape == p.addressable_shards[0].data.shape, name
            sharded += not p.sharding.is_fully_replicated
    assert sharded >= 14  # seven matrices, twice
    assert state.step.sharding.is_fully_replicated and state.rng.sharding.is_fully_replicated


def test_providers_must_match_optimisers():
    config, state = setup()
    with pytest.raises(ValueError, match="must be the same"):
        create_state({"other": state.params["student"]}, config.optimizers, mesh=config.mesh)
