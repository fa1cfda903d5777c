"""A source of which a share is what the student wrote: asked anew every so many updates, written down as a store."""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from distill_jax.data.render import Style
from distill_jax.data.source_specs import Phases, Source, Store, stores
from distill_jax.data.sources import BatchSource, open_store
from distill_jax.data.tokenizer import Tokenizer
from distill_jax.decode import Generator
from distill_jax.jobs.questions import of_traces
from distill_jax.jobs.rounds import drop_rounds
from distill_jax.jobs.write_store import write_store
from distill_jax.models.lora import joined
from distill_jax.rollout.generation import with_real_ids
from distill_jax.rollout.on_policy import OnPolicy
from distill_jax.sharding import row_shards
from distill_jax.traces.store import TraceStore
from distill_jax.traces.trace import FLAG_TRUNCATED, Trace

State = Mapping[str, Any]


class OnPolicySteering:
    """`train.loop.Steering` of a stage with `on_policy`.

    A round is the answers of one sampling: a trace store `rollouts/<update>` in the stage's folder, which `store
    inspect` and `batch` read like any other. A run that is resumed reads the round it was in; one that is killed while
    a round is written makes the same answers again. state: i32 `since`, the update the round was made at, and i32
    [parts] `taken`, sequences read of each part of the source by then.
    """

    def __init__(self, spec: OnPolicy, where: Source, opened: Any, tokenizer: Tokenizer, *, student: str, model: Any,
                 mesh: Mesh, seed: int, folder: Path) -> None:
        if isinstance(where, Phases):
            raise ValueError("on_policy needs a Store or a Mix as source, got Phases: make a stage of each phase")
        self.spec, self.every, self._opened, self._tok = spec, spec.every, opened, tokenizer
        self._student, self._mesh, self._seed, self._folder = student, mesh, seed, folder
        self._model = with_real_ids(model, tokenizer)
        first = next(stores(where))
        self._round = Store(path="", rows=first.rows, seq_len=first.seq_len, pack=first.pack, over_long="cut",
                            style=Style())
        self._questions = questions_of(opened, lambda q: spec.environment.longest_prompt(q, tokenizer),
                                       self._longest(model.config.context_length))

    def initial(self) -> dict[str, Any]:
        """Before anything was sampled."""
        return {"since": np.int32(0), "taken": np.zeros(len(self._opened.parts), np.int32)}

    def source(self, state: State) -> BatchSource:
        """The batches of the round of `state`."""
        since, opened, share = int(state["since"]), self._opened, self.spec.share
        answers = open_store(dataclasses.replace(self._round, path=self._path(since)), self._tok,
                             seed=self._seed + since, readings=opened.readings)
        return dataclasses.replace(
            opened, parts=(*opened.parts, answers), since=since, taken=(*(int(x) for x in state["taken"]), 0),
            shares=(*((1 - share) * s for s in opened.shares), share))

    def update(self, state: State, params: Mapping[str, Any], step: int) -> dict[str, Any]:
        """Ask the next questions of the student as it is, and write its answers down."""
        taken = self.source(state).taken_before(step)[:-1] if step else state["taken"]
        answers = self._answers(params, self._asked((step // self.every) * self.spec.prompts), step)
        self._write(step, answers)
        return {"since": np.int32(step), "taken": np.asarray(taken, np.int32)}

    def close(self) -> None:
        """Nothing to end."""

    def _longest(self, context: int) -> int:
        """Tokens that a prompt may have. Answers too long for a row of the source are cut there."""
        return context - self.spec.sampling.max_new_tokens

    def _answers(self, params: Mapping[str, Any], questions: list[Trace], step: int, salt: int = 0, n: int = 0
                 ) -> list[Trace]:
        """At most `n` answers (0: the spec's) to each question by the student as it is; those to one question stand
        together."""
        generator = Generator(self._model, joined(params)[self._student], batch_size=self._rows(), mesh=self._mesh,
                              token_bytes=self._tok.token_bytes)
        return self.spec.environment.sample(generator, self._tok, questions, self.spec.sampling, n=n or self.spec.n,
                                            seed=(self._seed * 1_000_003 + step) * 101 + salt,
                                            teacher=f"the student at update {step}")

    def _write(self, step: int, answers: list[Trace]) -> None:
        if jax.process_index() == 0:
            rows = [r for t in answers for r in self.spec.environment.rows(t, self._tok, self.spec.sampling)]
            write_store(self._path(step), rows, self._tok, on_policy={"update": step, "seed": self._seed})
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices(f"rollouts {step}")
        if jax.process_index() == 0:
            drop_rounds(self._folder, self.spec.keep_rounds)

    def numbers(self, state: State) -> dict[str, float]:
        """Of the round: answers, tokens an answer has on average, share cut by max_new_tokens."""
        store = TraceStore.open(self._path(int(state["since"])))
        written = [t.encoded for t in store.traces() if t.encoded is not None]
        cut = [FLAG_TRUNCATED in flags for flags in store.index().flags]
        return {"rollouts/answers": len(written), "rollouts/cut": float(np.mean(cut)),
                "rollouts/tokens": float(np.mean([len(e.ids) - e.prompt_length for e in written]))}

    def _path(self, step: int) -> str:
        return str(self._folder / "rollouts" / f"{step:07d}")

    def _rows(self) -> int:
        """Rows of a decoding batch: what was asked for, as a multiple of the row shards of the mesh."""
        shards = row_shards(self._mesh)
        return -(-self.spec.batch_size // shards) * shards

    def _asked(self, first: int) -> list[Trace]:
        """The `prompts` questions from number `first` on: each once, in an order that the seed decides, then all again.
        """
        n, prompts = len(self._questions), self.spec.prompts
        orders = {e: order_of(e, n, prompts, self._seed) for e in range(first // n, (first + prompts - 1) // n + 1)}
        return [self._questions[orders[i // n][i % n]] for i in range(first, first + prompts)]


def order_of(epoch: int, n: int, prompts: int, seed: int) -> np.ndarray:
    """int64 [n]: the order of n questions in an epoch, of which each round asks the next `prompts`.

    With no more prompts than questions, a round that begins in one epoch and ends in the next asks none twice: it would
    get the same answers twice.
    """
    order = np.zeros(0, np.int64)
    for e in range(epoch + 1):
        drawn = np.random.default_rng([seed, 3, e]).permutation(n)
        late = np.isin(drawn, order[n - n * e % prompts:] if e else order)  # what such a round has asked before
        order = np.concatenate([drawn[~late], drawn[late]])
    return order


def questions_of(opened: BatchSource, prompt_length: Callable[[Trace], int], longest: int) -> list[Trace]:
    """The questions of the rows a source chose, each once, whose prompts have at most `longest` tokens.

    Raises ValueError where there is none.
    """
    found = [t for part in opened.parts for t in part.rowset.store.traces(np.unique(part.rowset.origin[
        part.rowset.origin >= 0]))]
    asked = [a.question for a in of_traces(found) if a.question is not None]
    short = [q for q in asked if prompt_length(q) <= longest]
    if not short:
        raise ValueError(f"on_policy: none of {len(asked)} questions leaves room for max_new_tokens in the student's "
                         f"context (prompts of at most {longest} tokens do); lower on_policy.sampling.max_new_tokens")
    return short
