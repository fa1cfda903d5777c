"""A model answers questions: completions become traces that remember the ids that were sampled."""

import hashlib
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
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
    sampling = with_stops(sampling, tok)
    prompts = [prompt_ids(q, tok) for q in questions]
    asked = [(q, s) for q in range(len(questions)) for s in range(n)]
    seeds = [seed_of(seed, questions[q].group, s) for q, s in asked]
    requests = [Request(prompt=prompts[q], seed=number) for (q, _), number in zip(asked, seeds)]
    done = engine.complete(requests, sampling, progress=progress)
    rules = {"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": sampling.top_k,
             "min_p": sampling.min_p, "max_new_tokens": sampling.max_new_tokens}
    return [completed(questions[q], prompts[q], c, tok, Provenance(
        source=questions[q].provenance.source, row=questions[q].provenance.row, teacher=teacher,
        sampling={**rules, "seed": number, "sample": s}))
            for (q, s), c, number in zip(asked, done, seeds)]


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
              provenance: Provenance) -> Trace:
    """The question with what was written behind it: segments for a reader, sampled ids and their behaviour log-probs
    for the trainer, the mean log-prob under the model among the scores.

    What has no text at all becomes an empty answer.
    """
    opened = tok.decode(prompt).rstrip().endswith(OPEN)
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
