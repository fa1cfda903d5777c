"""`distill-jax profile`: a few updates of a recipe under the profiler, and a table of where the step goes."""

import contextlib
import dataclasses
import itertools
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from distill_jax.core import spec
from distill_jax.core.batch import Batch
from distill_jax.data.sources import serve
from distill_jax.jobs.context import Echo, RunContext, Stopwatch, say, write_json
from distill_jax.jobs.train import Opened, open_stage
from distill_jax.models.lora import BASE
from distill_jax.recipe import Recipe, Stage
from distill_jax.sharding.hlo import instructions
from distill_jax.train.feed import Feed
from distill_jax.train.flops import memory_bytes, peak_flops
from distill_jax.train.profiling import PHASES, Profile, read_events, summarise
from distill_jax.train.step import lowerable, make_step

WARM = 2
"""Updates before the trace begins: the first runs of a program also fetch and allocate."""


@dataclass(frozen=True, kw_only=True)
class Measured:
    """A profile of `steps` updates. Seconds are of one update: `seconds` of wall time, `waiting` for its batch (not
    overlapped); `sampling` of the rollouts in front of the first one. `mfu`, `memory` (peak bytes): None where the
    device does not say."""

    profile: Profile
    steps: int
    seconds: float
    waiting: float
    tokens: float
    compiling: float
    sampling: float | None = None
    mfu: float | None = None
    memory: int | None = None


def stage_to_profile(recipe: Recipe, name: str | None) -> Stage:
    """The training stage of that name, the last one by default. Raises ValueError where there is none."""
    stages = {s.name: s for s in recipe.stages if isinstance(s, Stage)}
    if not stages or (name is not None and name not in stages):
        raise ValueError(f"recipe {recipe.name!r} has no training stage{f' {name!r}' if name else ''}; it has "
                         f"{sorted(stages) or 'none'}")
    return stages[name or list(stages)[-1]]


def profile_stage(recipe: Recipe, stage: Stage, folder: Path, steps: int, echo: Echo = say) -> Measured:
    """Run `WARM` and then `steps` updates of a stage, from the state of its update 0, and trace the latter.

    folder   gets trace/ (XProf, Perfetto), step.hlo.txt, profile.json; the run's own files are only read
    Raises ValueError for a stage that needs one which has not been run.
    """
    if steps < 1:
        raise ValueError(f"--steps must be at least 1, got {steps}")
    _check_made(recipe, stage)
    folder.mkdir(parents=True)
    context = RunContext(recipe=recipe, folder=folder, say=echo, watch=Stopwatch(folder / "time.json"))
    opened = open_stage(stage, context)
    closing = contextlib.closing(opened.steering) if opened.steering else contextlib.nullcontext()
    with jax.set_mesh(opened.config.mesh), closing:
        measured = _measure(opened, folder, steps, echo)
    write_json(folder / "profile.json", dataclasses.asdict(measured))
    return measured


def _check_made(recipe: Recipe, stage: Stage) -> None:
    """Raises ValueError where an earlier stage that this one names has not been run."""
    named = set(re.findall(r"stage:([\w\-.]+)", spec.dump(stage)))
    for other in recipe.stages:
        if other.name in named and not (recipe.stage_folder(other.name) / "done.json").is_file():
            raise ValueError(f"stage {stage.name!r} reads what stage {other.name!r} makes, which has not been run; "
                             "run `distill-jax train` on the recipe first, or profile another stage (--stage)")


def _measure(opened: Opened, folder: Path, steps: int, echo: Echo) -> Measured:
    config, state, frozen, source, sampling = opened.config, opened.state, opened.frozen, opened.source, None
    if opened.steering:
        began = time.perf_counter()
        bases = {name: base for name, base in frozen.items() if name.startswith(BASE)}
        steered = opened.steering.update(opened.steering.initial(), {**state.params, **bases}, 0)
        source, sampling = opened.steering.source(steered), time.perf_counter() - began
    served = Feed(source, config.mesh, 0, serve)
    batch = next(served)  # what was sampled is for the updates before the next rollouts: it stays
    feed: Iterator[Batch] = itertools.repeat(batch) if opened.steering else served
    began = time.perf_counter()
    step = lowerable(make_step(config, state)).lower(state, frozen, batch).compile()
    compiling = time.perf_counter() - began
    echo(f"compiled in {compiling:.1f} s; {WARM} updates, then {steps} under the profiler")
    state, batch, *_ = _run(step, state, frozen, batch, feed, WARM)
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0
    with jax.profiler.trace(folder / "trace", profiler_options=options):
        began = time.perf_counter()
        state, batch, waiting, metrics = _run(step, state, frozen, batch, feed, steps)
        seconds = (time.perf_counter() - began) / steps
    served.close()
    text = step.as_text()
    (folder / "step.hlo.txt").write_text(text)
    student = next(iter(config.optimizers))
    profile = summarise(read_events(folder / "trace", "jit_step"), instructions(text), student)
    peak, total = peak_flops(config.mesh.devices.flat[0]), {
        n: float(np.mean([float(m[n]) for m in metrics])) for n in ("tokens", "flops") if n in metrics[0]}
    mfu = total["flops"] / seconds / peak / config.mesh.size if peak and "flops" in total else None
    return Measured(profile=profile, steps=steps, seconds=seconds, waiting=waiting, tokens=total["tokens"],
                    compiling=compiling, sampling=sampling, mfu=mfu, memory=memory_bytes())


def _run(step: Any, state: Any, frozen: Any, batch: Batch, feed: Iterator[Batch], steps: int
         ) -> tuple[Any, Batch, float, list[Any]]:
    """-> (state, next batch, seconds an update waits for its batch, metrics of each update), all of it done."""
    waiting, found = 0.0, []
    for number in range(steps):
        with jax.profiler.StepTraceAnnotation("update", step_num=number):
            state, metrics = step(state, frozen, batch)
        began = time.perf_counter()
        batch = next(feed)
        made = time.perf_counter() - began
        began = time.perf_counter()
        jax.block_until_ready(metrics["loss"])
        waiting += made if time.perf_counter() - began < 1e-4 else 0.0  # the device was done before its next batch
        found.append(metrics)
    jax.block_until_ready(state)
    return state, batch, waiting / steps, found


def tables(measured: Measured, longest: int = 12) -> list[Any]:
    """Rich tables: parts by phase, and the longest instructions. Milliseconds of one device in one update."""
    from rich.table import Table

    p, ms = measured.profile, lambda seconds: f"{1e3 * seconds / measured.steps:.2f}"
    t = Table(title=summary(measured))
    for column in ("part", *PHASES, "ms", "share"):
        t.add_column(column, justify="left" if column == "part" else "right")
    for part, by_phase in p.parts().items():
        total = sum(by_phase.values())
        t.add_row(part, *(ms(by_phase[f]) if by_phase[f] else "" for f in PHASES), ms(total),
                  f"{total / p.seconds:.1%}")
    t.add_row("all", *(ms(sum(v[f] for v in p.parts().values())) for f in PHASES), ms(p.seconds), "100%", style="bold")
    ops = Table(title=f"the {min(longest, len(p.rows))} longest of {len(p.rows)} instructions")
    for column in ("instruction", "part", "phase", "times", "ms", "share"):
        ops.add_column(column, justify="right" if column in ("times", "ms", "share") else "left")
    for r in p.rows[:longest]:
        ops.add_row(r.name, r.part, r.phase, str(r.count // measured.steps), ms(r.seconds),
                    f"{r.seconds / p.seconds:.1%}")
    return [t, ops]


def summary(m: Measured) -> str:
    """One line: time, rate, and how much of the time the device had something to do."""
    said = [f"{1e3 * m.seconds:.1f} ms an update on {m.profile.devices} device{'s' * (m.profile.devices > 1)}",
            f"{m.tokens / m.seconds:,.0f} tokens/s", f"busy {m.profile.busy / m.steps / m.seconds:.0%}",
            f"waiting for data {m.waiting / m.seconds:.0%}"]
    said += [f"MFU {m.mfu:.1%}"] if m.mfu is not None else []
    said += [f"peak {m.memory / 2**30:.1f} GiB"] if m.memory is not None else []
    said += [f"rollouts before it {m.sampling:.1f} s"] if m.sampling is not None else []
    return ", ".join(said)
