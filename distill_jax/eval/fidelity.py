"""What a stored teacher signal is worth: how near training on it comes to training on the whole distribution.

Shapes: N tokens, V vocabulary, F features. With q the student, p the whole teacher and r what the signal lets one know
of it, the gradient of forward KL with respect to the student's logits is q - p with the whole teacher and q - r with
the signal. r is

    top-k and tail   p on the kept ids; on the others the tail's mass, spread like the student's own there
    renormalised     p on the kept ids, divided by their sum: what dropping the tail amounts to
    sampled          the weights of the draws
    hidden           the distribution that the stored states and head give

Angles and norm ratios are of gradients over all tokens measured: `logits`, the gradients of every token's logits one
after the other, in which the noise of draws does not average out; `head`, the sum over tokens of gradient x hidden
state, the gradient of the student's output matrix, in which it does (of a wide student through a fixed random
projection to `FEATURES` numbers, which keeps inner products on average).
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

from distill_jax.eval import plots
from distill_jax.losses.rows.outcomes import outcomes
from distill_jax.losses.targets import Full, SampledTarget, Target, TopKTarget

Array = Any
FEATURES = 64
BINS = 15
"""Of confidence, for the expected calibration error."""


def known(logits: Array, target: Target, renormalised: bool = False) -> Array:
    """r [N,V]: what a student with these logits float32 [N,V] learns of its teacher from a target."""
    if isinstance(target, Full):
        return jnp.exp(outcomes(logits, target)[1])
    row = jnp.arange(logits.shape[0])[:, None]
    assert isinstance(target, TopKTarget | SampledTarget)
    slots = jnp.where(target.ids >= 0, target.ids, logits.shape[-1])  # out of range: dropped
    spread = lambda values: jnp.zeros_like(logits).at[row, slots].set(values, mode="drop")
    if isinstance(target, SampledTarget):
        return spread(target.weights)
    kept = spread(jnp.exp(target.logprobs))
    if renormalised:
        return kept / jnp.maximum(jnp.sum(kept, axis=-1, keepdims=True), 1e-30)
    tail = jnp.clip(1.0 - jnp.sum(kept, axis=-1, keepdims=True), 0.0, 1.0)
    others = jnp.where(spread(jnp.ones_like(target.logprobs)) > 0, 0.0, jax.nn.softmax(logits, axis=-1))
    return kept + tail * others / jnp.maximum(jnp.sum(others, axis=-1, keepdims=True), 1e-30)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Sums:
    """Sums over tokens for one signal: of the gradients' products, of distances, and per bin of confidence."""

    dot: Array
    square: Array
    head: Array
    tv: Array
    kl: Array
    count: Array
    confidence: Array
    hits: Array


@partial(jax.jit, static_argnames="renormalised")
def sums(teacher: Array, student: Array, features: Array, tokens: Array, valid: Array, target: Target,
         renormalised: bool = False) -> Sums:
    """One chunk of tokens and one signal. teacher, student float32 logits [N,V]; features [N,F] what the student's
    head multiplies; tokens i32 [N] that stand there; valid bool [N]. The whole teacher is the target `Full(teacher)`.
    """
    weight = valid.astype(jnp.float32)
    p, q, r = jax.nn.softmax(teacher, -1), jax.nn.softmax(student, -1), known(student, target, renormalised)
    given, whole = (q - r) * weight[:, None], (q - p) * weight[:, None]
    missing = jnp.any((r == 0) & (p > 0), axis=-1)
    kl = jnp.sum(jnp.where((p > 0) & (r > 0), p * (jnp.log(jnp.maximum(p, 1e-37)) - jnp.log(jnp.maximum(r, 1e-37))), 0),
                 axis=-1)
    top = jnp.max(r, axis=-1)
    bin_ = jnp.clip((top * BINS).astype(jnp.int32), 0, BINS - 1)
    into = lambda x: jnp.zeros(BINS, jnp.float32).at[bin_].add(x * weight)
    return Sums(dot=jnp.sum(given * whole), square=jnp.sum(given * given), head=given.T @ features,
                tv=jnp.sum(weight * 0.5 * jnp.sum(jnp.abs(p - r), axis=-1)),
                kl=jnp.sum(jnp.where(valid, jnp.where(missing, jnp.inf, kl), 0.0)), count=into(jnp.ones_like(weight)),
                confidence=into(top), hits=into((jnp.argmax(r, axis=-1) == tokens).astype(jnp.float32)))


def projection(width: int) -> np.ndarray:
    """float32 [width, F]: the identity for a student no wider than `FEATURES`, else random signs over sqrt(F)."""
    if width <= FEATURES:
        return np.eye(width, dtype=np.float32)
    signs = np.random.default_rng(0).integers(0, 2, (width, FEATURES)) * 2 - 1
    return (signs / np.sqrt(FEATURES)).astype(np.float32)


@dataclass(kw_only=True)
class Fidelity:
    """Sums of several signals over all chunks. `add` them, then `report`.

    bytes  {signal: bytes/token on disk}; a name that ends in `RENORMALISED` costs what the one before it does
    """

    bytes: Mapping[str, float]
    about: Mapping[str, Any] = field(default_factory=dict)
    total: dict[str, Sums] = field(default_factory=dict)

    def add(self, teacher: Array, student: Array, features: Array, tokens: Array, valid: Array,
            targets: Mapping[str, Target]) -> None:
        """A chunk of tokens; the arguments are those of `sums`, `targets` what each signal says."""
        step = partial(sums, teacher, student, features, tokens, valid)
        made = {WHOLE: step(Full(teacher))} | {name: step(t) for name, t in targets.items()}
        made |= {name + RENORMALISED: step(t, renormalised=True) for name, t in targets.items()
                 if isinstance(t, TopKTarget) and t.ids.shape[-1] > 1}
        for name, part in made.items():
            part = jax.tree.map(lambda x: np.asarray(x, np.float64), jax.device_get(part))
            self.total[name] = part if name not in self.total else jax.tree.map(np.add, self.total[name], part)

    def report(self) -> dict[str, Any]:
        """{"signals": {name: measures}, ...}: kl and tv to the teacher (nats and 0 to 1, means over tokens; kl None
        where the signal leaves ids without mass), angle_logits, angle_head (degrees), norm_logits, norm_head (ratio to
        the whole teacher's gradient), ece, bytes_per_token."""
        if WHOLE not in self.total:
            raise ValueError("no token was measured: the held-out rows have no token that all signals speak of")
        whole = self.total[WHOLE]
        tokens = whole.count.sum()
        return {**self.about, "tokens": int(tokens), "signals": {
            name: self._measures(name, s, whole, tokens) for name, s in self.total.items()}}

    def _measures(self, name: str, s: Sums, whole: Sums, tokens: float) -> dict[str, float | None]:
        # The whole teacher's own dot is |q - p|^2, and every signal's dot is with q - p.
        norm = np.sqrt(whole.square)
        head, given = np.linalg.norm(whole.head), np.linalg.norm(s.head)
        angle = lambda cosine: float(np.degrees(np.arccos(np.clip(cosine, -1, 1))))
        gap = np.abs(s.confidence - s.hits).sum() / tokens
        size = self.bytes.get(name.removesuffix(RENORMALISED))
        return {"bytes_per_token": size, "angle_logits": angle(s.dot / (norm * np.sqrt(s.square))),
                "angle_head": angle((s.head * whole.head).sum() / (head * given)),
                "norm_logits": float(np.sqrt(s.square) / norm), "norm_head": float(given / head),
                "tv": float(s.tv / tokens), "kl": float(s.kl / tokens) if np.isfinite(s.kl) else None,
                "ece": float(gap)}


WHOLE = "whole teacher"
RENORMALISED = ", renormalised"


def table(report: Mapping[str, Any]) -> str:
    """The measures as a Markdown table, cheapest signal first."""
    columns = {"bytes_per_token": ("bytes/token", ".1f"), "angle_head": ("angle, head", ".2f"),
               "angle_logits": ("angle, logits", ".2f"), "norm_head": ("norm, head", ".3f"),
               "norm_logits": ("norm, logits", ".3f"), "kl": ("KL to teacher", ".4f"), "tv": ("TV", ".4f"),
               "ece": ("ECE", ".4f")}
    show = lambda value, form: "-" if value is None else format(value, form)
    lines = ["| signal | " + " | ".join(title for title, _ in columns.values()) + " |", "|---" * 9 + "|"]
    for name, m in sorted(report["signals"].items(), key=lambda x: (x[1]["bytes_per_token"] or 0.0, x[0])):
        lines.append(f"| {name} | " + " | ".join(show(m[c], form) for c, (_, form) in columns.items()) + " |")
    return "\n".join(lines) + "\n"


def figure(report: Mapping[str, Any]) -> Figure:
    """Angle of the head's gradient against bytes a token, both logarithmic; one line for each kind of signal."""
    out = Figure(figsize=(6.4, 4.4), layout="constrained")
    panel = out.subplots()
    kinds: dict[str, list[tuple[float, float, str]]] = {}
    for name, m in report["signals"].items():
        if m["bytes_per_token"]:
            kind = name.removesuffix(RENORMALISED).rstrip("0123456789.-%") + (
                RENORMALISED if name.endswith(RENORMALISED) else "")
            kinds.setdefault(kind, []).append((m["bytes_per_token"], max(m["angle_head"], 1e-2), name))
    for colour, (kind, points) in zip(plots.COLOURS * 3, kinds.items()):
        x, y, names = zip(*sorted(points))
        panel.plot(x, y, marker="o", markersize=5, linewidth=2, color=colour, label=kind)
        for at in zip(x, y, names) if RENORMALISED not in kind else ():
            panel.annotate(at[2], at[:2], xytext=(4, 5), textcoords="offset points", fontsize=7, color=plots.INK)
    panel.axhline(5, color=plots.INK, linewidth=0.8, linestyle="--")
    panel.axvline(40, color=plots.INK, linewidth=0.8, linestyle="--")
    panel.set(xscale="log", yscale="log", xlabel="bytes a token", ylabel="angle of the head's gradient, degrees")
    panel.grid(True, color=plots.GRID, which="both", linewidth=0.6)
    panel.legend(frameon=False, fontsize=8)
    return out


def write(report: Mapping[str, Any], folder: Path) -> list[Path]:
    """fidelity.json, fidelity.md and fidelity.png."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"fidelity.{kind}" for kind in ("json", "md", "png")]
    paths[0].write_text(json.dumps(report, indent=1) + "\n")
    paths[1].write_text(table(report))
    plots.save(figure(report), paths[2])
    return paths
