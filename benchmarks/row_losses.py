"""Every row loss, lifted, on each kind of target it can use: time and peak temporaries over plain lifted cross-entropy.

    python -m benchmarks.loss --row-losses --vocab 32000          # and the other options of benchmarks.loss
    python -m benchmarks.loss --row-losses --small

`topk` and `sampled` are measured against cross-entropy on tokens; `full` (a teacher beside the student, half as wide)
against cross-entropy beside a teacher whose logits are made and looked at once. Losses that sort are a table of their
own: on `full` they sort the vocabulary. The base is measured before and after a table, and the faster counts. Goals:
1.15x of the time, and 1.1x of the temporaries where a signal is read. Times are wall-clock; on a CPU they are the
process's processor seconds, in which what else runs on the machine counts less.
"""

import argparse
import json
import os
import platform
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.loss import head_of, inputs, measure
from distill_jax.core.batch import Sampled
from distill_jax.losses.rows.adaptive import adaptive_kl
from distill_jax.losses.rows.alpha_beta import alpha_beta
from distill_jax.losses.rows.cross_entropy import cross_entropy
from distill_jax.losses.rows.divergences import (
    forward_kl,
    generalized_jsd,
    reverse_kl,
    skew_forward_kl,
    skew_reverse_kl,
    total_variation,
)
from distill_jax.losses.rows.plackett_luce import plackett_luce
from distill_jax.losses.rows.taid import taid
from distill_jax.losses.rows.truncated import truncated_kl
from distill_jax.losses.targets import Full, Labels
from distill_jax.objective.chunks import RowTerm
from distill_jax.objective.lift import lift_sum

Array = Any

GOAL = (1.15, 1.1)  # of time and of temporaries
TARGETS = {"topk": "signals/topk", "sampled": "signals/sampled", "full": "teacher/main"}
LOSSES: dict[str, tuple[RowTerm, tuple[str, ...], bool]] = {  # name: (term, targets, whether it sorts)
    "cross_entropy": (RowTerm(loss=cross_entropy), ("topk", "sampled", "full"), False),
    "forward_kl": (RowTerm(loss=forward_kl), ("topk", "sampled", "full"), False),
    "reverse_kl": (RowTerm(loss=reverse_kl), ("topk", "full"), False),
    "generalized_jsd": (RowTerm(loss=generalized_jsd), ("topk", "full"), False),
    "skew_forward_kl": (RowTerm(loss=skew_forward_kl), ("topk", "full"), False),
    "skew_reverse_kl": (RowTerm(loss=skew_reverse_kl), ("topk", "full"), False),
    "total_variation": (RowTerm(loss=total_variation), ("topk", "full"), False),
    "alpha_beta": (RowTerm(loss=alpha_beta), ("topk", "full"), False),
    "taid": (RowTerm(loss=taid, dynamic={"t": jnp.float32(0.5)}), ("topk", "full"), False),
    "truncated_kl": (RowTerm(loss=truncated_kl), ("topk",), False),
    "forward_kl_tau2": (RowTerm(loss=forward_kl, kwargs={"temperature": 2.0, "temper": "student"}), ("topk", "full"),
                        False),
    "adaptive_kl": (RowTerm(loss=adaptive_kl), ("topk", "full"), True),
    "plackett_luce": (RowTerm(loss=plackett_luce), ("topk", "full"), True),
}


@dataclass(frozen=True)
class Data:
    """Student, teacher and signals of one configuration; `student` is differentiated."""

    student: tuple[Array, Array]  # hidden [B,T,D], kernel [V,D]
    teacher: tuple[Array, Array]
    weights: Array
    tokens: Array
    signals: dict[str, Any]


jax.tree_util.register_dataclass(Data, ["student", "teacher", "weights", "tokens", "signals"], [])


def beside_a_teacher(logits: Array, target: Full) -> Array:
    """Cross-entropy, and the teacher's logits made and read once: what any loss on a whole teacher costs at least."""
    return cross_entropy(logits, Labels(target.token)) + 0.0 * jnp.max(target.logits, axis=-1)


def make_data(args: argparse.Namespace) -> Data:
    hidden, kernel, weights, topk = inputs(args)
    rng = np.random.default_rng(1)
    width = max(8, args.width // 2)
    teacher = (jnp.asarray(rng.normal(size=(*hidden.shape[:2], width)), args.dtype),
               jnp.asarray(rng.standard_normal((args.vocab, width), np.float32) * (2 / width**0.5)))
    shares = jnp.exp(topk.logprobs)
    sampled = Sampled(ids=topk.ids, weights=shares / jnp.sum(shares, axis=-1, keepdims=True), mask=topk.mask)
    return Data((hidden, kernel), teacher, weights, topk.ids[..., 0], {"topk": topk, "sampled": sampled})


def total(hidden: Array, kernel: Array, data: Data, *, term: RowTerm, chunk: int) -> Array:
    sources = {"student/main": (hidden, head_of(kernel))}
    if term.target == "teacher/main":
        sources["teacher/main"] = (data.teacher[0], head_of(data.teacher[1]))
    signals = {n: s for n, s in data.signals.items() if term.target == f"signals/{n}"}
    return lift_sum(sources, {"it": term}, {"it": data.weights}, tokens=data.tokens, signals=signals,
                    trainable=("student/main",), chunk=chunk)[0]


def compare(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure and print; returns (and writes to `args.out`) one record for each loss and kind of target."""
    data = make_data(args)
    print(f"jax {jax.__version__} on {jax.devices()[0].device_kind}, {platform.machine()}, {os.cpu_count()} cores; "
          f"V={args.vocab} D={args.width} tokens={args.tokens} k={args.k} {args.dtype} chunk={args.chunk}", flush=True)
    cost = lambda term: measure(partial(total, term=term, chunk=args.chunk), (*data.student, data), args.repeats)[0]
    clock = "cpu_seconds" if jax.default_backend() == "cpu" else "seconds"
    records, baselines = [], {}
    for kind, target in TARGETS.items():
        chosen = {n: x for n, x in LOSSES.items() if kind in x[1] and n in (args.only or LOSSES)}
        if not chosen:
            continue
        plain = RowTerm(loss=beside_a_teacher, target=target) if kind == "full" else RowTerm(loss=cross_entropy)
        before = cost(plain)
        costs = {n: cost(RowTerm(loss=t.loss, target=target, kwargs=t.kwargs, dynamic=t.dynamic))
                 for n, (t, _, _) in chosen.items()}
        base = baselines[kind] = min(before, cost(plain), key=lambda x: x[clock])
        print(f"\n{kind}: {'cross-entropy beside a teacher' if kind == 'full' else 'cross-entropy on tokens'} takes "
              f"{base[clock]:.3f} s and {base['temp_gb']:.3f} GB of temporaries", flush=True)
        for name, (_, _, sorts) in sorted(chosen.items(), key=lambda x: x[1][2]):
            got = costs[name]
            time, memory = got[clock] / base[clock], got["temp_gb"] / base["temp_gb"]
            within = time <= GOAL[0] and (memory <= GOAL[1] or kind == "full")
            verdict = "sorts" if sorts else "ok" if within else "over"
            print(f"  {name:18s} {got[clock]:8.3f} s  {time:5.2f}x time  {memory:5.2f}x temporaries  {verdict}",
                  flush=True)
            records.append({"loss": name, "target": kind, "sorts": sorts, "time_ratio": time, "memory_ratio": memory,
                            **got})
    if args.out:
        with open(args.out, "w") as f:
            json.dump({"jax": jax.__version__, "device": jax.devices()[0].device_kind,
                       "config": {k: v for k, v in vars(args).items() if k not in ("out", "only", "target")},
                       "baselines": baselines,
                       "results": records}, f, indent=1)
    return records
