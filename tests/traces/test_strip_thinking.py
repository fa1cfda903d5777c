import numpy as np

from distill_jax.traces.ops.base import run_op
from distill_jax.traces.ops.strip_thinking import StripThinking
from distill_jax.traces.trace import Encoded, simple_trace


def test_only_the_thinking_goes_and_the_question_stays_the_same():
    t = simple_trace("q", "thought", "a", gold="a", encoded=Encoded(tokenizer="h", ids=np.arange(4), prompt_length=1))
    (out,) = run_op(StripThinking(), [t], np.random.default_rng(0))
    assert (out.question, out.thinking, out.answer, out.gold, out.group) == ("q", "", "a", "a", t.group)
    assert out.encoded is None and out.provenance.ops == ("strip_thinking",) and t.thinking == "thought"
