"""Environments: how a student's answers to a question come about, before anybody judges them.

An environment asks a `decode.Completer`, so it works with a model in memory and with a server. What it does to an
answer goes where the rest of the run finds it: text it puts before an answer is prompt (never trained on), tokens it
puts into one are marked in `Encoded.injected` (role INJECTED, never trained on), tokens it forces in place of sampled
ones keep the log-probability with which they were chosen (trained on), and what it knows of an answer is among the
trace's scores, which rewards read as `Sample.signals`. The randomness of an answer depends on the seed, its question
and its number alone. No answer is longer than `Sampling.max_new_tokens`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Protocol

import numpy as np

from distill_jax.core.roles import QUESTION
from distill_jax.data.render import prompt_ids
from distill_jax.data.tokenizer import Tokenizer
from distill_jax.decode.request import Completer, Completion, Request
from distill_jax.decode.sampling import Sampling
from distill_jax.rewards.sample import EXIT
from distill_jax.rollout.generation import (
    CLOSE,
    OPEN,
    Attempt,
    attempted,
    attempts_at,
    completed,
    inside,
    joined,
    seed_of,
    with_stops,
    written,
)
from distill_jax.traces.formats.questions import prompt_only
from distill_jax.traces.trace import FLAG_TRUNCATED, Trace

CLOSED = f"{OPEN}\n\n{CLOSE}\n\n"
"""`prefill` of a prompt without thinking (TFPI, 2509.26226)."""
ELLIPSIS = f"{OPEN}\n...\n"
"""`prefill` behind which R1's students sometimes skip their thinking (AutoThink, 2505.10832)."""
TIME_IS_LIMITED = f"Time is limited, stop thinking and start answering.\n{CLOSE}\n\n"
"""What S-GRPO (2505.07686) puts behind a thinking that it breaks off."""
BUDGET = "budget"
"""Score: the thinking tokens that the question allowed."""
CHUNK = "chunk"
"""Score of a row that is one of several of an answer: its number, from 0."""


class Environment(Protocol):
    """Turns questions into sampled, unverified traces."""

    def check(self, n: int, sampling: Sampling) -> None:
        """Raises ValueError where `n` answers to a question under these rules cannot be had."""
        ...

    def longest_prompt(self, question: Trace, tok: Tokenizer) -> int:
        """Tokens of the longest prompt that this question may have."""
        ...

    def most_rows(self) -> int:
        """Rows to train on that an answer becomes at most."""
        ...

    def rows(self, trace: Trace, tok: Tokenizer, sampling: Sampling) -> list[Trace]:
        """The rows to train on of an answer: itself, with what was made of it since (verdict, scores)."""
        ...

    def sample(self, engine: Completer, tok: Tokenizer, questions: Sequence[Trace], sampling: Sampling, *, n: int,
               seed: int = 0, teacher: str = "") -> list[Trace]:
        """At most `n` answers to each question, those to one question together, questions in order.

        teacher  who answers, for the provenance
        """
        ...


@dataclass(frozen=True, kw_only=True)
class Plain:
    """`n` independent answers behind the template's prompt.

    prefill  text that every prompt ends with, behind which the model writes on: `CLOSED`, `ELLIPSIS`, "<think>\\n".
             What the template's prompt ends with of it is not repeated
    """

    prefill: str = ""

    def check(self, n: int, sampling: Sampling) -> None:
        """Any number of answers."""

    def longest_prompt(self, question: Trace, tok: Tokenizer) -> int:
        return len(prompt_ids(question, tok, prefill=self.prefill))

    def most_rows(self) -> int:
        return 1

    def rows(self, trace: Trace, tok: Tokenizer, sampling: Sampling) -> list[Trace]:
        return [trace]

    def sample(self, engine: Completer, tok: Tokenizer, questions: Sequence[Trace], sampling: Sampling, *, n: int,
               seed: int = 0, teacher: str = "") -> list[Trace]:
        attempts = attempts_at(questions, tok, n=n, seed=seed, prefill=self.prefill)
        return attempted(engine, tok, attempts, sampling, teacher=teacher)


@dataclass(frozen=True, kw_only=True)
class Budgeted(Plain):
    """A budget of thinking tokens is written into the question, the same for all answers to it (BARD, 2511.01470).

    budgets        one of them is drawn for every question of a round
    text           written behind the question; `{budget}` stands for the number
    answer_tokens  an answer ends so many tokens behind its budget at the latest; None: only the sampling rules end it
    The score `budget` is what `rewards.shaping_modes.within_budget` reads. The wording is a guess: the paper's could
    not be read.
    """

    budgets: tuple[int, ...] = (500, 1000, 2000, 4000, 8000)
    text: str = "\n\nThink for at most {budget} tokens."
    answer_tokens: int | None = None

    def check(self, n: int, sampling: Sampling) -> None:
        if not self.budgets or min(self.budgets) < 1:
            raise ValueError(f"Budgeted.budgets must be numbers of tokens, at least 1, got {self.budgets}")
        if "{budget}" not in self.text:
            raise ValueError(f"Budgeted.text must have the place {{budget}}, got {self.text!r}")
        if self.answer_tokens is not None and self.answer_tokens < 1:
            raise ValueError(f"Budgeted.answer_tokens must be at least 1 or None, got {self.answer_tokens}")

    def longest_prompt(self, question: Trace, tok: Tokenizer) -> int:
        return max(super(Budgeted, self).longest_prompt(self.told(question, b), tok) for b in self.budgets)

    def sample(self, engine: Completer, tok: Tokenizer, questions: Sequence[Trace], sampling: Sampling, *, n: int,
               seed: int = 0, teacher: str = "") -> list[Trace]:
        budgets = [self.budgets[seed_of(seed, q.group, -1) % len(self.budgets)] for q in questions]
        told = [self.told(q, b) for q, b in zip(questions, budgets)]
        attempts = attempts_at(told, tok, n=n, seed=seed, prefill=self.prefill)
        attempts = [self._limited(a, budgets[i // n], sampling) for i, a in enumerate(attempts)]
        return attempted(engine, tok, attempts, sampling, teacher=teacher)

    def told(self, question: Trace, budget: int) -> Trace:
        """The question with the budget in its last turn; it stays in its group."""
        last = max(i for i, s in enumerate(question.segments) if s.role == QUESTION)
        text = question.segments[last].text + self.text.format(budget=budget)
        return question.replace(segments=tuple(
            replace(s, text=text) if i == last else s for i, s in enumerate(question.segments)))

    def _limited(self, attempt: Attempt, budget: int, sampling: Sampling) -> Attempt:
        limit = None if self.answer_tokens is None else min(budget + self.answer_tokens, sampling.max_new_tokens)
        return replace(attempt, request=replace(attempt.request, max_new_tokens=limit), scores={BUDGET: float(budget)})


@dataclass(frozen=True, kw_only=True)
class Mode:
    """A way to begin an answer. first: its text, one token in the methods; limit: tokens of such an answer, None: those
    of the sampling rules."""

    name: str
    first: str
    limit: int | None = None


@dataclass(frozen=True, kw_only=True)
class Modes(Plain):
    """Answers begin with given tokens, each of the modes in an equal part of a group (AdaptThink, 2505.13417, eq. 6).

    The forced token is sampled from a uniform distribution over the modes, whatever the student would have done: its
    behaviour log-probability is log(1 / modes), and it is trained on like any other. Score `mode/<name>`: 1 for the
    mode of the answer, 0 for the others. The prompt has to end inside the thinking: `prefill="<think>\\n"` where the
    template does not open it.
    """

    modes: tuple[Mode, ...] = (Mode(name="no_think", first=CLOSE), Mode(name="think", first="Alright"))

    def check(self, n: int, sampling: Sampling) -> None:
        names = [m.name for m in self.modes]
        if not names or n % len(names) or len(set(names)) < len(names):
            raise ValueError("Modes needs modes with distinct names, and as answers a multiple of their number; got "
                             f"{names} and n={n}")
        limits = {m.name: m.limit for m in self.modes if m.limit is not None}
        if bad := [f"{name} {limit}" for name, limit in limits.items() if not 1 <= limit <= sampling.max_new_tokens]:
            raise ValueError(f"Mode.limit must be between 1 and max_new_tokens={sampling.max_new_tokens}, got {bad}")

    def sample(self, engine: Completer, tok: Tokenizer, questions: Sequence[Trace], sampling: Sampling, *, n: int,
               seed: int = 0, teacher: str = "") -> list[Trace]:
        firsts = self._firsts(tok)
        attempts = attempts_at(questions, tok, n=n, seed=seed, prefill=self.prefill)
        closing = [m.name for m in self.modes if m.first.startswith(CLOSE)]
        if closing and not all(a.opened for a in attempts):
            raise ValueError(f"the modes {closing} close a thinking that the prompt does not open, as {tok} writes it; "
                             "set prefill='<think>\\n'")
        begun = [self._begun(a, a.sample * len(self.modes) // n, firsts) for a in attempts]
        return attempted(engine, tok, begun, sampling, teacher=teacher)

    def _firsts(self, tok: Tokenizer) -> list[tuple[int, ...]]:
        """Ids that each mode begins with. Raises ValueError where they do not tell the modes apart."""
        firsts = [tuple(tok.encode(m.first, continues=True)[0].tolist()) for m in self.modes]
        if not all(firsts) or len({f[0] for f in firsts}) < len(firsts):
            said = {m.first: f for m, f in zip(self.modes, firsts)}
            raise ValueError(f"the modes must begin with different tokens, got {said} of {tok}; choose other words as "
                             "Mode.first")
        return firsts

    def _begun(self, attempt: Attempt, number: int, firsts: Sequence[tuple[int, ...]]) -> Attempt:
        mode, forced = self.modes[number], firsts[number]
        certain = (0.0,) * (len(forced) - 1)  # a word of several tokens: only the first was drawn
        request = replace(attempt.request, forced=forced, max_new_tokens=mode.limit,
                          forced_logprobs=(-math.log(len(self.modes)), *certain))
        return replace(attempt, request=request, scores={
            f"mode/{m.name}": float(i == number) for i, m in enumerate(self.modes)})


@dataclass(frozen=True, kw_only=True)
class EarlyExits(Plain):
    """One full answer, and `exits` answers that break its thinking off at random places (S-GRPO, 2505.07686).

    Positions P_1 < ... < P_m are drawn uniformly from the tokens of the thinking; behind the first P_i of them comes
    `text`, then the model answers. `n` is exits + 1; a thinking of fewer tokens has fewer exits. Score `exit_position`:
    P_i, for the full answer one more than its thinking has tokens. The full answer stands last.

    text           ends the thinking; injected, never trained on
    answer_tokens  of the answer behind an exit, at most; exits leave room for them in max_new_tokens
    train_prefix   whether an exit trains on the thinking it shares with the full answer too (the paper writes the loss
                   over whole candidates); otherwise those tokens count as injected
    """

    exits: int = 7
    text: str = TIME_IS_LIMITED
    answer_tokens: int = 1024
    train_prefix: bool = False

    def check(self, n: int, sampling: Sampling) -> None:
        if self.exits < 1 or n != self.exits + 1:
            raise ValueError(f"EarlyExits(exits={self.exits}) gives a question exits + 1 answers, got n={n}: set "
                             f"n={self.exits + 1}, or exits={n - 1}")
        if not 1 <= self.answer_tokens < sampling.max_new_tokens:
            raise ValueError(f"EarlyExits.answer_tokens must be at least 1 and less than max_new_tokens="
                             f"{sampling.max_new_tokens}, got {self.answer_tokens}")

    def sample(self, engine: Completer, tok: Tokenizer, questions: Sequence[Trace], sampling: Sampling, *, n: int,
               seed: int = 0, teacher: str = "") -> list[Trace]:
        attempts = attempts_at(questions, tok, seed=seed, prefill=self.prefill)
        stops = with_stops(sampling, tok).stop_ids
        full, cuts = [], []
        for a, trace in zip(attempts, attempted(engine, tok, attempts, sampling, teacher=teacher)):
            assert trace.encoded is not None
            span = thinking_span(trace.encoded.ids[len(a.prompt):], tok, opened=a.opened, stops=stops)
            full.append(trace.replace(scores={**trace.scores, EXIT: float(span[1] - span[0] + 1)}))
            cuts.append(self._cuts(a, trace, span, tok, sampling, seed))
        flat = iter(attempted(engine, tok, [a for of in cuts for a in of], sampling, teacher=teacher))
        return [t for trace, of in zip(full, cuts) for t in (*(next(flat) for _ in of), trace)]

    def _cuts(self, attempt: Attempt, trace: Trace, span: tuple[int, int], tok: Tokenizer, sampling: Sampling, seed: int
              ) -> list[Attempt]:
        """The exits of one full answer, whose thinking is `span` of its tokens."""
        assert trace.encoded is not None and trace.encoded.logprobs is not None
        first, prompt, end = span[0], attempt.prompt, tok.encode(self.text, continues=True)[0].astype(np.int32)
        places = min(span[1], sampling.max_new_tokens - self.answer_tokens - len(end)) - first
        draw = np.random.default_rng(seed_of(seed, attempt.question.group, -1))
        positions = np.sort(draw.choice(max(0, places), min(self.exits, max(0, places)), replace=False)) + 1
        ids, logprobs = trace.encoded.ids[len(prompt):], trace.encoded.logprobs[len(prompt):]
        out = []
        for sample, position in enumerate(positions.tolist(), 1):
            shared = first + position
            begun = Completion(
                ids=np.concatenate([ids[:shared], end]), logprobs=np.full(shared + len(end), np.nan, np.float32),
                behaviour=np.concatenate([logprobs[:shared], np.zeros(len(end), np.float32)]),
                injected=np.arange(shared + len(end)) >= (shared if self.train_prefix else 0), finish="length")
            request = Request(prompt=np.concatenate([prompt, begun.ids]), max_new_tokens=self.answer_tokens,
                              seed=seed_of(seed, attempt.question.group, sample))
            out.append(replace(attempt, sample=sample, request=request, begun=begun, scores={EXIT: float(position)}))
        return out


@dataclass(frozen=True, kw_only=True)
class Chunked(Plain):
    """Answers written in chunks; each begins with little of what was written before (Delethink, 2510.06557).

    The first chunk has at most C = `Sampling.max_new_tokens` tokens, every other one C - carry. Such a one is written
    behind the question, the first `head` tokens of the answer, and its last carry - head; the model sees nothing else.
    The answer ends with its turn, or with its last chunk; it is judged as a whole. For training each chunk is a row of
    its own, and what it saw is prompt, so that every token is trained on once, where it was sampled. Score `chunk`: its
    number, in answers of several. The answer's advantage is that of all of its rows; their field `trace_ids` tells the
    answers apart (`losses.tokens.aggregate.MeanOver`).
    """

    chunks: int = 5
    carry: int = 4096
    head: int = 100

    def check(self, n: int, sampling: Sampling) -> None:
        if self.chunks < 1 or not 0 <= self.head <= self.carry < sampling.max_new_tokens:
            raise ValueError("Chunked needs chunks >= 1 and 0 <= head <= carry < max_new_tokens, got "
                             f"chunks={self.chunks}, head={self.head}, carry={self.carry} and max_new_tokens="
                             f"{sampling.max_new_tokens}")

    def most_rows(self) -> int:
        return self.chunks

    def sample(self, engine: Completer, tok: Tokenizer, questions: Sequence[Trace], sampling: Sampling, *, n: int,
               seed: int = 0, teacher: str = "") -> list[Trace]:
        attempts = attempts_at(questions, tok, n=n, seed=seed, prefill=self.prefill)
        rules, live, answers = with_stops(sampling, tok), list(range(len(attempts))), dict[int, Completion]()
        for chunk in range(self.chunks):
            if not live:
                break
            done = engine.complete([self._request(attempts[i], answers.get(i), chunk, n, seed, sampling)
                                    for i in live], rules)
            for i, c in zip(live, done):
                answers[i] = joined(answers[i], c) if i in answers else c
            live = [i for i in live if answers[i].finish == "length"]
        return [written(a, answers[i], tok, sampling, teacher) for i, a in enumerate(attempts)]

    def _request(self, attempt: Attempt, answer: Completion | None, chunk: int, n: int, seed: int, sampling: Sampling
                 ) -> Request:
        if answer is None:
            return attempt.request
        seed = seed_of(seed, attempt.question.group, attempt.sample + chunk * n)
        return Request(prompt=np.concatenate([attempt.prompt, self.carried(answer.ids)]), seed=seed,
                       max_new_tokens=sampling.max_new_tokens - self.carry)

    def carried(self, ids: np.ndarray) -> np.ndarray:
        """What the next chunk sees of the tokens written so far, at least `carry` of them."""
        return np.concatenate([ids[:self.head], ids[len(ids) - (self.carry - self.head):]])

    def rows(self, trace: Trace, tok: Tokenizer, sampling: Sampling) -> list[Trace]:
        e, size = trace.encoded, sampling.max_new_tokens
        assert e is not None and e.logprobs is not None
        prompt, ids, logprobs = e.ids[:e.prompt_length], e.ids[e.prompt_length:], e.logprobs[e.prompt_length:]
        bounds = [0, *range(size, len(ids), size - self.carry), len(ids)]
        if len(bounds) == 2:
            return [trace]
        opened = attempts_at([prompt_only(trace)], tok, prefill=self.prefill)[0].opened
        out = []
        for number, (begin, end) in enumerate(pairwise(bounds)):
            seen = prompt if not begin else np.concatenate([prompt, self.carried(ids[:begin])])
            last = end == len(ids) and FLAG_TRUNCATED not in trace.flags
            row = completed(prompt_only(trace), seen, Completion(
                ids=ids[begin:end], logprobs=logprobs[begin:end], behaviour=logprobs[begin:end],
                finish="stop" if last else "length"), tok, trace.provenance,
                opened=inside(tok.decode(ids[:begin]), before=opened))
            scores = {**trace.scores, CHUNK: float(number)}
            out.append(row.replace(verdict=trace.verdict, meta=trace.meta, scores=scores))
        return out


def thinking_span(ids: np.ndarray, tok: Tokenizer, *, opened: bool, stops: Sequence[int] = ()) -> tuple[int, int]:
    """(first, end) of the thinking among the tokens of a completion, without its tags; (0, 0) where there is none.

    opened  whether the prompt had opened it; stops: tokens that may end a thinking that was never closed
    """
    sizes = [len(tok.token_bytes(int(i))) for i in ids]
    starts = np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])
    text = b"".join(tok.token_bytes(int(i)) for i in ids)
    lead = len(text) - len(text.lstrip())
    own = text.startswith(OPEN.encode(), lead)
    if not (opened or own):
        return 0, 0
    begin = lead + len(OPEN) if own else 0
    close = text.find(CLOSE.encode(), begin)
    first = int(np.searchsorted(starts, begin))
    if close < 0:
        return first, max(first, len(ids) - int(len(ids) > 0 and int(ids[-1]) in stops))
    return first, max(first, int(np.searchsorted(starts, close, side="right")) - 1)
