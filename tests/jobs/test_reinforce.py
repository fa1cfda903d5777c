"""RL on the student's own answers: what is judged, what is trained on, what is learned, and resuming."""

import dataclasses
import io
import json
import os
import signal

import jax
import numpy as np
import pytest
from rich.console import Console

from distill_jax.core import spec
from distill_jax.core.roles import SUPERVISED
from distill_jax.data.source_specs import Store
from distill_jax.data.tokenizer import load_tokenizer
from distill_jax.decode.sampling import Sampling
from distill_jax.jobs.reinforce import ReinforceSteering, RoundSource
from distill_jax.jobs.run_recipe import run_recipe
from distill_jax.jobs.show_rollouts import show_rollouts
from distill_jax.loading import load
from distill_jax.losses.rows.cross_entropy import cross_entropy
from distill_jax.losses.tokens.aggregate import sequence_mean
from distill_jax.losses.tokens.policy import ppo_clip
from distill_jax.objective.term import Term
from distill_jax.objective.tokens import TokenTerm, policy_metrics
from distill_jax.recipe import MeshShape, Recipe, Saving, Stage, Student
from distill_jax.recipe_file import load_recipe
from distill_jax.rewards.algebra import Reward, Sum
from distill_jax.rollout.advantages import group_mean, group_z
from distill_jax.rollout.reinforce import Monitor, Reinforce
from distill_jax.traces.store import TraceStore
from distill_jax.train.checkpoint import latest_params
from distill_jax.train.flops import Flops
from distill_jax.train.optim import AdamW
from tests.data.conftest import tiny_folder
from tests.data.storing import make_store, some_traces
from tests.jobs.teachers import teacher_folder


def evenness(sample):
    """Share of even ids: a random model learns it in a few updates."""
    e = sample.trace.encoded
    return float(np.mean(e.ids[e.prompt_length:] % 2 == 0))


def nothing(sample):
    return 0.0


@dataclasses.dataclass(frozen=True)
class Counted:
    """A reward with a memory: how many samples it has seen."""

    def init(self):
        return {"seen": np.int32(0)}

    def value(self, samples, state):
        return [float(state["seen"])] * len(samples)

    def update(self, samples, state):
        return {"seen": np.int32(state["seen"] + len(samples))}


REWARD = Sum(parts={"even": Reward(fn=evenness), "seen": Reward(fn=Counted())}, weights={"seen": 0.0})


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """(student folder, store of questions)."""
    root = tmp_path_factory.mktemp("world")
    tok = load_tokenizer(tiny_folder(root / "tokenizer"))
    make_store(root / "store", some_traces(24), tok)
    return teacher_folder(root / "student", tok), root / "store"


def recipe(world, runs, *, rows=16, pack=False, steps=4, lr=0.01, policy=None, providers=None, saving=100, **kwargs):
    student, store = world
    options = {"prompts": 4, "n": 4, "reward": REWARD, "batch_size": 16,
               "sampling": Sampling(temperature=1.0, max_new_tokens=24)} | kwargs
    terms = policy or {"policy": TokenTerm(ppo_clip, per=sequence_mean), **policy_metrics()}
    return Recipe(name="rl", runs=str(runs), mesh=MeshShape(data=1, fsdp=8), stages=(Stage(
        source=Store(path=str(store), rows=rows, seq_len=96, pack=pack), terms=terms, steps=steps, log_every=1,
        providers={"student": Student(model=str(student)), **(providers or {})}, on_policy=Reinforce(**options),
        optim=AdamW(peak_lr=lr, warmup=1), saving=Saving(steps=saving, keep=1)),))


def metrics(folder, name):
    lines = [json.loads(x) for x in (folder / "metrics" / "train.jsonl").read_text().splitlines()]
    return [line[name] for line in lines if name in line]


@pytest.mark.parametrize("pack,rows,every", [(False, 16, 1), (True, 8, 2)])
def test_every_answer_is_trained_on_once_as_it_was_sampled(world, tmp_path, monkeypatch, pack, rows, every):
    seen = {}
    original = RoundSource.batch
    monkeypatch.setattr(RoundSource, "batch", lambda self, step, r=None: seen.setdefault(
        step, original(self, step, r)))
    r = recipe(world, tmp_path, pack=pack, rows=rows, every=every)
    assert spec.load(r.to_yaml()) == r
    assert run_recipe(r, lambda line: None)
    rounds = [TraceStore.open(str(p)) for p in sorted((r.folder / "rollouts").iterdir())]
    assert len(rounds) == 4 // every and sorted(seen) == [0, 1, 2, 3]
    for number, store in enumerate(rounds):
        traces = list(store.traces())
        assert len(traces) == 16 and len({t.group for t in traces}) == 4
        groups = np.unique([t.group for t in traces], return_inverse=True)[1]
        reward = np.array([t.scores["reward"] for t in traces])
        np.testing.assert_allclose([t.scores["advantage"] for t in traces], group_z(reward, groups), atol=1e-6)
        assert {t.scores["reward/seen"] for t in traces} == {16.0 * number}  # the memory goes on from round to round
        wanted = {t.encoded.ids.tobytes(): t for t in traces if t.scores["trained"]}
        for step in range(number * every, (number + 1) * every):
            main = seen[step].main
            for b in range(rows):
                for segment in range(1, int(main.segment_ids[b].max()) + 1):
                    at = main.segment_ids[b] == segment
                    t = wanted.pop(main.tokens[b][at].tobytes())
                    np.testing.assert_array_equal(main.fields["behaviour_logprobs"][b][at], t.encoded.logprobs)
                    assert set(main.fields["advantages"][b][at]) == {np.float32(t.scores["advantage"])}
                    written = np.arange(at.sum()) >= t.encoded.prompt_length
                    assert np.array_equal(np.isin(main.roles[b][at], [int(x) for x in SUPERVISED]), written)
        assert not wanted, "some answers were never read"
    result = json.loads((r.folder / "done.json").read_text())["result"]
    sampled = [len(t.encoded.ids) - t.encoded.prompt_length for store in rounds for t in store.traces()]
    masks = {step: np.isin(batch.main.roles, [int(x) for x in SUPERVISED]) for step, batch in seen.items()}
    count = Flops.of(load(world[0])[0].config).count
    assert result["sampled_tokens"] == sum(sampled)
    assert result["trained_tokens"] == sum(int(m.sum()) for m in masks.values()) <= sum(sampled)
    assert result["flops"] == pytest.approx(sum(float(count(b.main, masks[s])) for s, b in seen.items()))
    if every == 1:  # strictly on-policy: the trainer's log-probs are the sampler's
        assert max(abs(x - 1) for x in metrics(r.folder, "mean_ratio")) < 1e-3
        assert max(metrics(r.folder, "clip_fraction")) == 0 and max(metrics(r.folder, "logprob_gap")) < 1e-3


def test_what_is_rewarded_becomes_frequent(world, tmp_path):
    r = recipe(world, tmp_path, steps=24, lr=0.03)
    assert run_recipe(r, lambda line: None)
    console = Console(record=True, width=200, file=io.StringIO())
    show_rollouts(str(tmp_path), 7, console, groups=[0, 3])
    shown = console.export_text()
    assert "rollouts of update 7: 16 answers" in shown and "group 3: What is" in shown
    assert shown.count("advantage") == 8 and shown.count("- wrong") + shown.count("- not judged") == 8
    with pytest.raises(ValueError, match="no group 4; the round has groups 0 to 3"):
        show_rollouts(str(tmp_path), None, console, groups=[4])
    with pytest.raises(ValueError, match="has no rollouts"):
        show_rollouts(str(world[1]), None, console)
    rewards = metrics(r.folder, "rollouts/reward")
    assert len(rewards) == 24 and np.mean(rewards[:3]) < 0.65 and np.mean(rewards[-3:]) > 0.8


def test_groups_of_equal_rewards_are_dropped_and_others_asked_in_their_place(world, tmp_path):
    r = recipe(world, tmp_path, steps=1, reward=Reward(fn=nothing), refill=2)
    assert run_recipe(r, lambda line: None)
    (store,) = [TraceStore.open(str(p)) for p in (r.folder / "rollouts").iterdir()]
    traces = list(store.traces())
    assert len({t.group for t in traces}) == 12 and not any(t.scores["trained"] for t in traces)
    assert metrics(r.folder, "rollouts/equal_groups") == [1.0] and metrics(r.folder, "loss") == [0.0]
    start, end = (jax.tree.leaves(x) for x in (latest_params(r.folder / "checkpoints", "student"), None))
    assert all(np.isfinite(x).all() for x in start) and not end
    kept = recipe(world, tmp_path / "kept", steps=1, reward=Reward(fn=nothing), equal="keep", advantage=group_mean)
    assert run_recipe(kept, lambda line: None) and metrics(kept.folder, "rollouts/trained") == [1.0]


def test_killed_and_started_again_ends_with_the_same_bits(world, tmp_path, monkeypatch):
    """Also where rounds that no checkpoint needs are deleted on the way."""
    whole = recipe(world, tmp_path / "whole", every=2, steps=6, keep_rounds=0)
    assert run_recipe(whole, lambda line: None)
    original = ReinforceSteering.update

    def interrupted(self, state, params, step):
        if step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, state, params, step)

    cut = recipe(world, tmp_path / "cut", every=2, steps=6, keep_rounds=1, saving=1)
    with monkeypatch.context() as patch:
        patch.setattr(ReinforceSteering, "update", interrupted)
        assert not run_recipe(cut, lambda line: None)
    assert run_recipe(cut, lambda line: None)
    ends = [jax.tree.leaves(latest_params(r.folder / "checkpoints", "student")) for r in (cut, whole)]
    for a, b in zip(*ends, strict=True):
        np.testing.assert_array_equal(a, b)
    kept = [sorted(p.name for p in (r.folder / "rollouts").iterdir()) for r in (cut, whole)]
    assert kept == [["0000002", "0000004"], ["0000000", "0000002", "0000004"]]
    results = [json.loads((r.folder / "done.json").read_text())["result"] for r in (cut, whole)]
    assert results[0] == results[1] and len(metrics(whole.folder, "rollouts/reward")) == 3


def test_a_reward_follows_the_monitoring_set_alone(world, tmp_path):
    r = recipe(world, tmp_path, steps=3, monitor=Monitor(prompts=3, n=5, every=2))
    assert run_recipe(r, lambda line: None)
    assert metrics(r.folder, "rollouts/reward/seen") == [15.0, 15.0, 30.0]  # asked before the rounds of updates 0 and 2
    with pytest.raises(ValueError, match=r"monitor\.every must be a multiple of every=2"):
        Reinforce(every=2, monitor=Monitor(every=3))


def test_what_cannot_be_is_said(world, tmp_path):
    with pytest.raises(ValueError, match=r"learns from the student's answers alone, got share=0\.5"):
        Reinforce(share=0.5)
    with pytest.raises(ValueError, match="n=1 answers to a question always have equal rewards"):
        Reinforce(n=1)
    with pytest.raises(ValueError, match="refill replaces groups that were dropped"):
        Reinforce(equal="keep", refill=1)
    with pytest.raises(ValueError, match=r"its terms are TokenTerms.*got TokenTerms \[\] of \['ce'\]"):
        recipe(world, tmp_path, policy={"ce": Term(cross_entropy)})
    with pytest.raises(ValueError, match="4 questions with 4 answers each do not fit 1 updates of 8 rows"):
        run_recipe(recipe(world, tmp_path / "a", rows=8), lambda line: None)
    with pytest.raises(ValueError, match="leaves room for max_new_tokens"):
        run_recipe(recipe(world, tmp_path / "b", sampling=Sampling(temperature=1.0, max_new_tokens=95)),
                   lambda line: None)


def test_the_recipe_of_knights_and_knaves_builds():
    r = load_recipe("configs/recipes/grpo_kk.py")
    assert spec.load(r.to_yaml()) == r and [s.name for s in r.stages] == ["puzzles", "warmup", "rl", "report"]
