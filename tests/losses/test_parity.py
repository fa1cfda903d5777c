"""Row losses against torch, written here from the formulas of the public implementations (`make parity`).

TRL's generalized JSD loss, TAID's official loss, DistiLLM's skew KLs, DSKD's adaptive KL, and PLD from its formula.
Values and gradients per row; theirs average over a batch.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distill_jax.losses.rows.adaptive import adaptive_kl
from distill_jax.losses.rows.divergences import (
    forward_kl,
    generalized_jsd,
    reverse_kl,
    skew_forward_kl,
    skew_reverse_kl,
)
from distill_jax.losses.rows.plackett_luce import plackett_luce
from distill_jax.losses.rows.taid import taid
from distill_jax.losses.targets import Full

pytestmark = pytest.mark.parity
N, V = 7, 53


def kl(log_a, log_b):
    return (log_a.exp() * (log_a - log_b)).sum(-1)


def trl_jsd(z, t, y, beta, temperature):
    """Without the tau^2 that ours carries."""
    import torch

    log_q, log_p = ((x / temperature).log_softmax(-1) for x in (z, t))
    if beta in (0, 1):
        return kl(log_p, log_q) if beta == 0 else kl(log_q, log_p)
    b = torch.tensor(beta)
    log_m = torch.logsumexp(torch.stack([log_q + torch.log(1 - b), log_p + torch.log(b)]), dim=0)
    return b * kl(log_p, log_m) + (1 - b) * kl(log_q, log_m)


def official_taid(z, t, y, ratio):
    target = ((1 - ratio) * z.detach() + ratio * t).softmax(-1)
    return -(target * z.log_softmax(-1)).sum(-1)


def distillm(z, t, y, reverse):
    """Their forward loss leaves out the teacher's entropy, which has no gradient; here it is in."""
    p, q = t.softmax(-1), z.softmax(-1)
    return kl(q.log(), (0.9 * p + 0.1 * q).log()) if reverse else kl(p.log(), (0.1 * p + 0.9 * q).log())


def dskd_adaptive(z, t, y):
    p, q = t.softmax(-1), z.softmax(-1)
    rising, order = p.sort(-1)
    tail = rising.cumsum(-1) <= 0.5
    gap = (rising - q.gather(-1, order)).abs().detach()
    head, tail = (gap * ~tail).sum(-1), (gap * tail).sum(-1)
    return (head * kl(p.log(), q.log()) + tail * kl(q.log(), p.log())) / (head + tail)


def pld(z, t, y):
    import torch

    first = torch.nn.functional.one_hot(y, V) * 1e9
    order = (t + first).argsort(-1, descending=True)
    s, w = z.gather(-1, order), t.softmax(-1).gather(-1, order)
    return (w * (s.flip(-1).logcumsumexp(-1).flip(-1) - s)).sum(-1)


CASES = {
    "jsd": (partial(trl_jsd, beta=0.3, temperature=2.0), partial(generalized_jsd, beta=0.3, temperature=2.0), 4.0),
    "jsd0": (partial(trl_jsd, beta=0, temperature=1.0), forward_kl, 1.0),
    "jsd1": (partial(trl_jsd, beta=1, temperature=1.0), reverse_kl, 1.0),
    "taid": (partial(official_taid, ratio=0.4), partial(taid, t=jnp.float32(0.4)), 1.0),
    "skew": (partial(distillm, reverse=False), skew_forward_kl, 1.0),
    "skew_reverse": (partial(distillm, reverse=True), skew_reverse_kl, 1.0),
    "akl": (dskd_adaptive, adaptive_kl, 1.0),
    "pld": (pld, plackett_luce, 1.0),
}


@pytest.mark.parametrize("name", CASES)
def test_agrees_with_torch(name):
    torch = pytest.importorskip("torch")
    theirs, ours, factor = CASES[name]
    rng = np.random.default_rng(0)
    z, t = (rng.normal(size=(N, V)).astype(np.float32) * 3 for _ in range(2))
    y = rng.integers(0, V, N)
    leaf = torch.tensor(z, requires_grad=True)
    want = theirs(leaf, torch.tensor(t), torch.tensor(y)) * factor
    want.sum().backward()
    target = Full(jnp.asarray(t), jnp.asarray(y, jnp.int32))
    got, grad = jax.jit(lambda z: (ours(z, target), jax.grad(lambda z: ours(z, target).sum())(z)))(jnp.asarray(z))
    assert leaf.grad is not None
    np.testing.assert_allclose(got, want.detach().numpy(), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(grad, leaf.grad.numpy(), rtol=1e-4, atol=1e-5)
