"""Accuracy by k and position, gaps, and paired-bootstrap intervals.

Bootstrap: questions are resampled with replacement (R times, seeded), the same ones for every model, so that a
difference between two models is paired. Intervals are percentiles (95% unless said otherwise).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from distill_jax.eval.records import Records

RESAMPLES = 10_000


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A value and its interval."""

    value: float
    low: float
    high: float

    def as_list(self) -> list[float]:
        return [round(float(x), 4) for x in (self.value, self.low, self.high)]


def resample(n: int, seed: int, resamples: int = RESAMPLES) -> np.ndarray:
    """float32 [R, n]: how often each of n questions is drawn in each resample."""
    rng = np.random.default_rng(seed)
    return rng.multinomial(n, np.full(n, 1 / n), size=resamples).astype(np.float32)


def interval(value: float, draws: np.ndarray, level: float = 0.95) -> Interval:
    """Percentile interval of bootstrap draws [R]."""
    low, high = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2])
    return Interval(value=float(value), low=float(low), high=float(high))


def matrix(records: Records) -> dict[Any, dict[Any, tuple[float, int]]]:
    """`{k: {position: (accuracy, questions)}}`."""
    out: dict[Any, dict[Any, tuple[float, int]]] = {}
    for k in records.values("k"):
        at_k = records.where(k=k)
        out[k] = {p: (float(at_k.where(position=p).correct().mean()), len(at_k.where(position=p)))
                  for p in at_k.values("position")}
    return out


def _position_means(records: Records, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Accuracy at each position [P], and its bootstrap draws [R, P]; questions are resampled within each position."""
    real, draws = [], []
    for i, position in enumerate(records.values("position")):
        c = records.where(position=position).correct()
        real.append(c.mean())
        draws.append(resample(len(c), seed + i) @ c / len(c))
    return np.array(real), np.stack(draws, -1)


def max_min_gap(means: np.ndarray) -> np.ndarray:
    """Best minus worst position: [.., P] -> [..]."""
    return means.max(-1) - means.min(-1)


def ends_minus_middle(means: np.ndarray) -> np.ndarray:
    """Mean of the first and last position minus mean of the middle third: [.., P] -> [..]. 0 for P < 3."""
    n = means.shape[-1]
    if n < 3:
        return np.zeros(means.shape[:-1])
    a = n // 3
    middle = means[..., a:n - a]
    return (means[..., 0] + means[..., -1]) / 2 - middle.mean(-1)


def position_gap(records: Records, seed: int = 0) -> dict[Any, dict[str, Interval]]:
    """`{k: {"max_min": Interval, "ends_minus_middle": Interval}}`.

    max_min is positive by noise alone when cells are small: its interval says how much that is.
    """
    out = {}
    for k in records.values("k"):
        at_k = records.where(k=k)
        if len(at_k.values("position")) < 2:
            continue
        real, draws = _position_means(at_k, seed)
        out[k] = {"max_min": interval(max_min_gap(real), max_min_gap(draws)),
                  "ends_minus_middle": interval(ends_minus_middle(real), ends_minus_middle(draws))}
    return out


def accuracy(records: Records, seed: int = 0) -> dict[Any, Interval]:
    """`{k: accuracy with interval}`."""
    out = {}
    for k in records.values("k"):
        c = records.where(k=k).correct()
        out[k] = interval(c.mean(), resample(len(c), seed) @ c / len(c))
    return out


def _paired(a: Records, b: Records, k: Any) -> np.ndarray:
    x, y = a.where(k=k), b.where(k=k)
    if [r.id for r in x.rows] != [r.id for r in y.rows]:
        raise ValueError(f"the two models were asked different questions at k={k}; a paired difference needs the same")
    return x.correct() - y.correct()


def difference(a: Records, b: Records, seed: int = 0) -> dict[Any, Interval]:
    """`{k: accuracy of a minus accuracy of b}`, paired over questions."""
    out = {}
    for k in a.values("k"):
        d = _paired(a, b, k)
        out[k] = interval(d.mean(), resample(len(d), seed) @ d / len(d))
    return out


def slope(a: Records, b: Records, seed: int = 0) -> Interval | None:
    """Slope of the difference a - b over log2 k (points per doubling of the documents); None with fewer than two k."""
    ks = [k for k in a.values("k") if k > 0]
    if len(ks) < 2:
        return None
    x = np.log2(np.array(ks, np.float64))
    x = (x - x.mean()) / ((x - x.mean()) ** 2).sum()
    real, draws = 0.0, np.zeros(RESAMPLES)
    for i, k in enumerate(ks):
        d = _paired(a, b, k)
        real += x[i] * d.mean()
        draws += x[i] * (resample(len(d), seed + i) @ d / len(d))
    return interval(real, draws)


def summary(records: Records, seed: int = 0) -> dict[str, Any]:
    """JSON value of one model's records."""
    gaps = position_gap(records, seed)
    acc = accuracy(records, seed)
    return {
        "questions": len(records),
        "accuracy": round(records.mean("correct"), 4),
        "mean_accuracy": {str(k): round(v.value, 4) for k, v in acc.items()},
        "accuracy_interval": {str(k): v.as_list() for k, v in acc.items()},
        "position_gap": {str(k): v["max_min"].as_list() for k, v in gaps.items()},
        "middle_gap": {str(k): v["ends_minus_middle"].as_list() for k, v in gaps.items()},
        "by_position": {str(k): {str(p): [round(x, 4), n] for p, (x, n) in row.items()}
                        for k, row in matrix(records).items()},
        "thinking_tokens": round(records.mean("thinking_tokens"), 2),
        "tokens": round(records.mean("tokens"), 2),
        "unterminated": round(records.mean("unterminated"), 4),
        "over_long": round(records.mean("over_long"), 4),
        "seconds_per_answer": round(records.mean("seconds"), 5),
    }


def compare(models: Mapping[str, Records], base: str, others: Sequence[str], seed: int = 0) -> dict[str, Any]:
    """`{other: {"difference": {k: [value, low, high]}, "slope_per_doubling": [...]}}`, others minus base."""
    out = {}
    for name in others:
        s = slope(models[name], models[base], seed)
        out[name] = {"difference": {str(k): v.as_list() for k, v in
                                    difference(models[name], models[base], seed).items()},
                     "slope_per_doubling": s.as_list() if s else None}
    return out
