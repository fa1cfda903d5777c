"""A model answers questions: completions become traces that remember the ids that were sampled."""

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from distill_jax.core.roles import ANSWER, THINK
from distill_jax.data.render import prompt_ids, split_completion
from distill_jax.data.tokenizer import Tokenizer
from distill_jax.decode import Completer, Completion, Generator, Request, Sampling
from distill_jax.traces.trace import (
    FLAG_EMPTY_ANSWER,
    FLAG_TRUNCATED,
    FLAG_UNTERMINATED,
    Encoded,
    Provenance,
    Segment,
    Trace,
)

OPEN, CLOSE = "<think>", "</think>"


def generate_traces(model: Any, params: Any, tok: Tokenizer, questions: Sequence[Trace], sampling: Sampling, *,
                    n: int = 1, seed: int = 0, teacher: str = "", batch_size: int = 256, mesh: Any = None,
                    progress: Callable[[int], None] | None = None) -> list[Trace]:
    """`n` traces for every question: those of the first question, then those of the second, ...

    questions  traces that end where the model is to write (`traces.formats.questions`)
    sampling   stops at the tokenizer's end tokens unless it names others
    seed       with question and sample number it decides the randomness of a trace, whatever else is asked
    Nothing is verified. Raises ValueError for a prompt that does not fit the context.
    """
    generator = Generator(with_real_ids(model, tok), params, batch_size=batch_size, mesh=mesh,
                          token_bytes=tok.token_bytes)
    return sample_traces(generator, tok, questions, sampling, n=n, seed=seed, teacher=teacher, progress=progress)


def sample_traces(engine: Completer, tok: Tokenizer, questions: Sequence[Trace], sampling: Sampling, *,
                  n: int = 1, seed: int = 0, teacher: str = "", progress: Callable[[int], None] | None = None
                  ) -> list[Trace]:
    """`generate_traces` of an engine at hand: a `Generator`, or a server (`rollout.completions`)."""
    attempts = attempts_at(questions, tok, n=n, seed=seed)
    return attempted(engine, tok, attempts, sampling, teacher=teacher, progress=progress)


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """One answer that is asked for.

    sample   its number among those to the question
    request  what the engine is asked
    begun    the answer's first tokens, where they stand in `request.prompt` already, behind the question's prompt
    opened   whether the prompt leaves the model inside a thinking block
    scores   what is known of the answer beforehand, by name
    """

    question: Trace
    sample: int
    request: Request
    begun: Completion | None = None
    opened: bool = False
    scores: Mapping[str, float] = field(default_factory=dict)

    @property
    def prompt(self) -> np.ndarray:
        """i32 [P]: the prompt of the question."""
        return self.request.prompt if self.begun is None else self.request.prompt[:-len(self.begun.ids)]


def attempts_at(questions: Sequence[Trace], tok: Tokenizer, *, n: int = 1, seed: int = 0, prefill: str = ""
                ) -> list[Attempt]:
    """`n` attempts at every question, those at one question together. prefill: what the prompts end with
    (`data.render.prefilled`); where it has thinking tags, they say whether the model begins inside the thinking."""
    out = []
    for q in questions:
        prompt = prompt_ids(q, tok, prefill=prefill)
        opened = inside(prefill, before=_opens(prompt, tok))
        out += [Attempt(question=q, sample=s, opened=opened, request=Request(
            prompt=prompt, seed=seed_of(seed, q.group, s))) for s in range(n)]
    return out


def inside(text: str, *, before: bool) -> bool:
    """Whether a thinking block is open behind `text`; before: whether one was open already."""
    tags = OPEN in text or CLOSE in text
    return text.rfind(OPEN) > text.rfind(CLOSE) if tags else before


def _opens(prompt: np.ndarray, tok: Tokenizer) -> bool:
    return tok.decode(prompt).rstrip().endswith(OPEN)


def attempted(engine: Completer, tok: Tokenizer, attempts: Sequence[Attempt], sampling: Sampling, *,
              teacher: str = "", progress: Callable[[int], None] | None = None) -> list[Trace]:
    """One trace an attempt, in order, unverified."""
    done = engine.complete([a.request for a in attempts], with_stops(sampling, tok), progress=progress)
    return [written(a, completion, tok, sampling, teacher) for a, completion in zip(attempts, done)]


def written(attempt: Attempt, completion: Completion, tok: Tokenizer, sampling: Sampling, teacher: str) -> Trace:
    """The trace of an attempt that the engine answered."""
    a, asked = attempt, attempt.question.provenance
    provenance = Provenance(source=asked.source, row=asked.row, teacher=teacher, sampling={
        "temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": sampling.top_k, "min_p": sampling.min_p,
        "max_new_tokens": a.request.limit(sampling), "seed": a.request.seed, "sample": a.sample})
    whole = completion if a.begun is None else joined(a.begun, completion)
    trace = completed(a.question, a.prompt, whole, tok, provenance, opened=a.opened)
    return trace.replace(scores={**trace.scores, **a.scores}) if a.scores else trace


def joined(begun: Completion, rest: Completion) -> Completion:
    """One completion of two of which the second was written behind the first; it ends as the second does."""
    both = lambda name: np.concatenate([getattr(begun, name), getattr(rest, name)])
    return Completion(ids=both("ids"), logprobs=both("logprobs"), behaviour=both("behaviour"),
                      injected=both("injected"), finish=rest.finish)


def with_real_ids(model: Any, tok: Tokenizer) -> Any:
    """The model giving no mass to ids the tokenizer does not have. Raises ValueError where it has more than the model.
    """
    config = model.config
    if tok.real > config.vocab_size:
        raise ValueError(f"{tok} has {tok.real} ids, the model's head only {config.vocab_size}: give the tokenizer "
                         "that belongs to the model")
    if tok.real >= (config.real_vocab or config.vocab_size):
        return model
    return model.clone(config=replace(config, real_vocab=tok.real))


def with_stops(sampling: Sampling, tok: Tokenizer) -> Sampling:
    """The tokenizer's end tokens where `sampling` names none. Raises ValueError where there are none at all."""
    if sampling.stop_ids or tok.eos_ids:
        return sampling if sampling.stop_ids else replace(sampling, stop_ids=tok.eos_ids)
    raise ValueError(f"{tok} names no token that ends a turn; give the ids of such tokens as stop_ids")


def seed_of(seed: int, group: str, sample: int) -> int:
    """32-bit seed of one sample of one question: it depends on nothing else that is asked."""
    return int.from_bytes(hashlib.blake2b(f"{seed} {group} {sample}".encode(), digest_size=4).digest(), "little")


def completed(question: Trace, prompt: np.ndarray, completion: Completion, tok: Tokenizer,
              provenance: Provenance, *, opened: bool | None = None) -> Trace:
    """The question with what was written behind it: segments for a reader, sampled ids and their behaviour log-probs
    for the trainer, the mean log-prob under the model among the scores.

    What has no text at all becomes an empty answer. opened: whether the prompt leaves the model inside a thinking
    block; None: if it ends with `<think>`.
    """
    if opened is None:
        opened = _opens(prompt, tok)
    text = tok.decode(completion.ids)
    thinking, answer, _ = split_completion(completion.ids, tok, opened=opened)
    thinking, answer = re.sub(r"^ ?\n?", "", thinking), re.sub(r"^ ?\n*", "", answer)  # sentencepiece adds the blank
    flags = []
    if CLOSE not in text and (opened or text.lstrip().startswith(OPEN)):
        flags.append(FLAG_UNTERMINATED)
    if not answer.strip():
        flags.append(FLAG_EMPTY_ANSWER)
    if completion.finish == "length":
        flags.append(FLAG_TRUNCATED)
    turn = question.last_turn
    segments = [Segment(role=THINK, text=thinking, turn=turn)] if thinking else []
    if answer or not segments:
        segments.append(Segment(role=ANSWER, text=answer, turn=turn))
    known = completion.logprobs[np.isfinite(completion.logprobs)]
    scores = {"mean_logprob": float(known.mean(dtype=np.float64))} if len(known) else {}
    injected = np.concatenate([np.zeros(len(prompt), bool), completion.injected])
    logprobs = np.concatenate([np.zeros(len(prompt), np.float32), completion.behaviour])
    encoded = Encoded(tokenizer=tok.hash, ids=np.concatenate([prompt, completion.ids]).astype(np.int32),
                      prompt_length=len(prompt), logprobs=logprobs, injected=injected if injected.any() else None)
    return Trace(segments=(*question.segments, *segments), gold=question.gold, group=question.group,
                 meta=question.meta, flags=tuple(flags), encoded=encoded, provenance=provenance,
                 scores=scores)
