"""Policy and preference losses against TRL's published trainers, run as they are (see the head of test_official.py).

Their methods are called on an object that has what they read; log-probs come from the test instead of a model.
"""

import contextlib
import math
from collections import defaultdict
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distill_jax.losses.tokens.aggregate import ConstantLength, sequence_mean, token_mean
from distill_jax.losses.tokens.inputs import Tokens
from distill_jax.losses.tokens.measures import clip_fraction, preference_accuracy, preference_margin
from distill_jax.losses.tokens.policy import cispo, gspo, ppo_clip
from distill_jax.losses.tokens.preference import dpo, ipo, kto, odds_ratio, simpo
from distill_jax.losses.tokens.ratios import Corrected, sampler_weights
from distill_jax.losses.tokens.regularizers import kl, negative_entropy
from distill_jax.rollout.advantages import group_z, leave_one_out
from tests.losses.published import published
from tests.losses.sampled import aggregated

pytestmark = pytest.mark.parity
B, T = 6, 9
OLD = {"old": "old_logprobs"}
CLIP = {"low": 0.2, "high": 0.28} | OLD


def random_arrays(seed=0):
    rng = np.random.default_rng(seed)
    draw = lambda scale: (scale * rng.normal(size=(B, T))).astype(np.float32)
    lp = -np.abs(draw(1.5)) - 0.01
    lengths = np.arange(3, 3 + B)
    return SimpleNamespace(
        lp=lp, old=lp + draw(0.3), behaviour=lp + draw(0.3), ref=lp + draw(0.5), entropy=np.abs(draw(1.0)),
        mask=(np.arange(T) < lengths[:, None]).astype(np.float32), advantages=rng.normal(size=B).astype(np.float32))


def tokens_of(a, **fields):
    mask = jnp.asarray(a.mask, bool)
    fields = {"advantages": np.broadcast_to(a.advantages[:, None], (B, T)), "old_logprobs": a.old,
              "behaviour_logprobs": a.behaviour} | fields
    return Tokens(logprobs=jnp.asarray(a.lp), entropies=jnp.asarray(a.entropy), mask=mask,
                  segment_ids=mask.astype(jnp.int32), reference=jnp.asarray(a.ref),
                  fields={k: jnp.asarray(v) for k, v in fields.items()})


def ours(tokens, terms, per):
    """Sum of (weight, loss) aggregated by `per`, and its gradient to the log-probs."""
    def total(lp):
        given = Tokens(**(vars(tokens) | {"logprobs": lp}))
        return sum(weight * aggregated(loss(given), tokens, per) for weight, loss in terms)

    return jax.value_and_grad(total)(tokens.logprobs)


def compare(want, leaf, got):
    want.backward()
    np.testing.assert_allclose(got[0], want.item(), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(got[1], leaf.grad.numpy(), rtol=1e-5, atol=1e-5)
    assert np.any(np.asarray(got[1]))


def accelerator():
    same = lambda x, **_: x
    return SimpleNamespace(num_processes=1, gather=same, gather_for_metrics=same, reduce=same, device="cpu",
                           sync_gradients=True)


def grpo(a, **settings):
    """TRL's GRPO loss as a tensor, the log-probs it flows to, and its metrics."""
    torch = pytest.importorskip("torch")
    known = {"nanmin": torch.min, "nanmax": torch.max}
    loss = published("trl/trainer/grpo_trainer.py", "_compute_loss", "GRPOTrainer", **known)
    leaf = torch.tensor(a.lp, requires_grad=True)
    options = {"delta": None, "use_bias_correction_kl": False, "steps_per_generation": 1} | settings.pop("args", {})
    trainer = SimpleNamespace(**{
        "loss_type": "grpo", "importance_sampling_level": "token", "beta": 0.0, "epsilon_low": 0.2,
        "epsilon_high": 0.28, "top_entropy_quantile": 1.0, "off_policy_mask_threshold": None, "use_vllm": False,
        "vllm_importance_sampling_correction": False, "aux_loss_enabled": False, "_entropy_bonus_enabled": False,
        "use_adaptive_entropy": False, "max_completion_length": 16, "current_gradient_accumulation_steps": 1,
        "model": SimpleNamespace(training=True), "accelerator": accelerator(), "args": SimpleNamespace(**options),
        "_metrics": defaultdict(lambda: defaultdict(list)), **settings,
        "_get_per_token_logps_and_entropies": lambda *_, **__: (leaf, torch.tensor(a.entropy), None)})
    mask = torch.tensor(a.mask)
    inputs = {"prompt_ids": torch.ones(B, 2), "prompt_mask": torch.ones(B, 2), "completion_ids": torch.ones(B, T),
              "completion_mask": mask, "advantages": torch.tensor(a.advantages), "num_items_in_batch": mask.sum(),
              "old_per_token_logps": torch.tensor(a.old), "ref_per_token_logps": torch.tensor(a.ref)}
    if trainer.use_vllm:
        inputs["importance_sampling_ratio"] = torch.tensor(np.asarray(
            sampler_weights(tokens_of(a), old="old_logprobs", cap=1.3)))
    return loss(trainer, None, inputs), leaf, trainer._metrics["train"]


PPO = (1.0, lambda t: ppo_clip(t, **CLIP))
CASES = {
    "grpo": ({"loss_type": "grpo", "beta": 0.04}, [PPO, (0.04, kl)], sequence_mean),
    "bnpo": ({"loss_type": "bnpo"}, [PPO], token_mean),
    "dapo": ({"loss_type": "dapo"}, [PPO], token_mean),
    "dr_grpo": ({"loss_type": "dr_grpo"}, [PPO], ConstantLength(length=16)),
    "two-sided": ({"loss_type": "dapo", "args": {"delta": 1.5}}, [(1.0, lambda t: ppo_clip(t, dual=1.5, **CLIP))],
                  token_mean),
    "cispo": ({"loss_type": "cispo", "epsilon_high": 1.2}, [(1.0, lambda t: cispo(t, cap=1.2, **OLD))], token_mean),
    "gspo": ({"importance_sampling_level": "sequence", "epsilon_low": 0.05, "epsilon_high": 0.04},
             [(1.0, lambda t: gspo(t, low=0.05, high=0.04, **OLD))], sequence_mean),
    "corrected": ({"loss_type": "dapo", "use_vllm": True, "vllm_importance_sampling_correction": True},
                  [(1.0, lambda t: Corrected(loss=ppo_clip, cap=1.3)(t, low=0.2, high=0.28))], token_mean),
    "unbiased KL": ({"loss_type": "dapo", "beta": 0.1, "args": {"use_bias_correction_kl": True}},
                    [PPO, (0.1, lambda t: kl(t, old="old_logprobs"))], token_mean),
    "entropy": ({"loss_type": "dapo", "_entropy_bonus_enabled": True, "entropy_coef": 0.01},
                [PPO, (0.01, negative_entropy)], token_mean),
}


@pytest.mark.parametrize("name", CASES)
def test_grpo_variants(name):
    settings, terms, per = CASES[name]
    a = random_arrays()
    want, leaf, metrics = grpo(a, **settings)
    tokens = tokens_of(a)
    compare(want, leaf, ours(tokens, terms, per))
    if name == "dapo":
        low, high = (metrics[f"clip_ratio/{side}_mean"][0] for side in ("low", "high"))
        assert np.isclose(aggregated(clip_fraction(tokens, **CLIP), tokens, token_mean), low + high) and low * high > 0


def test_rloo():
    """TRL's ratio is that of whole sequences."""
    torch = pytest.importorskip("torch")
    a = random_arrays()
    a.old = a.lp + 0.3 * (a.old - a.lp)
    mask, leaf = torch.tensor(a.mask), torch.tensor(a.lp, requires_grad=True)
    loss = published("trl/trainer/rloo_trainer.py", "_compute_loss", "RLOOTrainer", nanmin=torch.min, nanmax=torch.max)
    trainer = SimpleNamespace(
        epsilon_low=0.2, epsilon_high=0.28, aux_loss_enabled=False, model=SimpleNamespace(training=True),
        accelerator=accelerator(), _metrics=defaultdict(lambda: defaultdict(list)),
        _get_per_token_logps_and_entropies=lambda *_, **__: (leaf, torch.tensor(a.entropy), None))
    inputs = {"prompt_ids": torch.ones(B, 2), "prompt_mask": torch.ones(B, 2), "completion_ids": torch.ones(B, T),
              "completion_mask": mask, "advantages": torch.tensor(a.advantages),
              "old_logps": (torch.tensor(a.old) * mask).sum(1)}
    want = loss(trainer, None, inputs)
    compare(want, leaf, ours(tokens_of(a), [(1.0, lambda t: ppo_clip(t, level="product", **CLIP))], sequence_mean))


def test_group_statistics():
    """torch.std of each group; theirs divides by std + 1e-4."""
    torch = pytest.importorskip("torch")
    rewards = torch.tensor(np.random.default_rng(0).normal(size=(5, 4)))
    want = (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-4)
    groups = np.repeat(np.arange(5), 4)
    np.testing.assert_allclose(group_z(rewards.reshape(-1).numpy(), groups, eps=1e-4), want.reshape(-1), atol=1e-6)
    others = (rewards.sum(1, keepdim=True) - rewards) / 3
    np.testing.assert_allclose(leave_one_out(rewards.reshape(-1), groups), (rewards - others).reshape(-1), atol=1e-9)


# Preferences: rows 0 to 2 are chosen, 3 to 5 rejected; for ours, a pair stands in one row.


def as_pairs(a):
    """The first half of the rows beside the second."""
    wide = lambda x: jnp.asarray(np.concatenate([x[:B // 2], x[B // 2:]], axis=1))
    half = np.concatenate([np.ones((B // 2, T)), np.zeros((B // 2, T))])
    mask = wide(a.mask) != 0
    fields = {"chosen": wide(half), "pair_ids": jnp.ones(mask.shape, jnp.int32)}
    return Tokens(logprobs=wide(a.lp), entropies=wide(a.entropy), mask=mask, reference=wide(a.ref), fields=fields,
                  segment_ids=jnp.where(mask, jnp.asarray(wide(2 - half), jnp.int32), 0))


def stacked(got):
    """(value, gradient in TRL's order of rows)."""
    value, grad = got
    return value, np.concatenate([np.asarray(grad)[:, :T], np.asarray(grad)[:, T:]])


def logps(a, x, leaf=False):
    torch = pytest.importorskip("torch")
    x = torch.tensor(x, requires_grad=leaf)
    return x, (x * torch.tensor(a.mask)).sum(1)


def trl_dpo(a, **settings):
    torch = pytest.importorskip("torch")
    nothing = lambda *_: contextlib.nullcontext()
    loss = published("trl/trainer/dpo_trainer.py", "_compute_loss", "DPOTrainer", math=math,
                     disable_gradient_checkpointing=nothing)
    leaf, _ = logps(a, a.lp, leaf=True)
    _, ref = logps(a, a.ref)
    mask = torch.cat([torch.zeros(B, 1), torch.tensor(a.mask)], dim=1)
    model = lambda **_: SimpleNamespace(
        log_probs=leaf * mask[:, 1:], entropy=torch.tensor(a.entropy), mean_logits=torch.zeros(B, T),
        is_top1=torch.zeros(B, T, dtype=torch.bool))
    trainer = SimpleNamespace(**{
        "model": SimpleNamespace(training=True), "accelerator": accelerator(), "aux_loss_enabled": False,
        "ld_alpha": None, "precompute_ref_logps": True, "f_divergence_type": "reverse_kl", "beta": 0.2,
        "f_alpha_divergence_coef": 1.0, "loss_types": ["sigmoid"], "loss_weights": [1.0], "label_smoothing": 0.0,
        "use_weighting": False, "_total_train_tokens": 0, "_tp_size": 1,
        "_metrics": defaultdict(lambda: defaultdict(list)), **settings})
    inputs = {"completion_mask": mask, "input_ids": torch.ones(B, T + 1, dtype=torch.long),
              "attention_mask": torch.ones(B, T + 1), "ref_chosen_logps": ref[:B // 2],
              "ref_rejected_logps": ref[B // 2:]}
    return loss(trainer, model, inputs, False), leaf, trainer._metrics["train"]


@pytest.mark.parametrize("divergence,coef", [
    ("reverse_kl", None), ("forward_kl", None), ("js_divergence", None), ("alpha_divergence", 0.6)])
def test_dpo_and_its_divergences(divergence, coef):
    """TRL's coefficient of the alpha divergence is 1 - alpha of the paper."""
    a = random_arrays()
    want, leaf, metrics = trl_dpo(a, f_divergence_type=divergence, f_alpha_divergence_coef=coef)
    settings = {"divergence": divergence.removesuffix("_divergence"), "alpha": 1 - coef if coef else 0.5, "beta": 0.2}
    tokens = as_pairs(a)
    compare(want, leaf, stacked(ours(tokens, [(1.0, lambda t: dpo(t, **settings))], sequence_mean)))
    mean = lambda x: float(aggregated(x, tokens, sequence_mean))
    assert np.isclose(mean(preference_accuracy(tokens)), metrics["rewards/accuracies"][0])
    assert np.isclose(0.2 * mean(preference_margin(tokens)), metrics["rewards/margins"][0], rtol=1e-5)


def test_conservative_dpo():
    """TRL's "robust" is another correction of the same noise; its two parts are cDPO's."""
    a, eps = random_arrays(), 0.1
    want, _, _ = trl_dpo(a, loss_types=["robust"], label_smoothing=eps)
    tokens = as_pairs(a)
    smooth, _ = ours(tokens, [(1.0, lambda t: dpo(t, beta=0.2, label_smoothing=eps))], sequence_mean)
    plain, _ = ours(tokens, [(1.0, lambda t: dpo(t, beta=0.2))], sequence_mean)
    flipped = (smooth - (1 - eps) * plain) / eps
    assert np.isclose(want.item(), ((1 - eps) * plain - eps * flipped) / (1 - 2 * eps), rtol=1e-5)


def test_ipo():
    a = random_arrays()
    want, leaf, _ = trl_dpo(a, loss_types=["ipo"])
    compare(want, leaf, stacked(ours(as_pairs(a), [(1.0, lambda t: ipo(t, beta=0.2))], sequence_mean)))


def trl_scores(file, name, cls, a, **settings):
    """A loss of mean log-probs of chosen and rejected sequences."""
    torch = pytest.importorskip("torch")
    mexp = published("trl/experimental/orpo/orpo_trainer.py", "log1mexp")
    loss = published(file, name, cls, log1mexp=mexp)
    leaf, sums = logps(a, a.lp, leaf=True)
    means = sums / torch.tensor(a.mask).sum(1)
    trainer = SimpleNamespace(accelerator=accelerator(), **settings)
    return loss(trainer, means[:B // 2], means[B // 2:])[0].mean(), leaf


@pytest.mark.parametrize("eps", [0.0, 0.1])
def test_simpo(eps):
    a = random_arrays()
    want, leaf = trl_scores("trl/experimental/cpo/cpo_trainer.py", "cpo_loss", "CPOTrainer", a, loss_type="simpo",
                            alpha=0.0, beta=2.0, simpo_gamma=1.0, label_smoothing=eps)
    compare(want, leaf, stacked(ours(as_pairs(a), [(1.0, lambda t: simpo(t, label_smoothing=eps))], sequence_mean)))


def test_orpo():
    """Theirs is beta log sigmoid, which their loss subtracts."""
    a = random_arrays()
    want, leaf = trl_scores("trl/experimental/orpo/orpo_trainer.py", "odds_ratio_loss", "ORPOTrainer", a, beta=0.3)
    compare(-want, leaf, stacked(ours(as_pairs(a), [(0.3, odds_ratio)], sequence_mean)))


def test_kto():
    torch = pytest.importorskip("torch")
    a = random_arrays()
    label = np.array([1, 0, 1, 1, 0, 0])
    loss = published("trl/trainer/kto_trainer.py", "_compute_loss", "KTOTrainer")
    leaf, _ = logps(a, a.lp, leaf=True)
    _, ref = logps(a, a.ref)
    mask = torch.cat([torch.zeros(B, 1), torch.tensor(a.mask)], dim=1)
    model = lambda **_: SimpleNamespace(log_probs=leaf * mask[:, 1:], entropy=torch.tensor(a.entropy),
                                        mean_logits=torch.zeros(B, T))
    kl_logps = torch.tensor([0.9, -0.3, 0.4, 0.2, 0.1, 0.5])
    trainer = SimpleNamespace(
        model=SimpleNamespace(training=True), accelerator=accelerator(), aux_loss_enabled=False, calculate_KL=True,
        precompute_ref_logps=True, loss_type="kto", beta=0.3, desirable_weight=1.2, undesirable_weight=0.7,
        _total_train_tokens=0, _tp_size=1, _metrics=defaultdict(lambda: defaultdict(list)),
        _compute_kl_logps=lambda *_: kl_logps)
    batch = {"completion_mask": mask, "input_ids": torch.ones(B, T + 1, dtype=torch.long), "ref_logps": ref,
             "attention_mask": torch.ones(B, T + 1), "label": torch.tensor(label), "ref_KL_logps": torch.zeros(B)}
    want = loss(trainer, model, batch, False)
    tokens = tokens_of(a, chosen=np.broadcast_to(label[:, None], (B, T)))
    mine = lambda t: kto(t, z0=float(kl_logps.mean()), beta=0.3, desirable=1.2, undesirable=0.7)
    compare(want, leaf, ours(tokens, [(1.0, mine)], sequence_mean))
