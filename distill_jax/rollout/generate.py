"""A model answers questions: completions of the decoder become Traces that train like any others."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, replace

import numpy as np

from distill_jax.core.roles import ANSWER, INJECTED, THINK, TOOL, TOOL_CALL
from distill_jax.data.render import prompt_ids, split_completion
from distill_jax.data.tokenizer import Tokenizer
from distill_jax.decode.generator import Completion, Generator
from distill_jax.decode.sampling import Sampling
from distill_jax.traces.trace import (
    FLAG_EMPTY_ANSWER,
    FLAG_TRUNCATED,
    FLAG_UNTERMINATED,
    Encoded,
    Provenance,
    Segment,
    Trace,
)

WRITTEN = (THINK, ANSWER, TOOL_CALL, TOOL, INJECTED)
THINK_CLOSE = "</think>"


def generate_traces(generator: Generator, tok: Tokenizer, questions: Sequence[Trace], sampling: Sampling, *, n: int = 1,
                    seed: int = 0, first: int = 0, teacher: str = "",
                    progress: Callable[[int], None] | None = None) -> list[Trace]:
    """n answers to each question, question by question; what the questions held beyond their prompt is ignored.

    first   number of the first question: sample s of question q is drawn with a seed of (seed, first + q, s), so the
            answers do not depend on how the questions are cut into calls
    Returns traces with the sampled ids and their log-probs (`Trace.encoded`), not yet verified.
    """
    rules = sampling if sampling.stop_ids else replace(sampling, stop_ids=tuple(tok.eos_ids))
    prompts = [prompt_ids(prompt_of(q), tok) for q in questions]
    asked = [p for p in prompts for _ in range(n)]
    seeds = [int(np.random.SeedSequence((seed, first + q, s)).generate_state(1)[0])
             for q in range(len(questions)) for s in range(n)]
    done = generator.generate(asked, rules, seeds, progress=progress)
    return [answered(questions[i // n], asked[i], c, tok, sampling, teacher=teacher, row=first + i // n)
            for i, c in enumerate(done)]


def prompt_of(question: Trace) -> Trace:
    """The question without the last written turn, with an empty answer in its place: what the prompt is made of."""
    last = question.last_turn
    kept = tuple(s for s in question.segments if s.turn < last or s.role not in WRITTEN)
    return question.replace(segments=(*kept, Segment(role=ANSWER, text="", turn=last)))


def answered(question: Trace, prompt: np.ndarray, completion: Completion, tok: Tokenizer, sampling: Sampling, *,
             teacher: str = "", row: int = -1) -> Trace:
    """The question's trace with a completion as its last turn."""
    thinking, answer, _ = split_completion(completion.ids, tok)
    cut = completion.finish == "length"
    unended = bool(thinking) and THINK_CLOSE not in tok.decode(completion.ids)
    flags = [f for f, on in ((FLAG_UNTERMINATED, unended), (FLAG_TRUNCATED, cut),
                             (FLAG_EMPTY_ANSWER, not answer.strip() and not unended)) if on]
    turn = question.last_turn
    written = [Segment(role=THINK, text=thinking, turn=turn)] if thinking else []
    written.append(Segment(role=ANSWER, text=answer, turn=turn))
    before = tuple(s for s in question.segments if s.turn < turn or s.role not in WRITTEN)
    ids = np.concatenate([prompt, completion.ids]).astype(np.int32)
    logprobs = np.concatenate([np.zeros(len(prompt), np.float32), completion.behaviour.astype(np.float32)])
    return question.replace(
        segments=(*before, *written), verdict=None, flags=tuple(flags), scores={},
        provenance=Provenance(source=question.provenance.source, row=row, teacher=teacher,
                              sampling=asdict(sampling), parents=(question.id,)),
        encoded=Encoded(tokenizer=tok.hash, ids=ids, prompt_length=len(prompt), logprobs=logprobs))
