"""Accuracy by k and position, gaps, and intervals by a paired bootstrap over questions.

A question shown at several positions, or to two models, is one unit: a resample draws it or leaves it out as a whole.
G questions, C cells (k, position), R resamples.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np

from distill_jax.eval.records import Records

RESAMPLES = 10_000
Cell = tuple[int, int]
"""(k, position); position -1 where items have none."""


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A value and its interval (95% unless said otherwise)."""

    value: float
    low: float
    high: float

    def as_list(self) -> list[float]:
        return [round(float(x), 4) for x in (self.value, self.low, self.high)]


def interval(value: float, draws: np.ndarray, level: float = 0.95) -> Interval:
    """Bias-corrected percentile interval of bootstrap draws [R] (Efron & Tibshirani 1993, section 14.3).

    A gap max - min is biased upward in every resample; the correction shifts the percentiles back by as much as the
    draws lie to one side of the value. Ties count half, so a constant statistic has no bias. The interval is widened
    to hold the value where the correction overshoots.
    """
    draws = draws[~np.isnan(draws)]
    if not len(draws) or np.isnan(value):
        return Interval(value=value, low=value, high=value)
    below = (np.mean(draws < value) + np.mean(draws <= value)) / 2
    z0 = NormalDist().inv_cdf(float(np.clip(below, 1 / (len(draws) + 1), 1 - 1 / (len(draws) + 1))))
    reach = NormalDist().inv_cdf(0.5 + level / 2)
    low, high = (float(np.quantile(draws, NormalDist().cdf(2 * z0 + side))) for side in (-reach, reach))
    return Interval(value=float(value), low=min(low, value), high=max(high, value))


@dataclass(frozen=True, kw_only=True)
class Grid:
    """Correctness by question and cell.

    cells   the columns, sorted
    groups  the question of each row
    values  float [G, C]: mean over the items that share question and cell, NaN where there is none
    """

    cells: tuple[Cell, ...]
    groups: tuple[str, ...]
    values: np.ndarray

    @property
    def ks(self) -> list[int]:
        return sorted({k for k, _ in self.cells})

    def columns(self, k: int) -> list[int]:
        return [i for i, (at, _) in enumerate(self.cells) if at == k]


def plain(records: Records) -> Records:
    """The rows with all their documents: without the closed-book and oracle settings."""
    kept = tuple(r for r in records.rows if r.axes.get("setting", "all") == "all")
    return dataclasses.replace(records, rows=kept)


def grid(records: Records) -> Grid:
    cell = lambda r: (int(r.axes.get("k") or 0), int(r.axes.get("position", -1)))
    groups = list(dict.fromkeys(r.group for r in records.rows))
    cells = sorted({cell(r) for r in records.rows})
    row, column = {g: i for i, g in enumerate(groups)}, {c: i for i, c in enumerate(cells)}
    total, count = np.zeros((len(groups), len(cells))), np.zeros((len(groups), len(cells)))
    for r in records.rows:
        at = row[r.group], column[cell(r)]
        total[at] += r.correct
        count[at] += 1
    values = np.divide(total, count, out=np.full_like(total, np.nan), where=count > 0)
    return Grid(cells=tuple(cells), groups=tuple(groups), values=values)


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """Means of the cells of a grid [C], and the same means of every resample [R, C]."""

    grid: Grid
    means: np.ndarray
    draws: np.ndarray

    def by_k(self, statistic: Callable[[np.ndarray], np.ndarray]) -> dict[int, Interval]:
        """A statistic over the positions of each k."""
        return {k: interval(float(statistic(self.means[c])), statistic(self.draws[:, c]))
                for k in self.grid.ks for c in [self.grid.columns(k)]}

    def by_cell(self) -> dict[Cell, Interval]:
        return {c: interval(float(self.means[i]), self.draws[:, i]) for i, c in enumerate(self.grid.cells)}


def estimate(g: Grid, seed: int = 0, resamples: int = RESAMPLES) -> Estimate:
    """Means with their bootstrap. The same seed and number of questions draw the same questions."""
    known = ~np.isnan(g.values)
    filled, known = np.where(known, g.values, 0.0).astype(np.float32), known.astype(np.float32)
    draws = []
    for counts in _drawn(len(g.groups), seed, resamples):
        total, n = counts @ filled, counts @ known
        draws.append(np.divide(total, n, out=np.full_like(total, np.nan), where=n > 0))
    return Estimate(grid=g, means=filled.sum(0) / known.sum(0), draws=np.concatenate(draws))


def _drawn(groups: int, seed: int, resamples: int, chunk: int = 1000) -> Iterator[np.ndarray]:
    """float32 [<=chunk, G]: how often each question is drawn in each resample."""
    rng = np.random.default_rng(seed)
    for start in range(0, resamples, chunk):
        rows = min(chunk, resamples - start)
        drawn = rng.integers(0, groups, size=(rows, groups)) + np.arange(rows)[:, None] * groups
        yield np.bincount(drawn.ravel(), minlength=rows * groups).reshape(rows, groups).astype(np.float32)


def mean_over_positions(means: np.ndarray) -> np.ndarray:
    """[..., P] -> [...]: every position counts the same."""
    return means.mean(axis=-1)


def max_min_gap(means: np.ndarray) -> np.ndarray:
    """[..., P] -> [...]: best minus worst position."""
    return means.max(axis=-1) - means.min(axis=-1)


def ends_minus_middle(means: np.ndarray) -> np.ndarray:
    """[..., P] -> [...]: mean of the first and the last position minus mean of all between; NaN with fewer than 3."""
    if means.shape[-1] < 3:
        return np.full(means.shape[:-1], np.nan)
    return means[..., [0, -1]].mean(axis=-1) - means[..., 1:-1].mean(axis=-1)


def matrix(records: Records) -> dict[int, dict[int, tuple[float, int]]]:
    """`{k: {position: (accuracy, questions)}}`."""
    g = grid(records)
    out: dict[int, dict[int, tuple[float, int]]] = {}
    for (k, position), column in zip(g.cells, g.values.T, strict=True):
        out.setdefault(k, {})[position] = float(np.nanmean(column)), int(np.sum(~np.isnan(column)))
    return out


def difference(distilled: Records, base: Records, seed: int = 0, resamples: int = RESAMPLES) -> Estimate:
    """Accuracy of the first minus that of the second, paired by question and cell.

    Raises ValueError when the two were not asked the same items.
    """
    ids = [{r.id for r in side.rows} for side in (base, distilled)]
    if ids[0] != ids[1]:
        odd = sorted(ids[0] ^ ids[1])[:3]
        raise ValueError(f"{base.model or 'base'} and {distilled.model or 'distilled'} were asked different questions, "
                         f"for example {odd}; a paired difference needs the same task, seed and k")
    order = {r.id: i for i, r in enumerate(base.rows)}
    rows = tuple(sorted(distilled.rows, key=lambda r: order[r.id]))
    a, b = grid(Records(rows=rows)), grid(base)
    return estimate(Grid(cells=a.cells, groups=a.groups, values=a.values - b.values), seed, resamples)


def slope_per_doubling(d: Estimate) -> Interval | None:
    """Least-squares slope of the mean over positions in log2 k; None with fewer than two k."""
    ks = [k for k in d.grid.ks if k > 0]
    if len(ks) < 2:
        return None
    x = np.log2(np.array(ks, np.float64))
    x = (x - x.mean()) / np.sum((x - x.mean()) ** 2)
    columns = [d.grid.columns(k) for k in ks]
    return interval(float(np.array([d.means[c].mean() for c in columns]) @ x),
                    np.stack([d.draws[:, c].mean(axis=1) for c in columns], axis=1) @ x)


def summary(records: Records, seed: int = 0, resamples: int = RESAMPLES) -> dict[str, Any]:
    """JSON value of one model's records. Keys of the tables are strings of k; positions count from 0."""
    rows = plain(records)
    e = estimate(grid(rows), seed, resamples)
    accuracy = e.by_k(mean_over_positions)
    several = [k for k in e.grid.ks if len(e.grid.columns(k)) > 1]
    gap, middle = e.by_k(max_min_gap), e.by_k(ends_minus_middle)
    return {
        "questions": len(e.grid.groups), "answers": len(rows),
        "accuracy": round(rows.mean("correct"), 4), "f1": round(rows.mean("f1"), 4),
        "mean_accuracy": {str(k): round(v.value, 4) for k, v in accuracy.items()},
        "accuracy_interval": {str(k): v.as_list() for k, v in accuracy.items()},
        "position_gap": {str(k): gap[k].as_list() for k in several},
        "middle_gap": {str(k): middle[k].as_list() for k in several if not np.isnan(middle[k].value)},
        "by_position": {str(k): {str(p): [round(x, 4), n] for p, (x, n) in row.items()}
                        for k, row in matrix(rows).items()},
        "by_axis": by_axis(rows),
        "oracle": _setting(records, "gold"), "closed_book": _setting(records, "none"),
        "thinking_tokens": round(rows.mean("thinking_tokens"), 2),
        "thinking_tokens_by_k": {str(k): round(rows.where(k=k).mean("thinking_tokens"), 2) for k in rows.values("k")},
        "tokens": round(rows.mean("tokens"), 2), "unterminated": round(rows.mean("unterminated"), 4),
        "over_long": round(rows.mean("over_long"), 4), "problems": sum(bool(r.problem) for r in rows.rows),
        "seconds_per_answer": round(rows.mean("seconds"), 5),
        **records.about,
    }


def by_axis(records: Records) -> dict[str, dict[str, float]]:
    """Accuracy by the other axes that vary: `layout`, `rule`, `gold_length`, ..."""
    axes = sorted({a for r in records.rows for a in r.axes} - {"k", "position", "setting"})
    return {a: {str(v): round(records.where(**{a: v}).mean("correct"), 4) for v in records.values(a)}
            for a in axes if len(records.values(a)) > 1}


def _setting(records: Records, setting: str) -> float | None:
    rows = records.where(setting=setting)
    return round(rows.mean("correct"), 4) if len(rows) else None


def compare(models: Mapping[str, Records], base: str, others: Sequence[str], seed: int = 0,
            resamples: int = RESAMPLES) -> dict[str, Any]:
    """`{other: {"difference": {k: [value, low, high]}, "slope_per_doubling": [...]}}`, each other minus base."""
    out = {}
    for name in others:
        d = difference(plain(models[name]), plain(models[base]), seed, resamples)
        slope = slope_per_doubling(d)
        out[name] = {"difference": {str(k): v.as_list() for k, v in d.by_k(mean_over_positions).items()},
                     "slope_per_doubling": slope.as_list() if slope else None}
    return out
