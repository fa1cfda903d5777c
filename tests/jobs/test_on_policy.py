"""The student's own answers as a share of the batches: what is read, what is learned, and resuming."""

import json
import os
import signal

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from distill_jax.data.sources import BatchSource
from distill_jax.data.tokenizer import load_tokenizer
from distill_jax.jobs.on_policy import OnPolicySteering, order_of
from distill_jax.jobs.run_recipe import run_recipe
from distill_jax.recipe import Stage
from distill_jax.recipe_file import load_recipe
from distill_jax.rollout.on_policy import OnPolicy
from distill_jax.traces.store import TraceStore
from distill_jax.train.checkpoint import latest_params
from tests.data.conftest import tiny_folder
from tests.data.storing import make_store, some_traces
from tests.jobs.teachers import teacher_folder


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """(student folder, teacher folder, store, tokenizer)."""
    root = tmp_path_factory.mktemp("world")
    tok = load_tokenizer(tiny_folder(root / "tokenizer"))
    make_store(root / "store", some_traces(24), tok)
    return teacher_folder(root / "student", tok), teacher_folder(root / "teacher", tok, seed=1), root / "store", tok


def tiny(world, runs, *extra, name="on_policy_rkl"):
    student, teacher, store, _ = world
    return load_recipe(f"configs/recipes/{name}.py", [
        f"student={student}", f"teacher={teacher}", "student.precision=float32", "teacher.precision=float32",
        f"source.path={store}", f"runs={runs}", "source.rows=8", "source.seq_len=96", "source.holdout=0.25",
        "micro_batches=1", "heldout=0", "log_every=1", "steps=7", "on_policy.every=3", "on_policy.prompts=8",
        "on_policy.sampling.max_new_tokens=24", "saving.steps=100", "optim.peak_lr=0.01", "optim.warmup=1", *extra])


def leaves(folder):
    return jax.tree.leaves(latest_params(folder / "checkpoints", "student"))


def test_rounds_are_stores_of_the_students_answers(world, tmp_path, monkeypatch):
    """Every round is asked when it is due, of train questions only, and read to the token as it was sampled."""
    seen = []
    original = BatchSource.batch
    monkeypatch.setattr(BatchSource, "batch", lambda self, step, rows=None: seen.append(
        (self.since, len(self.parts), original(self, step, rows))) or seen[-1][2])
    recipe = tiny(world, tmp_path)
    assert run_recipe(recipe, lambda line: None)
    rounds = {p.name: TraceStore.open(str(p)) for p in sorted((recipe.folder / "rollouts").iterdir())}
    assert list(rounds) == ["0000000", "0000003", "0000006"] and all(len(s) == 8 for s in rounds.values())
    heldout = set(TraceStore.open(str(world[2])).index().groups) - {
        t.group for s in rounds.values() for t in s.traces()}
    assert heldout, "24 questions, 18 for training, 24 asked: every train question, no other"
    assert not {t.id for t in rounds["0000000"].traces()} & {t.id for t in rounds["0000003"].traces()}
    sampled = {name: {tuple(t.encoded.ids.tolist()) for t in s.traces()} for name, s in rounds.items()}
    for since, parts, batch in seen:
        if parts != 2:
            continue  # the check of the first batch of the source itself
        m, known = batch.main, sampled[f"{since:07d}"]
        for b in range(len(m.tokens)):
            for segment in range(1, m.segment_ids[b].max() + 1):
                where = m.segment_ids[b] == segment
                assert tuple(m.tokens[b][where].tolist()) in known
    lines = [json.loads(x) for x in (recipe.folder / "metrics" / "train.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "rollouts/answers" in line] == [0, 3, 6]


def test_the_student_comes_nearer_to_the_teacher_on_its_own_answers(world, tmp_path):
    recipe = tiny(world, tmp_path, "steps=24")
    assert run_recipe(recipe, lambda line: None)
    lines = [json.loads(x) for x in (recipe.folder / "metrics" / "train.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert np.mean(losses[-3:]) < 0.8 * np.mean(losses[:3])


def test_share_mixes_and_the_source_goes_on_where_it_was(world, tmp_path, monkeypatch):
    opened: list[BatchSource] = []
    original = OnPolicySteering.source
    monkeypatch.setattr(OnPolicySteering, "source",
                        lambda self, state: opened.append(original(self, state)) or opened[-1])
    recipe = tiny(world, tmp_path, name="gkd")
    assert run_recipe(recipe, lambda line: None)
    rounds = {s.since: s for s in opened}
    own = [position for since, source in rounds.items() for step in range(since, min(since + 3, 7))
           for part, position in source.assigned(step) if part == 0]
    assert own == list(range(28)), "half of 7 x 8 sequences, each once, in the order of the plan"


def test_killed_and_started_again_ends_with_the_same_bits(world, tmp_path, monkeypatch):
    whole = tiny(world, tmp_path / "whole", name="gkd")
    assert run_recipe(whole, lambda line: None)
    original = OnPolicySteering.update

    def interrupted(self, state, params, step):
        if step == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, state, params, step)

    cut = tiny(world, tmp_path / "cut", name="gkd")
    with monkeypatch.context() as patch:
        patch.setattr(OnPolicySteering, "update", interrupted)
        assert not run_recipe(cut, lambda line: None)
    assert run_recipe(cut, lambda line: None)
    for a, b in zip(leaves(cut.folder), leaves(whole.folder), strict=True):
        np.testing.assert_array_equal(a, b)
    stores = [TraceStore.open(str(f / "rollouts/0000006")).fingerprint() for f in (cut.folder, whole.folder)]
    assert stores[0] == stores[1]


def test_what_cannot_be_is_said(world, tmp_path):
    with pytest.raises(ValueError, match=r"share must be in \(0, 1\], got 0"):
        OnPolicy(share=0)
    with pytest.raises(ValueError, match="greedy answers"):
        load_recipe("configs/recipes/gkd.py", ["on_policy.n=2", "on_policy.sampling.temperature=0"])
    stage = load_recipe("configs/recipes/kd.py").stages[0]
    assert isinstance(stage, Stage)
    with pytest.raises(ValueError, match=r"terms \['kl'\] need a live teacher"):
        Stage(source=stage.source, providers=stage.providers, terms=stage.terms, on_policy=OnPolicy())
    with pytest.raises(ValueError, match="leaves room for max_new_tokens"):
        run_recipe(tiny(world, tmp_path, "on_policy.sampling.max_new_tokens=127"), lambda line: None)


@given(n=st.integers(1, 12), rounds=st.integers(1, 12), seed=st.integers(0, 99), data=st.data())
def test_no_round_asks_a_question_twice(n, rounds, seed, data):
    prompts = data.draw(st.integers(1, n))
    asked = [int(order_of(i // n, n, prompts, seed)[i % n]) for i in range(rounds * prompts)]
    for r in range(rounds):
        assert len(set(asked[r * prompts:(r + 1) * prompts])) == prompts
    often = [asked.count(q) for q in range(n)]
    assert max(often) - min(often) <= 1
