"""A source of the student's own answers with rewards and advantages: rounds of rollouts, each written as a store."""

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from distill_jax.core.batch import Batch
from distill_jax.core.roles import ANSWER, THINK
from distill_jax.data.pack import Plan, plan
from distill_jax.data.render import Style, render
from distill_jax.data.rowset import open_rows
from distill_jax.data.source_specs import Source
from distill_jax.data.sources import BatchSource, PerToken, RowSource
from distill_jax.data.tokenizer import Tokenizer
from distill_jax.jobs.context import say
from distill_jax.jobs.estimates import (
    Estimates,
    Measures,
    estimate,
    load_estimates,
    numbers_of,
    save_estimates,
    written,
)
from distill_jax.jobs.on_policy import OnPolicySteering
from distill_jax.jobs.rounds import count_round
from distill_jax.rewards.checker import Checker
from distill_jax.rewards.journal import Journal
from distill_jax.rewards.judges import judge_answers, judge_code, judge_knights
from distill_jax.rewards.sample import Sample, groups_of
from distill_jax.rewards.sandbox import Sandbox, SandboxUnavailable
from distill_jax.rollout.advantages import zero_variance
from distill_jax.rollout.environments import CHUNK
from distill_jax.rollout.estimators import ADVANTAGES, Estimator
from distill_jax.rollout.reinforce import Reinforce
from distill_jax.traces.store import TraceStore
from distill_jax.traces.trace import FLAG_TRUNCATED, Trace

State = Mapping[str, Any]
MONITORED = 100
"""Salt of the answers that nobody trains on; those of a round have the numbers of its samplings."""
TRAINED, REWARD, ADVANTAGE = "trained", "reward", "advantage"
"""Scores that a rollout's trace carries beside the parts of its reward ("reward/right", ...)."""


@dataclass(frozen=True, kw_only=True)
class RoundSource(BatchSource):
    """The rollouts of one round, each used once: spread over the `updates` that follow `since`; rows that are left
    over stay empty."""

    updates: int = 1

    def batch(self, step: int, rows: slice | None = None) -> Batch:
        """As `BatchSource.batch`; a round of equal rewards has nothing to train on, and may."""
        return self._build(self.assigned(step)[slice(None) if rows is None else rows], signals=False)

    def assigned(self, step: int) -> list[tuple[int, int]]:
        if not self.since <= step < self.since + self.updates:
            raise ValueError(f"the rollouts of update {self.since} are for {self.updates} updates, asked for {step}")
        places = [step - self.since + b * self.updates for b in range(self.rows)]
        return [(0, p) if p < self.parts[0].plan.sequences else (-1, p) for p in places]


class ReinforceSteering(OnPolicySteering):
    """`train.loop.Steering` of a stage with `on_policy=Reinforce(...)`.

    A round is a trace store `rollouts/<update>` with every answer that was sampled for it, its verdict and scores;
    `distill-jax rollouts` reads it. state: i32 `since` and `taken` as in `OnPolicySteering`, i32 `asked`, questions
    asked so far, and `reward`, what stateful rewards remember.
    """

    spec: Reinforce

    def __init__(self, spec: Reinforce, where: Source, opened: Any, tokenizer: Tokenizer, *, student: str, model: Any,
                 mesh: Mesh, seed: int, folder: Path, measures: Measures) -> None:
        super().__init__(spec, where, opened, tokenizer, student=student, model=model, mesh=mesh, seed=seed,
                         folder=folder)
        self._measures = measures
        most = self.spec.prompts * self.spec.n * spec.environment.most_rows()
        if not self._round.pack and most > self._round.rows * self.every:
            rows = f" in {n} rows" if (n := spec.environment.most_rows()) > 1 else ""
            raise ValueError(f"{self.spec.prompts} questions with {self.spec.n} answers each{rows} do not fit "
                             f"{self.every} updates of {self._round.rows} rows: raise source.rows, or on_policy.every")
        if self.spec.prompts > len(self._questions):
            raise ValueError(f"a round asks {self.spec.prompts} different questions, the source has "
                             f"{len(self._questions)}: lower on_policy.prompts, and raise n for more answers")
        self._journal = Journal(folder / "verdicts.jsonl")
        self._judge, self._ends = judge_of(spec, self._journal)
        self._seconds = 0.0

    def _longest(self, context: int) -> int:
        """An answer is trained on whole or not at all."""
        return min(context, self._round.seq_len) - self.spec.sampling.max_new_tokens

    def close(self) -> None:
        """End the processes that check answers."""
        self._ends()

    def initial(self) -> dict[str, Any]:
        return {**super().initial(), "asked": np.int32(0), "reward": self.spec.reward.init()}

    def update(self, state: State, params: Mapping[str, Any], step: int) -> dict[str, Any]:
        """Sample, judge and reward the next groups, and write them down."""
        began = time.perf_counter()
        state = self._monitored(state, params, step)
        asked, samples, kept = int(state["asked"]), [], np.zeros(0, bool)
        for attempt in range(1 + self.spec.refill):
            if attempt and self._groups(samples, kept) >= self.spec.prompts:
                break
            more = self._judge([sample_of(t, self._tok)
                                for t in self._answers(params, self._asked(asked), step, salt=attempt)])
            asked += self.spec.prompts
            kept = np.concatenate([kept, self._useful(more, state)])
            samples += more
        self._seconds = time.perf_counter() - began
        traces = self._scored(samples, kept, state)
        if isinstance(self.spec.advantage, Estimator):
            traces = self._estimated(self.spec.advantage, traces, group_numbers(samples), params, step)
        self._write(step, traces)
        new = {**state, "since": np.int32(step), "asked": np.int32(asked)}
        if self.spec.monitor is None:
            new["reward"] = self.spec.reward.update(samples, state["reward"])
        count_round(self._folder, self._measures.config, self.source(new), step, self.every, sampled_tokens(traces))
        return new

    def _monitored(self, state: State, params: Mapping[str, Any], step: int) -> State:
        """The state once the reward has seen answers to the monitoring questions, where they are due."""
        monitor = self.spec.monitor
        if monitor is None or step % monitor.every:
            return state
        order = np.random.default_rng([self._seed, 4]).permutation(len(self._questions))[:monitor.prompts]
        answers = self._answers(params, [self._questions[i] for i in order], step, salt=MONITORED, n=monitor.n)
        samples = self._judge([sample_of(t, self._tok) for t in answers])
        return {**state, "reward": self.spec.reward.update(samples, state["reward"])}

    def _useful(self, samples: Sequence[Sample], state: State) -> np.ndarray:
        """bool [N]: samples of groups that teach something."""
        rewards = self.spec.reward.score(samples, state["reward"]).values
        same = zero_variance(rewards, group_numbers(samples))
        return ~same if self.spec.equal == "drop" else np.ones(len(samples), bool)

    @staticmethod
    def _groups(samples: Sequence[Sample], kept: np.ndarray) -> int:
        return len({s.group for s, k in zip(samples, kept) if k})

    def _scored(self, samples: list[Sample], kept: np.ndarray, state: State) -> list[Trace]:
        """Traces with verdict, rewards and advantages; of the useful groups at most `prompts` are trained on."""
        scores = self.spec.reward.score(samples, state["reward"])
        groups = group_numbers(samples)
        wanted = list(dict.fromkeys(groups[kept].tolist()))[:self.spec.prompts]
        trained = kept & np.isin(groups, wanted)
        if self.spec.truncated == "mask":
            trained &= ~np.array([s.truncated for s in samples], bool)
        advantages = (np.zeros(len(samples)) if isinstance(self.spec.advantage, Estimator) else
                      np.asarray(self.spec.advantage(scores.values, groups), np.float64))
        out = []
        for i, s in enumerate(samples):
            said = {REWARD: float(scores.values[i]), ADVANTAGE: float(advantages[i]), TRAINED: float(trained[i]),
                    "think_tokens": float(s.think_tokens), "answer_tokens": float(s.answer_tokens),
                    **{f"{REWARD}/{name}": float(v[i]) for name, v in scores.parts.items()}}
            verdict = None if s.verdict is None else s.verdict.correct
            out.append(s.trace.replace(verdict=verdict, scores={**s.trace.scores, **said}))
        return out

    def _estimated(self, estimator: Estimator, traces: list[Trace], groups: np.ndarray, params: Mapping[str, Any],
                   step: int) -> list[Trace]:
        """Write the estimates of the round; -> traces whose advantage is the mean over their tokens."""
        rows = [render(t, self._tok) for t in traces]
        said = estimate(estimator, traces, rows, [t.scores[REWARD] for t in traces], groups,
                        [t.scores[TRAINED] > 0 for t in traces], self._measures(estimator, params, rows))
        if jax.process_index() == 0:
            save_estimates(self._estimates(step), said)
        means = [float(a[written(r)].mean()) for a, r in zip(said[ADVANTAGES], rows)]
        return [t.replace(scores={**t.scores, ADVANTAGE: m}) for t, m in zip(traces, means)]

    def _estimates(self, step: int) -> Path:
        return Path(f"{self._path(step)}.npz")

    def source(self, state: State) -> BatchSource:
        """The batches of the round of `state`."""
        since = int(state["since"])
        store = TraceStore.open(self._path(since))
        traces = list(store.traces())
        chosen = np.flatnonzero([t.scores[TRAINED] > 0 for t in traces])
        names = {g: i for i, g in enumerate(dict.fromkeys(t.group for t in traces), 1)}
        rowset = open_rows(store, chosen, self._tok, Style(), (), self._seed)
        said = load_estimates(self._estimates(since)) if isinstance(self.spec.advantage, Estimator) else {}
        fields = fields_of([traces[i] for i in chosen], names, rowset.lengths,
                           {name: [of[i] for i in chosen] for name, of in said.items()})
        spec, opened = dataclasses.replace(self._round, path=self._path(since)), self._opened
        made = Plan.nothing(spec.seq_len) if not len(chosen) else plan(
            rowset.lengths, seq_len=spec.seq_len, seed=self._seed + since, pack=spec.pack)
        part = RowSource(spec=spec, rowset=rowset, fields=fields, plan=made, signals={}, left_out={})
        return RoundSource(parts=(part,), rows=opened.rows, seq_len=opened.seq_len, tokenizer=self._tok, signals={},
                           since=since, updates=self.every)

    def numbers(self, state: State) -> dict[str, float]:
        """Of the round: rewards and their parts, accuracy, lengths of right and wrong answers, what was cut or dropped.
        """
        traces = list(TraceStore.open(self._path(int(state["since"]))).traces())
        numbers = summary(traces)
        if isinstance(self.spec.advantage, Estimator):
            numbers |= numbers_of(load_estimates(self._estimates(int(state["since"]))), traces)
        sequences = self.source(state).parts[0].plan.sequences
        numbers["left_out"] = float(max(0, sequences - self._round.rows * self.every))
        if self._seconds:
            numbers["tokens_per_second"] = sampled_tokens(traces) / self._seconds
        return {f"rollouts/{name}": v for name, v in numbers.items()}


def judge_of(spec: Reinforce, journal: Journal) -> tuple[Callable[[Sequence[Sample]], list[Sample]],
                                                         Callable[[], None]]:
    """The judge of a spec, and what ends its processes."""
    if spec.judge == "knights":
        return judge_knights, lambda: None
    if spec.judge == "code":
        sandbox = sandbox_of(spec)
        return lambda samples: judge_code(samples, sandbox, journal), sandbox.close
    checker = Checker()
    return lambda samples: judge_answers(samples, checker, journal), checker.close


def sandbox_of(spec: Reinforce) -> Sandbox:
    """Where programs that the student wrote run. Raises ValueError where they cannot be shut in and nobody allowed
    that; where somebody did, it says so."""
    if spec.unsafe_code:
        say("WARNING: unsafe code is allowed: programs that the model writes run as this user, with its files and its "
            "network; only time, memory and output are limited")
    try:
        return Sandbox(unsafe=spec.unsafe_code)
    except SandboxUnavailable as e:
        raise ValueError(f"judge='code' runs programs that the student wrote, and {e}: in a recipe "
                         "Reinforce(unsafe_code=True), for one start `distill-jax train --unsafe-code`") from e


def sample_of(trace: Trace, tok: Tokenizer) -> Sample:
    """The sample of a rollout, with its tokens counted by role. Signals `think_entropy` and `answer_entropy` are means
    of -log p over the sampled tokens of the phase: estimates of the entropy from one draw a token."""
    assert trace.encoded is not None and trace.encoded.logprobs is not None
    row, e = render(trace, tok), trace.encoded
    signals = dict(Sample.of(trace).signals)
    counts = {}
    for name, role in (("think", THINK), ("answer", ANSWER)):
        at = row.roles == int(role)
        at[:e.prompt_length] = False
        counts[name] = int(at.sum())
        signals[f"{name}_entropy"] = float(-np.asarray(e.logprobs)[at].mean()) if counts[name] else 0.0
    return Sample.of(trace, text=tok.decode(e.ids[e.prompt_length:]), think_tokens=counts["think"],
                     answer_tokens=counts["answer"], signals=signals)


def group_numbers(samples: Sequence[Sample]) -> np.ndarray:
    """int64 [N]: number of each sample's question."""
    out = np.zeros(len(samples), np.int64)
    for number, index in enumerate(groups_of(samples)):
        out[index] = number
    return out


def fields_of(traces: Sequence[Trace], groups: Mapping[str, int], lengths: np.ndarray, estimates: Estimates,
              ) -> dict[str, PerToken]:
    """`advantages`, `behaviour_logprobs`, `group_ids` and `trace_ids` (from 1; rows of one answer share theirs) of
    rollouts of these lengths; what `estimates` says of each token goes before the one advantage of an answer."""
    dtypes = {"advantages": np.float32, "behaviour_logprobs": np.float32, "group_ids": np.int32, "trace_ids": np.int32}
    out: dict[str, list[np.ndarray]] = {name: [] for name in dtypes}
    numbers = np.cumsum([not t.scores.get(CHUNK) for t in traces]).tolist()
    for t, n, number in zip(traces, lengths.tolist(), numbers):
        assert t.encoded is not None and t.encoded.logprobs is not None and len(t.encoded.ids) == n
        out["advantages"].append(np.full(n, t.scores[ADVANTAGE], np.float32))
        out["behaviour_logprobs"].append(np.asarray(t.encoded.logprobs, np.float32))
        out["group_ids"].append(np.full(n, groups[t.group], np.int32))
        out["trace_ids"].append(np.full(n, number, np.int32))
    return {**{name: PerToken(dtype, out[name]) for name, dtype in dtypes.items()},
            **{name: PerToken(np.float32, of) for name, of in estimates.items()}}


def sampled_tokens(traces: Sequence[Trace]) -> int:
    """Tokens of all answers."""
    return sum(len(t.encoded.ids) - t.encoded.prompt_length for t in traces if t.encoded is not None)


def summary(traces: Sequence[Trace]) -> dict[str, float]:
    """Means over the rollouts of a round; an answer in several rows counts once."""
    mean = lambda values: float(np.mean(values)) if len(values) else 0.0
    length = np.array([len(t.encoded.ids) - t.encoded.prompt_length if t.encoded else 0 for t in traces], float)
    first = [i for i, t in enumerate(traces) if not t.scores.get(CHUNK)]
    length = np.add.reduceat(length, first)
    traces = [traces[end - 1] for end in (*first[1:], len(traces))]  # the last row knows how the answer ended
    scores = [t.scores for t in traces]
    right = np.array([t.verdict is True for t in traces], bool)
    groups: dict[str, list[float]] = {}
    for t in traces:
        groups.setdefault(t.group, []).append(t.scores[REWARD])
    parts = [k for k in scores[0] if k.startswith(f"{REWARD}/")]
    return {REWARD: mean([s[REWARD] for s in scores]), **{k: mean([s[k] for s in scores]) for k in parts},
            "accuracy": mean(right), "tokens": mean(length), "tokens_right": mean(length[right]),
            "tokens_wrong": mean(length[~right]), "think_tokens": mean([s["think_tokens"] for s in scores]),
            "cut": mean([FLAG_TRUNCATED in t.flags for t in traces]),
            "equal_groups": mean([len(set(r)) == 1 for r in groups.values()]),
            "trained": mean([s[TRAINED] for s in scores])}
