"""The critic: its error by hand, and a value head that learns returns in a training step without moving the policy."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distill_jax.core.head import Head
from distill_jax.losses.rows.value import value, value_error
from distill_jax.losses.targets import Known, Labels
from distill_jax.losses.tokens.inputs import Tokens
from distill_jax.models.projectors import ValueHead
from distill_jax.objective.chunks import RowTerm
from distill_jax.objective.lift import lift_values
from distill_jax.objective.reduce import means
from distill_jax.objective.term import Term, build_objective
from distill_jax.sharding import make_mesh
from distill_jax.train.optim import AdamW
from distill_jax.train.state import create_state
from distill_jax.train.step import make_step
from tests.objective.test_tokens import batch_of
from tests.train.tiny import CONFIG, setup


def known(**fields):
    fields = {k: jnp.asarray(v, jnp.float32) for k, v in fields.items()}
    n = len(next(iter(fields.values())))
    about = Tokens(logprobs=None, entropies=None, mask=jnp.ones(n, bool), segment_ids=None, fields=fields)
    return Known(jnp.zeros(n, jnp.int32), about)


def test_value_error_by_hand():
    """V 1.5, R 1: 1/8. Clipped at .2 around old 1: V is taken as 1.2, which is nearer: the larger error stays.
    V 0.5, old 2, R 0: clipped to 1.8 -> 1.62 with no gradient."""
    logits = jnp.asarray([[1.5], [0.5]])
    target = known(returns=[1.0, 0.0], old_values=[1.0, 2.0])
    np.testing.assert_allclose(value_error(logits, target), [0.125, 0.125])
    np.testing.assert_allclose(value_error(logits, target, clip=0.2), [0.125, 1.62])
    grad = jax.grad(lambda x: jnp.sum(value_error(x, target, clip=0.2)))(logits)
    np.testing.assert_allclose(grad, [[0.5], [0.0]])
    with pytest.raises(ValueError, match="target=\"fields\""):
        value_error(logits, Labels(jnp.zeros(2, jnp.int32)))
    with pytest.raises(ValueError, match="the batch has"):
        value_error(logits, known(old_values=[0.0, 0.0]))
    with pytest.raises(ValueError, match="one output"):
        value(jnp.zeros((2, 5)))


@pytest.mark.parametrize("detach", [True, False])
def test_a_value_head_learns_returns(detach):
    """The error falls; the student moves only where the trunk is shared. Values are of the state before the token."""
    batch = batch_of()
    fields = batch.main.fields
    fields["returns"] = 0.1 * np.asarray(batch.main.positions, np.float32)
    mesh = make_mesh(devices=jax.devices()[:1])
    config, state = setup(mesh=mesh)
    critic = ValueHead(source="student/main", width=CONFIG.hidden_size, detach=detach)
    terms = {"value": Term(value_error, student="critic/main", target="fields")}
    config = dataclasses.replace(
        config, objective=build_objective(terms), projectors={"critic": critic},
        optimizers=config.optimizers | {"critic": AdamW(peak_lr=0.05, warmup=1).build(50)})
    before = jax.tree.map(np.asarray, state.params["student"])
    params = {"student": state.params["student"], "critic": critic.init(jax.random.key(0))}
    state = create_state(params, config.optimizers, mesh=mesh, seed=0, controllers={})
    step, seen = make_step(config, state), []
    for _ in range(15):
        state, metrics = step(state, {}, batch)
        seen.append(float(means(metrics["terms"])["value"]))
    assert seen[-1] < 0.5 * seen[0]
    moved = max(float(np.abs(a - b).max()) for a, b in zip(
        jax.tree.leaves(before), jax.tree.leaves(jax.tree.map(np.asarray, state.params["student"])), strict=True))
    assert moved < 1e-3 if detach else moved > 1e-3  # weight decay moves it a little


def test_values_are_of_the_state_before_the_token():
    hidden = jnp.arange(6, dtype=jnp.float32).reshape(1, 3, 2)
    head = Head(kernel=jnp.ones((1, 2), jnp.float32), bias=jnp.zeros(1, jnp.float32))
    got = lift_values({"critic/main": (hidden, head)}, {"v": RowTerm(loss=value, source="critic/main")},
                      tokens=jnp.zeros((1, 3), jnp.int32), active=jnp.ones((1, 3), bool))
    np.testing.assert_allclose(got["v"], [[0, 1, 5]])
