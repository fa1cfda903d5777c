"""Pictures of an evaluation, drawn without a display.

Every function takes `{model name: Estimate or Records}` in the order of the legend and returns a matplotlib Figure.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from distill_jax.eval.records import DOCUMENTS, Records
from distill_jax.eval.stats import Estimate, mean_over_positions, plain

COLOURS = ("#d1495b", "#00798c", "#edae49", "#6a4c93", "#66a182", "#2e4057")
INK, GRID = "#22252b", "#e3e5e8"
HEAT = LinearSegmentedColormap.from_list("accuracy", ["#fbe9e7", "#f4b183", "#8fbf9f", "#00798c", "#003d4a"])
DPI = 160


def position_curves(models: Mapping[str, Estimate], levels: Mapping[str, float] | None = None,
                    ks: Sequence[int] | None = None, unit: str = DOCUMENTS) -> Figure:
    """Accuracy over the position of the gold document (or what `unit` says), a panel for each k, 95% bands, `levels` as
    dashed lines."""
    first = next(iter(models.values())).grid
    shown = [k for k in (ks or first.ks) if len(first.columns(k)) > 1] or first.ks
    across = len(shown) if len(shown) <= 4 else 3
    down = -(-len(shown) // across)
    figure = Figure(figsize=(1.1 + 3.1 * across, 0.7 + 3.0 * down), layout="constrained")
    axes = figure.subplots(down, across, sharey=True, squeeze=False).ravel()
    for panel in axes[len(shown):]:
        panel.set_visible(False)
    for panel, k in zip(axes, shown, strict=False):
        _style(panel)
        panel.set_title(f"{k} {unit}", fontsize=11, color=INK, loc="left", weight="bold")
        for colour, (name, e) in _coloured(models):
            cells = e.by_cell()
            at = [p for kk, p in e.grid.cells if kk == k]
            mid, low, high = np.array([[cells[k, p].value, cells[k, p].low, cells[k, p].high] for p in at]).T
            x = np.array(at) + 1
            panel.fill_between(x, low, high, color=colour, alpha=0.16, linewidth=0)
            panel.plot(x, mid, color=colour, marker="o", markersize=4.5, linewidth=2, label=name, clip_on=False)
        _levels(panel, levels)
        panel.set_xlim(0.7, k + 0.3)
        panel.set_xticks(sorted({p + 1 for kk, p in first.cells if kk == k}))
    for panel in axes[::across]:
        panel.set_ylabel("accuracy")
    figure.supxlabel(f"place of the {unit.removesuffix('s')} that holds the answer", fontsize=10, color=INK)
    _legend(figure, axes[0])
    return figure


def accuracy_by_k(models: Mapping[str, Estimate], levels: Mapping[str, float] | None = None,
                  trained_k: int | None = None, unit: str = DOCUMENTS) -> Figure:
    """Mean accuracy over the number k of documents (or other unit), with bands; what lies beyond training is shaded."""
    figure = Figure(figsize=(6.2, 4.0), layout="constrained")
    panel = figure.subplots()
    _style(panel)
    ks = sorted({k for e in models.values() for k in e.grid.ks})
    panel.set_xscale("log", base=2)
    if trained_k is not None and ks[-1] > trained_k:
        start = float(np.sqrt(trained_k * next(k for k in ks if k > trained_k)))
        panel.axvspan(start, ks[-1] * 1.12, color="#f2f3f5", zorder=0)
        panel.text(ks[-1] * 1.12, 1.03, "beyond training", ha="right", va="bottom", fontsize=8.5, color="#7a7f87")
    for colour, (name, e) in _coloured(models):
        mean = e.by_k(mean_over_positions)
        mid, low, high = np.array([[v.value, v.low, v.high] for v in mean.values()]).T
        panel.fill_between(list(mean), low, high, color=colour, alpha=0.16, linewidth=0)
        panel.plot(list(mean), mid, color=colour, marker="o", markersize=5, linewidth=2, label=name)
    _levels(panel, levels)
    panel.set_xticks(ks, [str(k) for k in ks])
    panel.minorticks_off()
    panel.set_xlim(ks[0] / 1.12, ks[-1] * 1.12)
    panel.set_xlabel(f"{unit} in the prompt")
    panel.set_ylabel("accuracy, mean over positions")
    _legend(figure, panel)
    return figure


def heat_map(models: Mapping[str, Estimate], unit: str = DOCUMENTS) -> Figure:
    """Accuracy of each model by k and position. A row of cells spans the context, from its start to its end."""
    ks = sorted({k for e in models.values() for k in e.grid.ks})
    figure = Figure(figsize=(0.8 + 3.6 * len(models), 1.5 + 0.55 * len(ks)), layout="constrained")
    axes = figure.subplots(1, len(models), squeeze=False)[0]
    for panel, (name, e) in zip(axes, models.items(), strict=True):
        for row, k in enumerate(ks):
            columns = e.grid.columns(k)
            for i, c in enumerate(columns):
                value, width = float(e.means[c]), 1 / len(columns)
                panel.add_patch(Rectangle((i * width, row), width, 1, facecolor=HEAT(value), edgecolor="white", lw=2))
                dark = value > 0.6
                panel.text((i + 0.5) * width, row + 0.5, f"{100 * value:.0f}", ha="center", va="center", fontsize=9,
                           color="white" if dark else INK)
        panel.set_xlim(0, 1)
        panel.set_ylim(len(ks), 0)
        panel.set_yticks(np.arange(len(ks)) + 0.5, [str(k) for k in ks])
        panel.set_xticks([0, 0.5, 1], ["start", "middle", "end"])
        panel.tick_params(length=0, labelsize=9, colors=INK)
        panel.set_title(name, fontsize=11, color=INK, loc="left", weight="bold")
        for side in panel.spines.values():
            side.set_visible(False)
    axes[0].set_ylabel(unit, color=INK)
    figure.supxlabel(f"place of the {unit.removesuffix('s')} that holds the answer · cells are accuracy in %",
                     fontsize=9, color=INK)
    return figure


def accuracy_against_tokens(models: Mapping[str, Records]) -> Figure:
    """What accuracy costs: mean tokens written against accuracy, one point for each k."""
    figure = Figure(figsize=(6.2, 4.0), layout="constrained")
    panel = figure.subplots()
    _style(panel)
    records = next(iter(models.values()))
    for colour, (name, records) in _coloured(models):
        rows = plain(records)
        ks = rows.values("k") or [None]
        parts = [rows if k is None else rows.where(k=k) for k in ks]
        x, y = [p.mean("tokens") for p in parts], [p.mean("correct") for p in parts]
        panel.plot(x, y, color=colour, linewidth=1.2, alpha=0.6)
        panel.scatter(x, y, color=colour, s=190, zorder=3, label=name, edgecolor="white", linewidth=1, clip_on=False)
        for k, a, b in zip(ks, x, y, strict=True):
            panel.annotate("" if k is None else str(k), (a, b), ha="center", va="center_baseline", fontsize=7.5,
                           color="white", weight="bold", zorder=4, annotation_clip=False)
    panel.set_xlabel(f"tokens written for an answer (in the marks: {records.unit})" if records.values("k") else
                     "tokens written for an answer")
    panel.set_ylabel("accuracy")
    panel.set_xlim(left=0)
    _legend(figure, panel)
    return figure


def save(figure: Figure, path: Path) -> Path:
    FigureCanvasAgg(figure)
    figure.savefig(path, dpi=DPI, facecolor="white")
    return path


def _coloured(models: Mapping[str, Any]) -> list[tuple[str, tuple[str, Any]]]:
    return [(COLOURS[i % len(COLOURS)], item) for i, item in enumerate(models.items())]


def _style(panel: Any) -> None:
    panel.set_ylim(0, 1.02)
    panel.set_yticks(np.linspace(0, 1, 6), [f"{p}%" for p in range(0, 101, 20)])
    panel.grid(axis="y", color=GRID, linewidth=0.8)
    panel.set_axisbelow(True)
    panel.tick_params(length=0, labelsize=9, colors=INK)
    panel.xaxis.label.set_color(INK)
    panel.yaxis.label.set_color(INK)
    for side in ("top", "right", "left"):
        panel.spines[side].set_visible(False)
    panel.spines["bottom"].set_color("#b8bcc2")


def _levels(panel: Any, levels: Mapping[str, float] | None) -> None:
    for name, value in (levels or {}).items():
        panel.axhline(value, color="#8a8f98", linewidth=1, linestyle=(0, (4, 3)), zorder=1)
        panel.text(0.995, value + 0.012, name, transform=panel.get_yaxis_transform(), ha="right", va="bottom",
                   fontsize=8, color="#7a7f87")


def _legend(figure: Figure, panel: Any) -> None:
    handles, labels = panel.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper left", ncols=min(4, len(labels)), frameon=False, fontsize=9.5,
                  labelcolor=INK)
