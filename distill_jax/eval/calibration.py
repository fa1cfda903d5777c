"""Calibration: how far confidence is from accuracy, and the re-calibration of a top-k teacher (FIRST, 2408.12168).

Shapes: N tokens, K kept outcomes, most probable first. NumPy.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

Array = np.ndarray


def expected_calibration_error(confidence: Array, correct: Array, bins: int = 15) -> float:
    """sum_b n_b / N |accuracy_b - confidence_b| over equal bins (i/bins, (i+1)/bins] of confidence.

    confidence [N] in [0, 1], correct bool [N]. Guo et al. 2017 (1706.04599), eq. 3. Raises ValueError without tokens
    and for a confidence outside [0, 1].
    """
    confidence, correct = np.asarray(confidence, np.float64), np.asarray(correct, np.float64)
    if not len(confidence) or confidence.shape != correct.shape:
        raise ValueError(f"calibration needs as many confidences as outcomes, and at least one; got {confidence.shape} "
                         f"and {correct.shape}")
    if not (confidence.min() >= 0 and confidence.max() <= 1 + 1e-6):  # NaN fails as well
        raise ValueError(f"a confidence is a probability; got values from {confidence.min()} to {confidence.max()}")
    which = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)
    gap = np.bincount(which, correct, bins) - np.bincount(which, confidence, bins)
    return float(np.abs(gap).sum() / len(confidence))


def temper(logprobs: Array, temperature: float) -> Array:
    """log of p^(1/T) / sum over the K outcomes. logprobs [N,K], -inf where absent -> [N,K]; T = 1 only renormalises."""
    if temperature <= 0:
        raise ValueError(f"a temperature must be positive, got {temperature}")
    return _normalised(np.asarray(logprobs, np.float64) / temperature)


def smooth(logprobs: Array, delta: float) -> Array:
    """Log-probabilities renormalised over K, then `delta` of the first one's mass spread evenly over the others.

    Less is moved where the first would fall below 1/K. The authors' code subtracts from log values; this is the
    method of the text.
    """
    if delta < 0:
        raise ValueError(f"delta must not be negative, got {delta}")
    p = np.exp(_normalised(np.asarray(logprobs, np.float64)))
    there = np.isfinite(logprobs)
    count = np.maximum(there.sum(-1), 1)
    moved = np.clip(p[:, 0] - 1 / count, 0.0, delta)
    out = p + np.where(there, (moved / np.maximum(count - 1, 1))[:, None], 0.0)
    out[:, 0] = p[:, 0] - moved
    with np.errstate(divide="ignore"):
        return np.log(out)


def _normalised(x: Array) -> Array:
    """x - logsumexp(x) where x is finite; -inf elsewhere, in rows without any outcome too."""
    there = np.isfinite(x)
    top = np.max(np.where(there, x, -np.inf), axis=-1, keepdims=True, initial=-np.inf)
    top = np.where(np.isfinite(top), top, 0.0)
    total = np.exp(np.where(there, x - top, -np.inf)).sum(-1, keepdims=True)
    return np.where(there, x, -np.inf) - (top + np.log(np.where(total > 0, total, 1.0)))


@dataclass(frozen=True, kw_only=True)
class Way:
    """A family of re-calibrations: apply(logprobs [N,K], value) -> [N,K]; identity: the value that changes nothing."""

    apply: Callable[[Array, float], Array]
    identity: float


WAYS: Mapping[str, Way] = {"temperature": Way(apply=temper, identity=1.0), "smoothing": Way(apply=smooth, identity=0.0)}


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """value: the one of the grid with the least error; errors: {value: ECE}, with the identity among them."""

    value: float
    errors: Mapping[float, float]


def search(way: Way, logprobs: Array, correct: Array, grid: Sequence[float], bins: int = 15) -> Calibration:
    """The value of the grid with the least calibration error of the most probable outcome; of equals the mildest.

    logprobs [N,K] of held-out tokens, correct bool [N]: whether the first outcome is the token that stands there.
    """
    values = sorted({way.identity, *grid}, key=lambda v: abs(v - way.identity))
    errors = {v: expected_calibration_error(np.exp(way.apply(logprobs, v)[:, 0]), correct, bins) for v in values}
    return Calibration(value=min(values, key=lambda v: errors[v]), errors=errors)
