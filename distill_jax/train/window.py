"""Metrics of the steps from report to report, as plain numbers: sums and counts are added first, divided last."""

import time
from typing import Any

import jax
import numpy as np

from distill_jax.core.roles import Role
from distill_jax.train.flops import memory_bytes, peak_flops
from distill_jax.train.step import Metrics


class Window:
    """Collects steps and their time; `device` and `count` are what the MFU is measured against."""

    def __init__(self, device: Any, count: int) -> None:
        peak = peak_flops(device)
        self._peak = None if peak is None else peak * count
        self._steps: list[Metrics] = []
        self._timed = 0
        self._skipped = 0
        self.restart_clock()

    def restart_clock(self) -> None:
        """What happened until now does not count as training time."""
        self._mark, self._timed = time.perf_counter(), len(self._steps)

    def pause(self, seconds: float) -> None:
        """An evaluation took so long: not training time."""
        self._mark += seconds

    def add(self, metrics: Metrics) -> None:
        """Metrics of the next step, still on the device."""
        self._steps.append(metrics)

    def __len__(self) -> int:
        return len(self._steps)

    def close(self) -> tuple[dict[str, float], list[bool]]:
        """-> (the window's numbers, whether each step was finite); empties the window. Reads from the device."""
        steps: list[Metrics] = jax.device_get(self._steps)
        seconds = time.perf_counter() - self._mark
        good = [s for s in steps if s["ok"]]
        ok = [bool(s["ok"]) for s in steps]
        self._skipped += len(steps) - len(good)
        out = {"loss": _mean([float(s["loss"]) for s in good]), **_terms([s["terms"] for s in good]),
               "grad_norm": _mean([float(s["grad_norm"]) for s in good]), "skipped": float(self._skipped)}
        out |= {f"lr/{name}" if len(steps[-1]["lr"]) > 1 else "lr": float(v) for name, v in steps[-1]["lr"].items()}
        for name in steps[-1]["retained"]:
            sums = np.sum([[float(x) for x in s["retained"][name]] for s in steps], axis=0)
            out["retained" if len(steps[-1]["retained"]) == 1 else f"retained/{name}"] = _ratio(*sums)
        for name, loads in steps[-1]["experts"].items():
            of = name if len(steps[-1]["experts"]) > 1 else ""
            out |= {f"experts/{of and of + '/'}{what}": _mean([float(s["experts"][name][what]) for s in steps])
                    for what in loads}
        timed = steps[self._timed:]
        if timed:
            out["tokens_per_second"] = sum(int(s["tokens"]) for s in timed) / seconds
            out["seconds_per_step"] = seconds / len(timed)
            if self._peak and "flops" in timed[-1]:
                out["mfu"] = sum(float(s["flops"]) for s in timed) / seconds / self._peak
        count = lambda name: sum(int(s[name]) for s in steps)
        out["supervised_share"] = _ratio(count("supervised"), count("tokens"))
        if (peak := memory_bytes()) is not None:
            out["memory_gib"] = peak / 2**30
        self._steps = []
        self.restart_clock()
        return out, ok


def _terms(steps: list[dict[str, Any]]) -> dict[str, float]:
    """{"kd": mean over all roles, "kd/think": ...} of {term: RoleSums} a step; roles never seen are left out."""
    out: dict[str, float] = {}
    for name in steps[0] if steps else ():
        total: Any = np.sum([s[name].sum for s in steps], axis=0, dtype=np.float64)
        count: Any = np.sum([s[name].count for s in steps], axis=0, dtype=np.float64)
        out[name] = _ratio(total.sum(), count.sum())
        out |= {f"{name}/{r.name.lower()}": total[r] / count[r] for r in Role if count[r] > 0}
    return out


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else float("nan")


def _ratio(total: float, count: float) -> float:
    return float(total / count) if count else 0.0
