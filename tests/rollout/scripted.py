"""What tests of environments share: tokenizers with three templates, and an engine that is a script, not a model."""

from dataclasses import dataclass, field

import numpy as np

from distill_jax.core.roles import SUPERVISED
from distill_jax.data.render import render
from distill_jax.decode import Completion, Sampling
from distill_jax.rewards.check import Verdict
from distill_jax.rewards.sample import Sample
from distill_jax.rollout.environments import EarlyExits, Mode, Modes
from distill_jax.traces.formats.questions import prompt_only
from tests.data.conftest import CHATML
from tests.data.storing import some_traces

GENERATION = "assistant\\n' }}"
TEMPLATES = {
    "plain": CHATML,
    "opens": CHATML.replace(GENERATION, "assistant\\n<think>\\n' }}"),  # R1
    "switch": CHATML.replace(GENERATION, "assistant\\n' + ('<think>\\n\\n</think>\\n\\n' if enable_thinking is defined "
                                         "and enable_thinking is false else '') }}"),  # Qwen3
}
RULES = Sampling(temperature=1.0, max_new_tokens=60)
WRITTEN = [int(r) for r in SUPERVISED]
MODES = Modes(modes=(Mode(name="no_think", first="</think>", limit=20), Mode(name="think", first="A", limit=40)))
EXITS = EarlyExits(exits=4, text="Stop.\n</think>\n\n", answer_tokens=10)


@dataclass
class Script:
    """An engine that writes `text(prompt text, seed)` behind every prompt; the k-th token of an answer has log-prob
    -(k + 1) / 100 under the model and half of it as it was drawn."""

    tok: object
    text: object
    asked: list = field(default_factory=list)

    def complete(self, requests, sampling, *, progress=None):
        self.asked += requests
        return [self._one(r, r.limit(sampling)) for r in requests]

    def _one(self, r, limit):
        body = self.text(self.tok.decode(r.prompt), r.seed)
        ids = [*r.forced, *self.tok.encode(body, continues=True)[0].tolist(), self.tok.eos_ids[0]]
        stop, ids = len(ids) <= limit, np.array(ids[:limit], np.int32)
        logprobs = -np.arange(1, len(ids) + 1, dtype=np.float32) / 100
        behaviour = logprobs / 2
        n = len(r.forced)
        behaviour[:n] = r.forced_logprobs or 0.0
        return Completion(ids=ids, logprobs=logprobs, behaviour=behaviour, finish="stop" if stop else "length")


def questions(n=2):
    return [prompt_only(t) for t in some_traces(n)]


def answered(trace):
    """(ids, log-probs, injected) of what stands behind the prompt."""
    e = trace.encoded
    injected = np.zeros(len(e.ids), bool) if e.injected is None else e.injected
    return e.ids[e.prompt_length:], e.logprobs[e.prompt_length:], injected[e.prompt_length:]


def trained(trace, tok):
    """bool over the tokens of an answer: which of them a term is taken on; none of the prompt is."""
    roles = render(trace, tok).roles
    assert len(roles) == len(trace.encoded.ids)
    assert not np.isin(roles[:trace.encoded.prompt_length], WRITTEN).any()
    return np.isin(roles[trace.encoded.prompt_length:], WRITTEN)


def judged(trace, right):
    return Sample.of(trace, verdict=Verdict(correct=right, extracted=None, method="number"))
