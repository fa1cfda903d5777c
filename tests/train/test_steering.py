"""A steered source: its state is measured, checkpointed with the rest, and a resumed run reads what it would have."""

import dataclasses
import os
import signal

import jax
import numpy as np

from distill_jax.core import tree
from distill_jax.data import mixture
from distill_jax.train.loop import STEERED, Run, fit
from tests.train.tiny import Synthetic, setup


class Tagged(Synthetic):
    """Batches that depend on what was read before, as those of a mix do; `stop_at` sends a signal."""

    stop_at = -1

    def batch(self, step):
        if step == self.stop_at:
            os.kill(os.getpid(), signal.SIGTERM)
        return super().batch(step)


class Steering:
    """Shares by the size of the parameters; three sources, told apart by the seed."""

    every = 3

    def __init__(self, stop_at=-1):
        self.stop_at, self.asked = stop_at, []

    def source(self, state):
        source = Tagged(seed=100 * int(state["rounds"]) + int(np.argmax(state["shares"])))
        object.__setattr__(source, "stop_at", self.stop_at)
        return source

    def update(self, state, params, step):
        self.asked.append(step)
        norm = float(tree.global_norm(params))
        return mixture.steered(state, np.array([norm % 1, 0.5]), 0.5, step, (8 * step, 0))

    def numbers(self, state):
        return {"largest": float(np.max(state["shares"]))}


def train(folder, steering, steps=8):
    config, state = setup(total=20)
    small = jax.device_put(mixture.initial((1.0, 1.0)), state.step.sharding)
    state = dataclasses.replace(state, controllers={**state.controllers, STEERED: small})
    run = Run(folder=folder, steps=steps, log_every=4, save_every=100)
    return fit(config, state, Synthetic(), run, steering=steering)


def test_resume_is_to_the_bit(tmp_path, capsys):
    whole = Steering()
    end = train(tmp_path / "whole", whole)
    assert whole.asked == [0, 3, 6] and int(end.state.controllers[STEERED]["rounds"]) == 3
    assert "update 3: largest 0." in capsys.readouterr().out
    first = train(tmp_path / "cut", Steering(stop_at=5))
    assert first.stopped == "SIGTERM" and 5 <= first.step < 8
    rest = Steering()
    second = train(tmp_path / "cut", rest)
    assert second.step == 8 and 0 not in rest.asked and rest.asked in ([6], [])
    for a, b in zip(jax.tree.leaves(second.state), jax.tree.leaves(end.state), strict=True):
        np.testing.assert_array_equal(a, b)
