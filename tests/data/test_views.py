"""Views made of a batch on the device."""

import numpy as np

from distill_jax.core.roles import ANSWER, QUESTION, THINK
from distill_jax.data.views import without_thinking
from tests.train.tiny import Synthetic


def test_without_thinking_keeps_everything_else_in_order():
    stream = Synthetic().batch(0).main
    out = without_thinking(stream)
    for b in range(stream.tokens.shape[0]):
        keep = (stream.roles[b] != THINK) & (stream.segment_ids[b] != 0)
        n = keep.sum()
        assert 0 < n < keep.size
        for name in ("tokens", "segment_ids", "roles", "weights", "row_ids"):
            np.testing.assert_array_equal(getattr(out, name)[b, :n], getattr(stream, name)[b][keep], err_msg=name)
        assert set(np.asarray(out.roles[b, :n])) == {QUESTION, ANSWER}
        assert not np.any(out.segment_ids[b, n:]) and not np.any(out.weights[b, n:])
        assert np.all(out.row_ids[b, n:] == -1)
        for segment in set(np.asarray(out.segment_ids[b, :n])):
            at = np.asarray(out.segment_ids[b]) == segment
            np.testing.assert_array_equal(out.positions[b][at], np.arange(at.sum()))
