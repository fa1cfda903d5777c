"""The rounds of a stage on disk: which are still needed, and what was sampled and trained on in all of them.

A round is `rollouts/<update>/` (a trace store) and, with an estimator, `rollouts/<update>.npz` beside it.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from distill_jax.core.batch import Batch, Stream
from distill_jax.core.roles import SUPERVISED
from distill_jax.data.sources import BatchSource
from distill_jax.jobs.context import write_json
from distill_jax.train.checkpoint import checkpoints_of, complete_steps
from distill_jax.train.sources import provider_of
from distill_jax.train.step import StepConfig, with_views

COUNTS = "rollout_counts.json"


def drop_rounds(folder: Path, keep: int) -> list[int]:
    """Delete rounds of a stage's folder that are not among the newest `keep` (0: keep all) and that no checkpoint
    reads: those before the round that the oldest complete checkpoint was in. -> updates of the deleted ones.

    Without a complete checkpoint nothing is deleted. A deletion that was interrupted is finished by the next one.
    """
    steps = complete_steps(checkpoints_of(folder))
    rounds = folder / "rollouts"
    if not keep or not steps or not rounds.is_dir():
        return []
    for half in rounds.glob(".dropped-*"):
        shutil.rmtree(half)
    there = sorted(int(p.name) for p in rounds.iterdir() if p.name.isdigit())
    needed = max((r for r in there if r <= min(steps)), default=0)
    dropped = [r for r in there[:-keep] if r < needed]
    for number in dropped:
        name = f"{number:07d}"
        (rounds / f"{name}.npz").unlink(missing_ok=True)
        gone = (rounds / name).rename(rounds / f".dropped-{name}")  # at once no round any more
        shutil.rmtree(gone)
    return dropped


def batch_flops(config: StepConfig, batch: Batch, predicted: Callable[[Stream], Any]) -> float:
    """Model FLOPs of one update on a batch (NumPy); predicted: the tokens of a stream whose logits are read."""
    batch = with_views(config, batch)
    runs = [(config.flops[provider_of(s)], batch.views[s.split("/")[1]]) for s in config.runs]
    return sum(float(f.count(stream, predicted(stream))) for f, stream in runs)


def supervised(stream: Stream) -> np.ndarray:
    """bool [B,T]: what the student wrote."""
    return np.isin(stream.roles, [int(r) for r in SUPERVISED]) & (np.asarray(stream.weights) > 0)


def count_round(folder: Path, config: StepConfig, source: BatchSource, since: int, updates: int, sampled: int) -> None:
    """Note down what the round of update `since` sampled (tokens), and what each of its `updates` trains on."""
    counts = read_counts(folder)
    counts["sampled"][str(since)] = sampled
    for step in range(since, since + updates):
        batch = source.batch(step)
        counts["trained"][str(step)] = [int(supervised(batch.main).sum()), batch_flops(config, batch, supervised)]
    write_json(folder / COUNTS, counts)


def read_counts(folder: Path) -> dict[str, dict[str, Any]]:
    """{"sampled": {round: tokens}, "trained": {update: [tokens with a loss, FLOPs]}}; updates as text."""
    path = folder / COUNTS
    return json.loads(path.read_text()) if path.is_file() else {"sampled": {}, "trained": {}}


def spent(folder: Path, steps: int) -> dict[str, float]:
    """Of the first `steps` updates: "flops" of the updates alone (neither sampling nor estimates), the student's
    tokens they were trained on, and the tokens that were sampled for it."""
    counts = read_counts(folder)
    trained = [v for step, v in counts["trained"].items() if int(step) < steps]
    return {"flops": float(sum(f for _, f in trained)), "trained_tokens": sum(n for n, _ in trained),
            "sampled_tokens": sum(n for since, n in counts["sampled"].items() if int(since) < steps)}
