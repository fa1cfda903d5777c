"""Small stores for tests: rendered traces with a made-up teacher."""

from pathlib import Path

import numpy as np

from distill_jax.data.render import render, template_id
from distill_jax.data.tokenizer import Tokenizer
from distill_jax.traces.store import Row, SignalHeader, StoreHeader, TokenRow, TopKRow, TraceStore
from distill_jax.traces.trace import Trace, simple_trace

WORDS = ["apples", "numbers", "answer", "result", "check", "three", "think", "plus", "Alice", "Bob"]


def some_traces(n: int, seed: int = 0, **kwargs) -> list[Trace]:
    rng = np.random.default_rng(seed)
    say = lambda k: " ".join(rng.choice(WORDS, k))
    return [simple_trace(f"What is {i}? {say(3)}", say(int(rng.integers(2, 30))) + f". {i}", f"The answer is {i}.",
                         gold=str(i), verdict=(True, False, None)[i % 3], **kwargs) for i in range(n)]


def topk_of(row: Row, k: int, vocabulary: int, seed: int = 0) -> TopKRow:
    """A teacher that ranks the token that stands there first, with probability 0.5 + id / 2V."""
    rng = np.random.default_rng([seed, len(row.tokens)])
    n = len(row.tokens)
    ids = np.empty((n, k), np.int32)
    ids[:, 0] = row.tokens
    for t in range(n):
        others = rng.permutation(vocabulary)
        ids[t, 1:] = others[others != row.tokens[t]][:k - 1]
    first = 0.5 + row.tokens / (2.0 * vocabulary)
    rest = (1 - first)[:, None] * np.array([0.5 ** (j + 2) for j in range(k - 1)])
    mask = np.ones(n, bool)
    mask[0] = False  # nothing predicts the first token
    return TopKRow(ids=ids, logprobs=np.log(np.concatenate([first[:, None], rest], 1)).astype(np.float32), mask=mask)


def make_store(path: Path, traces: list[Trace], tok: Tokenizer, signal: str | None = None, k: int = 4,
               shift: int = 0) -> TraceStore:
    """`signal`: "topk" or "token", written under that name; `shift` moves it by so many tokens (a planted error)."""
    store = TraceStore.create(str(path), StoreHeader(tokenizer=tok.info(), template=template_id(tok)))
    with store.writer(shard_rows=16) as out:
        for t in traces:
            out.append(render(t, tok))
    store = TraceStore.open(str(path))
    if signal:
        header = SignalHeader(kind=signal, k=k if signal == "topk" else 0, teacher="made up", precision="f32")
        with store.signal_writer(signal, header) as out:
            for i in range(len(store)):
                row = topk_of(store.row(i), k, tok.real)
                roll = lambda x: np.roll(x, shift, axis=0)
                mask = row.mask.copy()
                if shift:
                    mask[:abs(shift)] = False
                if signal == "topk":
                    out.append(TopKRow(ids=roll(row.ids), logprobs=roll(row.logprobs), mask=mask))
                else:
                    out.append(TokenRow(logprobs=roll(row.logprobs[:, 0]), mask=mask))
    return store


def judged_answers(questions: list[Trace]) -> list[Trace]:
    """Four answers to each question, judged: as it is; thought twice; the answer to the next question behind the same
    thinking; the next one's thinking and answer. Scores "reward": 1, 0.5, 0.25, 0."""
    out = []
    for i, t in enumerate(questions):
        other = questions[(i + 1) % len(questions)]
        kinds = [(t.thinking, t.answer), (f"{t.thinking} {t.thinking}", t.answer), (t.thinking, other.answer),
                 (other.thinking, other.answer)]
        out += [simple_trace(t.question, thinking, answer, system=t.system, gold=t.gold, group=t.group,
                             verdict=k < 2, scores={"reward": (1.0, 0.5, 0.25, 0.0)[k]})
                for k, (thinking, answer) in enumerate(kinds)]
    return out
