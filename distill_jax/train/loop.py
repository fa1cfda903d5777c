"""The training loop of one stage: resume, step, report, save, stop.

The host runs at most AHEAD steps in front of the device and never waits for the step it just started: numbers are
read when they have long been there. A run that is killed anywhere and started again ends with the same bits.
"""

import contextlib
import dataclasses
import math
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from distill_jax.core import tree
from distill_jax.core.batch import Batch
from distill_jax.models.lora import BASE
from distill_jax.train import peers
from distill_jax.train.checkpoint import Checkpoints, checkpoints_of
from distill_jax.train.feed import BatchSource, Feed, Serve, place_global, serve_plain
from distill_jax.train.lost_rows import Damaged, LostRows
from distill_jax.train.metrics import Reporter
from distill_jax.train.state import TrainState
from distill_jax.train.step import Metrics, StepConfig, make_step
from distill_jax.train.votes import SAVE, STOP, Votes
from distill_jax.train.watchdog import Watchdog
from distill_jax.train.window import Window

Tree = Any
AHEAD = 2
"""Steps the host may be in front of the device: enough to keep it busy, few enough to stop and save promptly."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """Where and how long a stage trains.

    folder        of the stage; gets metrics/, and checkpoints/ unless it says that they are elsewhere
    steps         updates in all
    save_every    updates between checkpoints; 0: only at the end. `save_minutes`: also after so much time
    max_skipped   stop when so many steps in a row were not finite
    identity      hash of what must not change between start and resume (the recipe)
    """

    folder: Path
    steps: int
    name: str = "train"
    log_every: int = 20
    save_every: int = 500
    save_minutes: float | None = None
    keep: int = 2
    max_skipped: int = 10
    identity: str = ""


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """`fn(state) -> numbers`, called every so many updates (0: only at the end)."""

    fn: Callable[[TrainState], Mapping[str, float]]
    every: int = 0


STEERED = "source"
"""Key of a steered source's state among the controllers of the train state."""


class Steering(Protocol):
    """A source that follows the student: a state (NumPy arrays) in the train state decides what is read."""

    @property
    def every(self) -> int:
        """Updates between two changes; the first is made before the first update."""
        ...

    def source(self, state: Tree) -> BatchSource:
        """The batches from `state` on."""
        ...

    def update(self, state: Tree, params: Mapping[str, Tree], step: int) -> Tree:
        """The state from update `step` on, from what the parameters do now; the same on every process."""
        ...

    def numbers(self, state: Tree) -> Mapping[str, float]:
        """What to report of a state that has just been made."""
        ...


@dataclass(frozen=True, kw_only=True)
class Outer:
    """`fn(params, frozen, batch, heldout batch, step, controllers) -> controllers` every so many updates, before the
    update on `batch`: an outer problem that moves controllers by what held-out rows say (`train.bilevel`).
    """

    fn: Callable[..., dict[str, Tree]]
    heldout: BatchSource
    every: int


@dataclass(frozen=True, kw_only=True)
class Fitted:
    """state: after `step` updates, saved. stopped: name of the signal that ended it early, or ""."""

    state: TrainState
    step: int
    stopped: str = ""


def fit(config: StepConfig, state: TrainState, source: BatchSource, run: Run, *,
        frozen: Mapping[str, Tree] | None = None, evaluations: Mapping[str, Evaluation] | None = None,
        check: Callable[[Batch], None] | None = None, serve: Serve = serve_plain,
        steering: Steering | None = None, outer: Outer | None = None, damaged: Damaged = list) -> Fitted:
    """Train until `run.steps` updates are done or a signal asks to stop; either way the state is saved.

    state        of step 0 (`create_state`); replaced by the newest checkpoint of `run.folder` where there is one
    frozen       {provider: params} that are not trained
    check        called with the first global batch (NumPy) of a fresh run, may raise (empty supervised mask)
    steering     changes what `source` reads; its state is `state.controllers["source"]`
    outer        moves controllers between updates
    damaged      gives the shards that this process had to leave rows of out so far
    Raises ValueError for a checkpoint of another model or recipe, and when too many steps in a row are not finite.
    """
    checkpoints = Checkpoints(checkpoints_of(run.folder), keep=run.keep)
    reporter = Reporter(run.folder / "metrics", total=run.steps, name=run.name, terms=tuple(config.objective.terms),
                        writes=jax.process_index() == 0)
    watchdog = Watchdog()
    try:
        peers.current().barrier(f"{run.name}: start", f"checkpoint {checkpoints.latest} of recipe {run.identity}")
        state, start = _resume(checkpoints, state, run)
        if check is not None and start == 0:
            check(source.batch(0))
        reporter.start(start)
        if start:
            reporter.say(f"resumed at update {start} of {run.steps}")
        votes = Votes(config.mesh)
        loop = _Loop(config, run, source, checkpoints, reporter, votes, dict(evaluations or {}), serve, steering,
                     outer, watchdog, LostRows(run.name, damaged))
        with votes.listening(), watchdog.watching(), contextlib.closing(loop):
            if start < run.steps:
                state, start = loop.updates(state, dict(frozen or {}), start)
        checkpoints.wait()
        loop.lost.pass_on()
        peers.current().barrier(f"{run.name}: end", str(start))
        loop.lost.say(reporter)
        if start < run.steps:
            why = votes.signal or "a signal to another process"
            reporter.say(f"{why}: saved after update {start} of {run.steps}; the same command resumes")
            return Fitted(state=state, step=start, stopped=why)
        loop.evaluate(start, state, last=True)
        return Fitted(state=state, step=start)
    finally:
        reporter.close()
        checkpoints.close()


def _resume(checkpoints: Checkpoints, state: TrainState, run: Run) -> tuple[TrainState, int]:
    """The newest checkpoint's state and step, or the given state and 0."""
    step = checkpoints.latest
    if step is None:
        return state, 0
    before = checkpoints.info(step)["identity"]
    if before != run.identity:
        raise ValueError(f"{checkpoints.folder} was written by another recipe ({before} instead of {run.identity}); "
                         "resume with the old recipe, or train into another folder")
    return checkpoints.restore(step, state), step


@dataclass
class _Loop:
    """One call of `fit`: what stays the same over its steps."""

    config: StepConfig
    run: Run
    source: BatchSource
    checkpoints: Checkpoints
    reporter: Reporter
    votes: Votes
    evaluations: dict[str, Evaluation]
    serve: Serve
    steering: Steering | None = None
    outer: Outer | None = None
    watchdog: Watchdog = field(default_factory=Watchdog)
    lost: LostRows = field(default_factory=LostRows)
    bad_in_a_row: int = 0
    bases: Mapping[str, Tree] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        self.window = Window(device=self.config.mesh.devices.flat[0], count=self.config.mesh.size)
        self._feed: Feed | None = None

    def close(self) -> None:
        """End what reads ahead."""
        if self._feed is not None:
            self._feed.close()

    def updates(self, state: TrainState, frozen: Mapping[str, Tree], start: int) -> tuple[TrainState, int]:
        """-> the state at the end or where a signal stopped it, saved or being saved, and the updates done."""
        run, votes = self.run, self.votes
        self.bases = {name: base for name, base in frozen.items() if name.startswith(BASE)}
        state, feed = self.feed(state, start, steer=start == 0)
        step = make_step(self.config, state)
        pending: deque[tuple[int, Metrics]] = deque()
        done, saved_at, began = start, start, time.monotonic()
        saved_time, batch, stop = began, next(feed), False
        while done < run.steps and not stop:
            state, metrics = step(state, frozen, batch, votes.ballot())
            pending.append((done, metrics))
            done += 1
            if done == start + 1:
                jax.block_until_ready(metrics["loss"])
                self.reporter.say(f"compiled and ran the first update in {time.monotonic() - began:.1f} s")
                self.reporter.restart_clock(done)
                self.window.restart_clock()
            if done < run.steps:
                if self.steering and done % self.steering.every == 0:
                    state, feed = self.feed(state, done, steer=True)
                batch = self._next(feed, state, done)  # made and put while the step runs
                if self.outer and done % self.outer.every == 0:
                    state = self._outer(self.outer, state, frozen, batch, done)
            decision = votes.decision(pending[0][1]) if len(pending) > AHEAD or not votes.shared else 0
            stop = decision == STOP
            while len(pending) > (0 if stop or done == run.steps else AHEAD):
                self._settle(*pending.popleft(), last=stop and not pending)
            if jax.process_index() == 0 and time.monotonic() - saved_time > 60 * (run.save_minutes or math.inf):
                votes.want(SAVE)
            due = bool(run.save_every) and done % run.save_every == 0
            if due or stop or done == run.steps or (decision == SAVE and done - saved_at > AHEAD):
                peers.current().barrier(f"{run.name}: checkpoint {done}")
                self.checkpoints.save(done, state, {"identity": run.identity, "data_step": done})
                votes.saved()
                saved_at, saved_time = done, time.monotonic()
            self.evaluate(done, state)
        return state, done

    def feed(self, state: TrainState, done: int, steer: bool) -> tuple[TrainState, Feed]:
        """Batches from update `done` on, of the source's state; with `steer`, of one that is made now."""
        if self.steering:
            steered = jax.device_get(state.controllers[STEERED])
            if steer:
                began = time.perf_counter()
                with self.watchdog.paused():
                    steered = self.steering.update(steered, {**state.params, **self.bases}, done)
                placed = jax.device_put(steered, NamedSharding(self.config.mesh, PartitionSpec()))
                state = dataclasses.replace(state, controllers={**state.controllers, STEERED: placed})
                numbers = self.steering.numbers(steered)
                self.reporter.write(done, numbers)
                if self.steering.every > 1 or done % self.run.log_every == 0:
                    self.reporter.say(f"update {done}: " + "  ".join(f"{k} {v:.4g}" for k, v in numbers.items()))
                self.window.pause(time.perf_counter() - began)
            self.source = self.steering.source(steered)
        self.close()
        self._feed = Feed(self.source, self.config.mesh, done, self.serve)
        return state, self._feed

    def _next(self, feed: Feed, state: TrainState, done: int) -> Batch:
        """The next batch. Where it cannot be read, `state` is saved first: nothing trained is lost to a bad shard."""
        try:
            return next(feed)
        except Exception:
            if jax.process_count() == 1:  # a save takes all processes, and the others have read theirs
                self.checkpoints.save(done, state, {"identity": self.run.identity, "data_step": done})
                self.checkpoints.wait()
                self.reporter.say(f"the batch of update {done} cannot be read; saved after update {done}")
            raise

    def _outer(self, outer: Outer, state: TrainState, frozen: Mapping[str, Tree], batch: Batch, done: int
               ) -> TrainState:
        """The state with controllers that the outer problem has moved; nothing waits."""
        heldout = place_global(outer.heldout.batch(done // outer.every - 1), self.config.mesh)
        moved = outer.fn(state.params, frozen, batch, heldout, state.step, state.controllers)
        return dataclasses.replace(state, controllers=moved)

    def _settle(self, step: int, metrics: Metrics, last: bool = False) -> None:
        """Take in the metrics of step `step`; report when a window is full. Raises after too many bad steps in a row.

        Waiting here keeps the host at most AHEAD steps in front; with a step queued, the device does not notice.
        """
        jax.block_until_ready(metrics["loss"])
        self.watchdog.alive()
        peers.current().note(f"{self.run.name}: update {step + 1}")
        self.window.add(metrics)
        self.lost.pass_on()
        if (step + 1) % self.run.log_every and step + 1 < self.run.steps and not last:
            return
        first = step + 1 - len(self.window)
        values, ok = self.window.close()
        self.lost.say(self.reporter)
        self.reporter.report(step + 1, values | self.lost.numbers)
        for number, fine in enumerate(ok, start=first):
            self.bad_in_a_row = 0 if fine else self.bad_in_a_row + 1
            if not fine:
                self.reporter.say(f"update {number}: loss or gradient not finite, skipped")
            if self.bad_in_a_row >= self.run.max_skipped:
                raise ValueError(self._not_finite(number))

    def _not_finite(self, step: int) -> str:
        """Write the batch of `step` to disk; -> what to tell the user."""
        path = self.run.folder / f"bad_batch_{step}.npz"
        if jax.process_index() == 0:
            arrays: dict[str, Any] = {name: np.asarray(x) for name, x in tree.paths(self.source.batch(step))}
            np.savez_compressed(path, **arrays)
        return (f"{self.bad_in_a_row} updates in a row had a loss or gradient that is not finite, the last at update "
                f"{step}; its batch is in {path}. Parameters are those before the first of them. Lower the peak "
                "learning rate, or look at the batch (distill-jax batch), then start again")

    def evaluate(self, done: int, state: TrainState, last: bool = False) -> None:
        """Run what is due after `done` updates, all of it at the end."""
        due = {n: e for n, e in self.evaluations.items()
               if last or (e.every and done % e.every == 0 and done < self.run.steps)}
        if not due:
            return
        began = time.perf_counter()
        with self.watchdog.paused():
            values = {f"{name}/{key}": float(v) for name, e in due.items() for key, v in e.fn(state).items()}
        self.reporter.write(done, values)
        self.reporter.say("  ".join(f"{name} {v:.4g}" for name, v in values.items()))
        self.window.pause(time.perf_counter() - began)
