"""From rewards of samples to advantages. NumPy; N samples, each with the number of its group (question) in `groups`.

Groups may have any sizes and stand in any order: everything goes by group number, nothing by reshape. A reward that is
NaN could not be given: that sample is left out of its group's statistics and has advantage 0.

`spread` makes one array a sample of them, as long as its trained tokens: what becomes the stream field `advantages`.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

Array = np.ndarray[Any, Any]


def minus(rewards: ArrayLike, baseline: ArrayLike = 0.0) -> Array:
    """R_i - baseline_i [N]: raw rewards, or minus a baseline from elsewhere (AdaptThink's reference pass rate)."""
    return _known(np.asarray(rewards, np.float64) - np.asarray(baseline, np.float64))


def raw(rewards: ArrayLike, groups: ArrayLike) -> Array:
    """R_i [N], no baseline: for rewards that are advantages already (AdaptThink's)."""
    return _known(_grouped(rewards, groups)[0])


def group_mean(rewards: ArrayLike, groups: ArrayLike) -> Array:
    """R_i - mean of its group [N]: Dr.GRPO (2503.20783), S-GRPO."""
    rewards, at = _grouped(rewards, groups)
    return _known(rewards - _means(rewards, at)[at])


def group_z(rewards: ArrayLike, groups: ArrayLike, *, ddof: int = 1, eps: float = 1e-6) -> Array:
    """(R_i - mean) / (std + eps) of its group [N]: GRPO (2402.03300). ddof=1 as in verl and TRL.

    Exactly 0 where the group has one member, or all its rewards are equal.
    """
    rewards, at = _grouped(rewards, groups)
    centred = rewards - _means(rewards, at)[at]
    count = _sums(~np.isnan(rewards), at)
    std = np.sqrt(_sums(np.nan_to_num(centred) ** 2, at) / np.maximum(count - ddof, 1))[at]
    return np.where(zero_variance(rewards, at), 0.0, _known(centred) / (std + eps))


def leave_one_out(rewards: ArrayLike, groups: ArrayLike) -> Array:
    """R_i - mean of the others of its group [N], 0 for a group of one: RLOO (Ahmadian et al. 2024, 2402.14740).

    G / (G - 1) times `group_mean`.
    """
    rewards, at = _grouped(rewards, groups)
    count = _sums(~np.isnan(rewards), at)[at]
    return np.where(count > 1, group_mean(rewards, at) * count / np.maximum(count - 1, 1), 0.0)


def batch_z(values: ArrayLike, *, ddof: int = 1, eps: float = 1e-8, over: ArrayLike | None = None) -> Array:
    """(x - mean) / (std + eps) over everything given, NaN left out: REINFORCE++ (2501.03262), whose x are the returns
    of all tokens of a batch. 0 where all are equal. over: bool, of which values mean and std are; None: of all."""
    values = np.asarray(values, np.float64)
    known = values[~np.isnan(values) & (True if over is None else np.asarray(over, bool))]
    if known.size <= ddof or np.ptp(known) == 0:
        return np.zeros_like(values)
    return _known((values - known.mean()) / (known.std(ddof=ddof) + eps))


def positive_only(rewards: ArrayLike, groups: ArrayLike | None = None) -> Array:
    """max(R_i, 0) [N], no baseline, so `groups` are not read: RAFT and RAFT++ (2504.11343) learn from accepted samples
    alone."""
    return np.maximum(_known(np.asarray(rewards, np.float64)), 0.0)


def spread(advantages: ArrayLike, lengths: Sequence[int]) -> list[Array]:
    """A sample's advantage at each of its tokens. Rows of one trace (chunks) get the advantage of the trace:
    `spread(advantages[trace_of_row], lengths)`."""
    advantages = np.asarray(advantages)
    if advantages.shape != (len(lengths),):
        raise ValueError(f"{len(lengths)} lengths need as many advantages, got shape {advantages.shape}")
    return [np.full(n, a, np.float32) for a, n in zip(advantages, lengths, strict=True)]


def token_rewards(reward: float, logprobs: ArrayLike, reference: ArrayLike | None = None, *,
                  beta: float = 0.0) -> Array:
    """1[last token] R - beta (log old(t) - log reference(t)) [T]: the KL in the reward (k1 of Schulman 2020)."""
    logprobs = np.asarray(logprobs, np.float64)
    out = np.zeros_like(logprobs) if reference is None else -beta * (logprobs - np.asarray(reference, np.float64))
    if out.size:
        out[-1] += reward
    return out


def penalised(rewards: ArrayLike, kls: ArrayLike, *, beta: float) -> Array:
    """R_i - beta KL_i [N], KL_i the sum over a sample's tokens of log old - log reference: the KL in the reward of a
    whole sample (RLOO)."""
    return np.asarray(rewards, np.float64) - beta * np.asarray(kls, np.float64)


def returns(rewards: ArrayLike, gamma: float = 1.0) -> Array:
    """sum_k gamma^k r(t + k) [T], the return to go."""
    return gae(rewards, None, gamma=gamma, lam=1.0)


def reinforce_plus_plus(rewards: Sequence[ArrayLike], *, gamma: float = 1.0, ddof: int = 1,
                        over: Sequence[bool] | None = None) -> list[Array]:
    """Returns to go of token rewards [T_i], normalised over all tokens of the batch, or of the samples `over` says:
    REINFORCE++ (2501.03262)."""
    to_go = [returns(r, gamma) for r in rewards]
    counted = None if over is None else np.repeat(over, [len(r) for r in to_go])
    flat = batch_z(np.concatenate([*to_go, np.zeros(0)]), ddof=ddof, over=counted).astype(np.float32)
    return np.split(flat, np.cumsum([len(r) for r in to_go])[:-1]) if to_go else []


def gae(rewards: ArrayLike, values: ArrayLike | None = None, *, gamma: float = 1.0, lam: float = 1.0) -> Array:
    """Generalised advantage estimates [T] of one finished episode (Schulman et al. 2016, 1506.02438, eq. 16).

    delta_t = r_t + gamma V(t+1) - V(t), A_t = delta_t + gamma lam A_{t+1}; V after the last token is 0. Without
    `values` V = 0: with lam = 1 the return to go. A critic's target is A + V.
    """
    rewards = np.asarray(rewards, np.float64)
    values = np.zeros_like(rewards) if values is None else np.asarray(values, np.float64)
    if values.shape != rewards.shape or rewards.ndim != 1:
        raise ValueError(f"gae needs one value a token: rewards {rewards.shape}, values {values.shape}, expected [T]")
    out, following, next_value = np.zeros_like(rewards), 0.0, 0.0
    for t in range(len(rewards) - 1, -1, -1):
        delta = rewards[t] + gamma * next_value - values[t]
        following = out[t] = delta + gamma * lam * following
        next_value = values[t]
    return out


def multi_gamma(channels: Mapping[str, ArrayLike], gammas: Mapping[str, float], values: ArrayLike | None = None, *,
                lam: float = 1.0) -> Array:
    """Advantages [T] of rewards that are each discounted by their own gamma (Demystifying Long CoT, 2502.03373).

    sum over channels of `gae(r, gamma)`, minus one critic's V(t). With several gammas one critic has no temporal
    difference, so values need lam = 1; a critic per channel is a sum of `gae`.
    """
    if missing := sorted(set(channels) ^ set(gammas)):
        raise ValueError(f"channels and gammas must have the same names; only one of them has {missing}")
    if values is not None and lam != 1.0:
        raise ValueError(f"one critic for several discounts needs lam=1, got {lam}")
    total = sum((gae(r, None, gamma=gammas[name], lam=lam) for name, r in channels.items()), start=np.zeros(()))
    return total if values is None else total - np.asarray(values, np.float64)


# Which samples are worth learning from.


def zero_variance(rewards: ArrayLike, groups: ArrayLike) -> Array:
    """bool [N]: whether all known rewards of the sample's group are equal (or there is one only), so that a group
    baseline leaves nothing to learn (DAPO's dynamic sampling draws others in their place)."""
    rewards, at = _grouped(rewards, groups)
    n = at.max(initial=-1) + 1
    high, low = np.full(n, -np.inf), np.full(n, np.inf)
    there = ~np.isnan(rewards)
    np.maximum.at(high, at[there], rewards[there])
    np.minimum.at(low, at[there], rewards[there])
    return (high <= low)[at]


def pass_rates(correct: ArrayLike, groups: ArrayLike) -> Array:
    """Mean correctness of each sample's group [N]; NaN (not checked) left out, NaN where nothing was."""
    correct, at = _grouped(correct, groups)
    return _means(correct, at)[at]


def in_window(correct: ArrayLike, groups: ArrayLike, *, low: float = 0.0, high: float = 1.0, inclusive: bool = True,
              ) -> Array:
    """bool [N]: whether the group's pass rate lies in [low, high], or with `inclusive=False` in (low, high)."""
    rate = pass_rates(correct, groups)
    return (rate >= low) & (rate <= high) if inclusive else (rate > low) & (rate < high)


def all_correct(correct: ArrayLike, groups: ArrayLike) -> Array:
    """bool [N]: whether every sample of the group is right (where brevity may be rewarded: ConciseR's second stage)."""
    return pass_rates(correct, groups) == 1.0


def _grouped(values: ArrayLike, groups: ArrayLike) -> tuple[Array, Array]:
    """values as float64 [N] and the groups' indices from 0. Raises ValueError where they do not fit."""
    values, groups = np.asarray(values, np.float64), np.asarray(groups)
    if values.shape != groups.shape or values.ndim != 1:
        raise ValueError(f"one group number a sample is needed: values {values.shape}, groups {groups.shape}")
    return values, np.unique(groups, return_inverse=True)[1].reshape(-1)


def _sums(values: Array, at: Array) -> Array:
    return np.bincount(at, weights=values, minlength=at.max(initial=-1) + 1)


def _means(values: Array, at: Array) -> Array:
    there = ~np.isnan(values)
    count = _sums(there, at)
    return np.where(count > 0, _sums(np.nan_to_num(values), at) / np.maximum(count, 1), np.nan)


def _known(values: Array) -> Array:
    return np.where(np.isnan(values), 0.0, values)
