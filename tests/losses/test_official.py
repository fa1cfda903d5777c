"""Losses against the code their authors published, run as it is (`make parity`, where the code is at hand).

    git clone https://github.com/SakanaAI/TAID && git clone https://github.com/2018cx/SinKD
    git clone https://github.com/songmzhang/DSKD && pip download trl==1.16.0 --no-deps && unzip trl-*.whl
    DISTILL_JAX_REFERENCES=. make parity

Only the functions that are compared are taken out of the files: their modules import trainers that are not needed.
Where the published code is not what the paper means, the test says so and shows the difference.
"""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distill_jax.data.cross import group_spans
from distill_jax.losses.groups.sinkhorn import sinkhorn_distance
from distill_jax.losses.rows.adaptive import adaptive_kl
from distill_jax.losses.rows.divergences import (
    forward_kl,
    generalized_jsd,
    reverse_kl,
    skew_forward_kl,
    skew_reverse_kl,
)
from distill_jax.losses.rows.taid import taid
from distill_jax.losses.rows.uld import uld
from distill_jax.losses.targets import Full
from distill_jax.objective.controllers import OWN, TAIDSchedule
from tests.losses.published import published

pytestmark = pytest.mark.parity
N, V = 7, 53
GOLD = "trl/experimental/gold/gold_trainer.py"
GKD = "trl/experimental/gkd/gkd_trainer.py"


@pytest.fixture
def rows():
    rng = np.random.default_rng(0)
    return [rng.normal(size=(N, V)).astype(np.float32) * 3 for _ in range(2)]


def compare(theirs, ours, rows):
    """Sums over rows and their gradients to the student's logits: `theirs(torch)` and `ours(jax) [N]`."""
    torch = pytest.importorskip("torch")
    z, t = rows
    leaf = torch.tensor(z, requires_grad=True)
    want = theirs(leaf, torch.tensor(t))
    want.sum().backward()
    got, grad = jax.value_and_grad(lambda x: jnp.sum(ours(x, Full(jnp.asarray(t), jnp.zeros(N, jnp.int32)))))(z)
    np.testing.assert_allclose(got, want.sum().item(), rtol=1e-4, atol=1e-5)
    assert leaf.grad is not None
    np.testing.assert_allclose(grad, leaf.grad.numpy(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("beta", [0.0, 0.1, 0.5, 1.0])
def test_trl_generalized_jsd(rows, beta, temperature):
    """Theirs has no tau^2."""
    theirs = published(GKD, "generalized_jsd_loss", "GKDTrainer")
    compare(lambda z, t: theirs(z[None], t[None], beta=beta, temperature=temperature, reduction="sum"),
            lambda z, target: generalized_jsd(z, target, beta=beta, temperature=temperature) / temperature ** 2, rows)


def test_trl_uld(rows):
    """Two vocabularies, one tokenisation; theirs is the mean over positions, padded with zeros."""
    torch = pytest.importorskip("torch")
    theirs = published(GOLD, "ULDLoss", GOLDConfig=None)
    z, wide = rows[0], np.concatenate([rows[1], rows[0][:, :9]], axis=1)
    config = SimpleNamespace(uld_crossentropy_weight=0.0, uld_distillation_weight=1.0, uld_student_temperature=1.5,
                             uld_teacher_temperature=1.5, uld_skip_student_eos=False, uld_skip_teacher_eos=False,
                             use_extended_uld=False, uld_token_merge_strategy="observed", uld_use_hybrid_loss=False)
    labels = torch.zeros(1, N, dtype=torch.long)
    leaf = torch.tensor(z, requires_grad=True)
    want = theirs(config)(leaf[None], torch.tensor(wide)[None], labels, labels, labels, labels)
    want.backward()
    ours = lambda x: jnp.mean(uld(x, Full(jnp.asarray(wide), jnp.zeros(N, jnp.int32)), temperature=1.5))
    got, grad = jax.value_and_grad(ours)(z)
    np.testing.assert_allclose(got, want.item(), rtol=1e-4)
    assert leaf.grad is not None
    np.testing.assert_allclose(grad, leaf.grad.numpy(), rtol=1e-3, atol=1e-6)


def test_trl_byte_offsets():
    """The same groups where both sides cover the whole text; theirs has one more for a rest only one side has."""
    theirs = published(GOLD, "_align_by_byte_offsets", "ULDLoss")
    rng = np.random.default_rng(1)
    for _ in range(50):
        n = int(rng.integers(2, 40))
        sides = []
        for _ in range(2):
            cuts = np.flatnonzero(rng.random(n - 1) < 0.4) + 1
            edges = np.concatenate([[0], cuts, [n]])
            sides.append(np.stack([edges[:-1], edges[1:]], axis=1))
        want = theirs(*(s.tolist() for s in sides))
        got = group_spans(*sides)
        for groups, mine in zip(want, (got.source, got.target), strict=True):
            assert [np.flatnonzero(mine == g).tolist() for g in range(got.count)] == groups


@pytest.mark.parametrize("t", [0.0, 0.4, 1.0])
def test_taid(rows, t):
    torch = pytest.importorskip("torch")
    kl = published("TAID/src/distil_losses/fkl.py", "forward_kl", Optional=None)
    cls = published("TAID/src/distil_losses/taid.py", "TAID", DistilLoss=torch.nn.Module, forward_kl=kl)
    official = cls(t_start=0.0)
    official.t = torch.tensor(t)
    compare(lambda z, teacher: official.compute_loss(z, teacher, torch.ones(N)) * N,
            lambda z, target: taid(z, target, t=jnp.float32(t)), rows)


def test_taid_schedule():
    torch = pytest.importorskip("torch")
    cls = published("TAID/src/distil_losses/taid.py", "TAID", DistilLoss=torch.nn.Module, forward_kl=None)
    official, ours = cls(t_start=0.2, alpha=0.05), TAIDSchedule(steps=40, start=0.2, alpha=0.05)
    state, losses = ours.init(), 3 * np.exp(-np.arange(30) / 9) + np.random.default_rng(0).random(30)
    for step, loss in enumerate(losses.astype(np.float32)):
        official.update_t(torch.tensor(loss), step, 40)
        state = ours.update(state, {OWN: jnp.asarray(loss)}, jnp.int32(step))
        np.testing.assert_allclose(state["t"], official.t.item(), rtol=1e-5)


def test_sinkd(rows):
    """Theirs is the sum over pairs, ours is divided by the number of points."""
    cls = published("SinKD/loss.py", "Sinkhorn")
    softmax = lambda x: jax.nn.softmax(x / 2.0, axis=-1)
    compare(lambda z, t: cls(2)(z, t) / 0.001,
            lambda z, target: jnp.full(N, sinkhorn_distance(softmax(z), softmax(target.logits))), rows)


DSKD = {
    "compute_forward_kl_divergence": forward_kl,
    "compute_reverse_kl_divergence": reverse_kl,
    "compute_adaptive_kl_divergence": adaptive_kl,
    "compute_js_divergence": lambda z, t: generalized_jsd(z, t, beta=0.5),
    "compute_skewed_forward_kl_divergence": lambda z, t: skew_forward_kl(z, t, alpha=0.1),
    "compute_skewed_reverse_kl_divergence": lambda z, t: skew_reverse_kl(z, t, alpha=0.1),
}


@pytest.mark.parametrize("name", DSKD)
def test_dskd_divergences(rows, name):
    torch = pytest.importorskip("torch")
    cls = published("DSKD/code/criterions/various_divergence.py", "VariousDivergence", CrossEntropyLoss=object)
    official = object.__new__(cls)
    official.kd_temp, official.tea_temp, official.padding_id = 1.0, 1.0, -100
    official.args = SimpleNamespace(adaptive_kl_alpha=0.5, skew_lambda=0.1)
    compare(lambda z, t: getattr(official, name)(z, t, torch.zeros(N, dtype=torch.long)), DSKD[name], rows)
