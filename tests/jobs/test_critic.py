"""PPO: advantages by hand, what a critic says of a round, and a run that learns, is killed and goes on."""

import io
import os
import signal
from dataclasses import replace

import jax
import numpy as np
import pytest
from rich.console import Console

from distill_jax.core import spec
from distill_jax.jobs.clipping import clipped
from distill_jax.jobs.estimates import load_estimates, written
from distill_jax.jobs.reinforce import ReinforceSteering, RoundSource
from distill_jax.jobs.run_recipe import run_recipe
from distill_jax.jobs.show_rollouts import show_rollouts
from distill_jax.loading import load
from distill_jax.losses.rows.value import value_error
from distill_jax.losses.tokens.policy import ppo_clip
from distill_jax.objective.term import Term
from distill_jax.objective.tokens import TokenTerm
from distill_jax.recipe import Critic, Frozen, Student
from distill_jax.rewards.algebra import Reward
from distill_jax.rollout.advantages import gae
from distill_jax.rollout.estimators import Gae, Penalised
from distill_jax.rollout.scoring import SignalSpec, score_rows
from distill_jax.traces.store import TraceStore
from distill_jax.traces.trace import FLAG_TRUNCATED
from distill_jax.train.checkpoint import latest_params
from distill_jax.train.optim import AdamW
from tests.jobs.test_reinforce import metrics, recipe, world

__all__ = ["world"]


def one(sample):
    return 1.0


OPTIM = AdamW(peak_lr=0.1, warmup=1)


def ppo(world, runs, *, rows=8, every=2, estimator=None, others=None, **kwargs):
    """A critic that does not move the student, KL to the start in the reward."""
    terms = {"policy": TokenTerm(ppo_clip),
             "value": Term(value_error, student="critic/main", target="fields", weight=0.5, kwargs={"clip": 0.2})}
    providers = {"reference": Frozen(str(world[0])), "critic": Critic(optim=OPTIM), **(others or {})}
    estimator = estimator or Gae(gamma=0.9, lam=0.8, reference="reference", beta=0.1, whiten=False)
    return recipe(world, runs, rows=rows, every=every, policy=terms, providers=providers, advantage=estimator,
                  equal="keep", **kwargs)


def params(r, provider):
    return jax.tree.map(np.asarray, latest_params(r.folder / "checkpoints", provider))


def test_killed_and_started_again_ends_with_the_same_bits_and_its_fields_are_right(world, tmp_path, monkeypatch):
    seen = {}
    original = RoundSource.batch
    monkeypatch.setattr(RoundSource, "batch", lambda self, step, r=None: seen.setdefault(
        step, original(self, step, r)))
    whole = ppo(world, tmp_path / "whole")
    assert spec.load(whole.to_yaml()) == whole
    assert run_recipe(whole, lambda line: None)
    update = ReinforceSteering.update

    def interrupted(self, state, params, step):
        out = update(self, state, params, step)
        if step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return out

    cut = ppo(world, tmp_path / "cut")
    with monkeypatch.context() as patch:
        patch.setattr(ReinforceSteering, "update", interrupted)
        assert not run_recipe(cut, lambda line: None)
    assert run_recipe(cut, lambda line: None)
    for provider in ("student", "critic"):
        for a, b in zip(*(jax.tree.leaves(params(r, provider)) for r in (cut, whole)), strict=True):
            np.testing.assert_array_equal(a, b)
    check_fields(whole, world[0], seen)
    check_clipping(whole)
    assert len(metrics(whole.folder, "value")) == 4 and metrics(whole.folder, "rollouts/explained_variance")


def check_fields(run, start, seen):
    """Round 0: V = 0 and the reference is the student, so A is the discounted reward. Round 2: GAE of what is said."""
    model, weights = load(start)
    for since in (0, 2):
        store = TraceStore.open(str(run.folder / "rollouts" / f"{since:07d}"))
        said = load_estimates(run.folder / "rollouts" / f"{since:07d}.npz")
        rows = [store.row(i) for i in range(len(store))]
        reference = score_rows(model, weights, rows, SignalSpec.parse("token"))
        wanted = {}
        for i, (row, trace) in enumerate(zip(rows, store.traces(), strict=True)):
            at = written(row)
            values = said["old_values"][i][at]
            kl = trace.encoded.logprobs[at] - reference[i].logprobs[at]
            rewards = -0.1 * kl
            rewards[-1] += trace.scores["reward"]
            assert np.abs(kl).max() < 1e-4 if since == 0 else np.abs(kl).max() > 1e-3
            assert np.all(values == 0) if since == 0 else np.abs(values).max() > 1e-3
            want = gae(rewards, values, gamma=0.9, lam=0.8)
            np.testing.assert_allclose(said["advantages"][i][at], want, atol=1e-4)
            np.testing.assert_allclose(said["returns"][i][at], want + values, atol=1e-4)
            assert not said["advantages"][i][~at].any()
            assert abs(trace.scores["advantage"] - said["advantages"][i][at].mean()) < 1e-6
            wanted[trace.encoded.ids.tobytes()] = i
        for step in (since, since + 1):
            main = seen[step].main
            for b in range(8):
                there = main.segment_ids[b] > 0
                i = wanted.pop(main.tokens[b][there].tobytes())
                for name in ("advantages", "returns", "old_values"):
                    np.testing.assert_array_equal(main.fields[name][b][there], said[name][i])
        assert not wanted


def check_clipping(run):
    """`rollouts inspect --clip`: the ratios under the checkpoint at the end, with the bounds of the recipe's term."""
    store = TraceStore.open(str(run.folder / "rollouts" / "0000002"))
    traces = list(store.traces())
    found = clipped(run.folder, 2, store, traces)
    assert (found.checkpoint, found.rule) == (4, "ppo_clip()")
    advantages = load_estimates(run.folder / "rollouts" / "0000002.npz")["advantages"]
    scored = score_rows(*load(run.folder), found.rows, SignalSpec.parse("token"))
    for row, trace, a, s, marks in zip(found.rows, traces, advantages, scored, found.marks, strict=True):
        ratio = np.exp(s.logprobs - trace.encoded.logprobs)
        np.testing.assert_array_equal(marks, written(row) & (((ratio > 1.2) & (a > 0)) | ((ratio < 0.8) & (a < 0))))
    share = sum(m.sum() for m in found.marks) / sum(t.sum() for t in found.trained)
    assert 0 < share < 1
    console = Console(record=True, width=200, file=io.StringIO())
    show_rollouts(str(run.folder), 3, console, groups=range(4), clip=(None, None))
    shown = console.export_text()
    assert f"clipped by ppo_clip() under the checkpoint of update 4: {share:.2%} of the trained tokens" in shown
    cut = [t for t in traces if FLAG_TRUNCATED in t.flags]
    assert shown.count("[cut here: the limit of 24 tokens]") == len(cut) > 0
    assert shown.split("group 0:")[1].count("\u27e6") == shown.split("group 0:")[1].count("\u27e7") > 0
    wider = clipped(run.folder, 2, store, traces, low=0.9)
    assert wider.rule == "ppo_clip(low=0.9, high=0.2)"
    assert sum(m.sum() for m in wider.marks) < sum(m.sum() for m in found.marks)
    assert not any((w & ~f).any() for w, f in zip(wider.marks, found.marks, strict=True))


def test_a_critic_approaches_a_constant_reward(world, tmp_path):
    """gamma = lam = 1 and a reward of 1: every return is 1; first the advantages are, later the values. The critic has
    a model of its own, which learns at its own rate beside a student that stands still."""
    trunk = Student(model=str(world[0]), optim=AdamW(peak_lr=1e-3, warmup=1))
    r = ppo(world, tmp_path, steps=8, every=1, rows=16, estimator=Gae(lam=1.0, whiten=False), reward=Reward(fn=one),
            lr=0.0, others={"trunk": trunk, "critic": Critic(reads="trunk", detach=False, optim=OPTIM)})
    assert run_recipe(r, lambda line: None)
    np.testing.assert_allclose(metrics(r.folder, "rollouts/return"), 1.0, atol=1e-6)
    values = metrics(r.folder, "rollouts/value")
    assert values[0] == 0 and abs(values[-1] - 1) < 0.35, values
    first = load_estimates(r.folder / "rollouts" / "0000000.npz")
    for a, b in zip(first["advantages"], first["returns"], strict=True):
        np.testing.assert_array_equal(a, b)
    moved = {name: max(float(np.abs(a - b).max()) for a, b in zip(*(jax.tree.leaves(p) for p in (
        params(r, name), load(world[0])[1])), strict=True)) for name in ("student", "trunk")}
    assert moved["student"] == 0 and moved["trunk"] > 1e-4, moved


def test_micro_batches_and_packing_change_nothing(world, tmp_path):
    """Student and critic end alike, however the answers of a round are laid out and cut up."""
    runs = {"plain": ppo(world, tmp_path / "plain", rows=16, every=1, steps=2),
            "packed": ppo(world, tmp_path / "packed", rows=16, every=1, steps=2, pack=True)}
    cut = ppo(world, tmp_path / "cut", rows=16, every=1, steps=2)
    runs["cut"] = replace(cut, stages=(replace(cut.stages[0], micro_batches=2),))
    for r in runs.values():
        assert run_recipe(r, lambda line: None)
    for name in ("packed", "cut"):
        for provider in ("student", "critic"):
            for a, b in zip(*(jax.tree.leaves(params(runs[n], provider)) for n in ("plain", name)), strict=True):
                np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-6, err_msg=f"{name} {provider}")


def test_what_cannot_be_is_said(world, tmp_path):
    with pytest.raises(ValueError, match=r"Gae reads the provider 'values', which must be a Critic; .*\['critic'\]"):
        ppo(world, tmp_path, estimator=Gae(critic="values"))
    with pytest.raises(ValueError, match=r"Penalised reads the provider 'start', which must be a Student"):
        ppo(world, tmp_path, estimator=Penalised(reference="start"))
    with pytest.raises(ValueError, match="is missing: the advantages of the round"):
        load_estimates(tmp_path / "0000000.npz")
