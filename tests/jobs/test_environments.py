"""Recipes whose rollouts need an environment, on a tiny model: what reaches the batches, and resuming."""

import dataclasses
import json
import os
import signal

import jax
import numpy as np
import pytest

from distill_jax.core.roles import INJECTED, SUPERVISED
from distill_jax.data.tokenizer import load_tokenizer
from distill_jax.decode.sampling import Sampling
from distill_jax.jobs.pass_rates import rated, rates_of
from distill_jax.jobs.reinforce import ReinforceSteering, RoundSource
from distill_jax.jobs.run_recipe import run_recipe
from distill_jax.objective.term import build_objective
from distill_jax.recipe import Call, Generate, MeshShape, Recipe, Saving, Stage, Student
from distill_jax.recipe_file import load_recipe
from distill_jax.rewards.algebra import Reward
from distill_jax.rollout.environments import CLOSED, Budgeted, Chunked, EarlyExits, Mode, Modes
from distill_jax.rollout.generation import CLOSE
from distill_jax.traces.store import TraceStore
from distill_jax.train.checkpoint import latest_params
from distill_jax.train.optim import AdamW
from tests.data.conftest import CHATML, tiny_folder
from tests.data.storing import make_store, some_traces
from tests.jobs.teachers import teacher_folder
from tests.jobs.test_reinforce import evenness

OPENS = CHATML.replace("assistant\\n' }}", "assistant\\n<think>\\n' }}")
EVEN = Reward(fn=evenness)
WRITTEN = [int(r) for r in SUPERVISED]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """(student folder, store of questions), with a template that opens the thinking."""
    root = tmp_path_factory.mktemp("world")
    tok = load_tokenizer(tiny_folder(root / "tokenizer", template=OPENS))
    make_store(root / "store", some_traces(12), tok)
    return teacher_folder(root / "student", tok), root / "store"


def small(stage: Stage, world, *, source: str = "", **on_policy) -> Stage:
    """A stage of a recipe at a size for tests; terms and what is not named stay as they are."""
    rules = dataclasses.replace(stage.on_policy.sampling, max_new_tokens=24)
    options = {"prompts": 4, "n": 4, "batch_size": 16, "refill": 0, "sampling": rules} | on_policy
    return dataclasses.replace(
        stage, source=dataclasses.replace(stage.source, path=source or str(world[1]), rows=16, seq_len=96),
        providers={"student": Student(model=str(world[0]))}, steps=2, micro_batches=1, log_every=1,
        optim=AdamW(peak_lr=0.01, warmup=1), saving=Saving(steps=100, keep=1),
        on_policy=dataclasses.replace(stage.on_policy, **options))


def recipe_of(name: str) -> Recipe:
    return load_recipe(f"configs/recipes/{name}.py")


@pytest.fixture
def batches(monkeypatch):
    """{update: the batch it was trained on}."""
    seen = {}
    original = RoundSource.batch
    monkeypatch.setattr(RoundSource, "batch", lambda self, step, rows=None: seen.setdefault(
        step, original(self, step, rows)))
    return seen


def run(runs, stages, name="run") -> Recipe:
    r = Recipe(name=name, runs=str(runs), mesh=MeshShape(data=1, fsdp=8), stages=stages)
    assert run_recipe(r, lambda line: None)
    return r


def rounds(folder):
    return [list(TraceStore.open(str(p)).traces()) for p in sorted((folder / "rollouts").iterdir())]


def lines(folder, name):
    (path,) = (folder / "metrics").glob("*.jsonl")
    said = [json.loads(x) for x in path.read_text().splitlines()]
    return [line[name] for line in said if name in line]


def segments(batch):
    """(tokens, roles, weights, behaviour log-probs) of every answer in a batch."""
    main = batch.main
    for b in range(len(main.tokens)):
        for segment in range(1, int(main.segment_ids[b].max()) + 1):
            at = main.segment_ids[b] == segment
            behaviour = main.fields["behaviour_logprobs"]
            yield tuple(np.asarray(x)[b][at] for x in (main.tokens, main.roles, main.weights, behaviour))


def policy_weights(stage, batch):
    """What the objective makes of it: f32 [B,T], the share of each token in the policy term."""
    objective = build_objective({"policy": stage.terms["policy"]})
    return np.asarray(objective.weights(batch, 0, objective.init()).weights["policy"])


def test_tfpi(world, tmp_path, batches):
    """Two updates of its first stage: nothing of the closed thinking is trained on, and updates are on-policy."""
    stage = small(recipe_of("tfpi").stages[0], world, reward=EVEN)
    r = run(tmp_path, (stage,))
    tok = load_tokenizer(world[0])
    close = tok.encode("<think>\n\n</think>\n\n")[0]
    assert len(rounds(r.folder)) == 2 and sorted(batches) == [0, 1]
    for traces, batch in zip(rounds(r.folder), (batches[0], batches[1])):
        by_ids = {t.encoded.ids.tobytes(): t for t in traces}
        found = list(segments(batch))
        assert len(found) == sum(t.scores["trained"] > 0 for t in traces) > 0
        for tokens, roles, _, behaviour in found:
            t = by_ids[tokens.tobytes()]
            n = t.encoded.prompt_length
            assert tokens[n - len(close):n].tolist() == close.tolist()
            assert np.isin(roles, WRITTEN).tolist() == [i >= n for i in range(len(tokens))]
            np.testing.assert_array_equal(behaviour, t.encoded.logprobs)
    assert max(abs(x - 1) for x in lines(r.folder, "mean_ratio")) < 1e-3
    assert max(lines(r.folder, "logprob_gap")) < 1e-3


def test_tfpi_is_dapo_with_another_prompt():
    """The card's check: terms, reward and advantage are those of the DAPO recipe, at each rung of the ladder."""
    (want,), stages = recipe_of("dapo").stages, recipe_of("tfpi").stages
    assert [s.on_policy.sampling.max_new_tokens for s in stages] == [2048, 4096, 8192]
    assert stages[-1].on_policy == dataclasses.replace(want.on_policy, environment=stages[-1].on_policy.environment)
    for s in stages:
        assert s.terms == want.terms and s.on_policy.advantage is want.on_policy.advantage
        assert s.source.seq_len == s.on_policy.sampling.max_new_tokens + 1024
    assert [s.providers["student"].model for s in stages][1:] == ["stage:tokens2048", "stage:tokens4096"]


def test_adaptthink(world, tmp_path, batches):
    """All three stages: pass rates of the start are measured, half of a group is forced to skip, and that is paid."""
    ask, rates, rl = recipe_of("adaptthink").stages
    assert isinstance(ask, Generate) and isinstance(rates, Call)
    env = rl.on_policy.environment
    env = dataclasses.replace(env, modes=tuple(
        dataclasses.replace(m, limit=12, first=first) for m, first in zip(env.modes, ("</think>", "A"))))
    student, store = map(str, world)
    r = run(tmp_path, (
        dataclasses.replace(ask, teacher=student, questions=store, n=2, batch_size=32, sampling=Sampling(
            temperature=1.0, max_new_tokens=8)),
        dataclasses.replace(rates, kwargs={**rates.kwargs, "questions": store, "tokenizer": student}),
        small(rl, world, source="stage:rates/store", environment=env)))
    measured = list(TraceStore.open(str(r.folder / "rates" / "store")).traces())
    assert len(measured) == 12 and {t.meta["reference_pass_rate"] for t in measured} == {0.0}  # it knows nothing
    tok = load_tokenizer(student)
    first = {m.name: tok.encode(m.first)[0][0] for m in env.modes}
    for traces, batch in zip(rounds(r.folder / "rl"), (batches[0], batches[1])):
        assert len(traces) == 16 and all(t.scores["trained"] for t in traces)
        for t in traces:
            skips = t.scores["mode/no_think"] == 1
            assert t.encoded.ids[t.encoded.prompt_length] == first["no_think" if skips else "think"]
            assert t.scores["advantage"] == t.scores["reward"] == pytest.approx(0.05 if skips else 0.0)
        assert sum(t.scores["mode/think"] for t in traces) == 8
        lengths = {t.encoded.ids.tobytes(): t.encoded.prompt_length for t in traces}
        for tokens, roles, weights, behaviour in segments(batch):
            n = lengths[tokens.tobytes()]
            assert behaviour[n] == np.float32(np.log(0.5)) and roles[n] in WRITTEN and weights[n] == 1
        on = policy_weights(rl, batch) > 0
        assert on.sum() == sum(len(t.encoded.ids) - t.encoded.prompt_length for t in traces)
    assert all(np.isfinite(lines(r.folder / "rl", "loss")))


EXITS = EarlyExits(exits=3, text="Stop.\n</think>\n\n", answer_tokens=6)


def test_s_grpo(world, tmp_path, batches):
    """Two updates: injected and shared tokens have no weight in the batch, the others all have."""
    stage = small(recipe_of("s_grpo").stages[0], world, reward=EVEN, environment=EXITS)
    whole = run(tmp_path, (stage,), "whole")
    stop = load_tokenizer(world[0]).encode(EXITS.text)[0]
    exits = 0
    for traces, batch in zip(rounds(whole.folder), (batches[0], batches[1])):
        assert len(traces) == 16 and len({t.group for t in traces}) == 4
        by_ids = {t.encoded.ids.tobytes(): t for t in traces}
        weights, main = policy_weights(stage, batch), batch.main
        for b in range(len(main.tokens)):
            at = main.segment_ids[b] == 1
            if not at.any():
                continue
            t = by_ids[np.asarray(main.tokens)[b][at].tobytes()]
            n, injected = t.encoded.prompt_length, t.encoded.injected
            mine = np.arange(at.sum()) >= n
            if injected is not None:
                mine &= ~injected
                shared = n + int(t.scores["exit_position"])
                assert injected.sum() == shared - n + len(stop)
                assert t.encoded.ids[shared:shared + len(stop)].tolist() == stop.tolist()
                assert (np.asarray(main.roles)[b][at][injected] == int(INJECTED)).all()
                exits += 1
            assert (weights[b][at] > 0).tolist() == mine.tolist()
    assert exits >= 12


MODES = Modes(modes=(Mode(name="no_think", first=CLOSE), Mode(name="think", first="A", limit=12)))


@pytest.mark.slow
@pytest.mark.parametrize("env", [EXITS, MODES, Chunked(chunks=3, carry=8, head=2), Budgeted(
    prefill=CLOSED, budgets=(4, 9), text=" At most {budget}.", answer_tokens=5)], ids=lambda e: type(e).__name__)
def test_killed_and_started_again_ends_with_the_same_bits(world, tmp_path, monkeypatch, env):
    stage = small(recipe_of("s_grpo").stages[0], world, reward=EVEN, environment=env)
    stage = dataclasses.replace(stage, source=dataclasses.replace(stage.source, rows=48))
    whole = run(tmp_path, (stage,), "whole")
    original = ReinforceSteering.update

    def interrupted(self, state, params, step):
        if step == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, state, params, step)

    cut = dataclasses.replace(whole, name="cut")
    with monkeypatch.context() as patch:
        patch.setattr(ReinforceSteering, "update", interrupted)
        assert not run_recipe(cut, lambda line: None)
    assert run_recipe(cut, lambda line: None)
    ends = [jax.tree.leaves(latest_params(r.folder / "checkpoints", "student")) for r in (cut, whole)]
    for a, b in zip(*ends, strict=True):
        np.testing.assert_array_equal(a, b)
    assert [[t.to_json() for t in of] for of in rounds(cut.folder)] == [
        [t.to_json() for t in of] for of in rounds(whole.folder)]


def test_chunks_are_rows_of_one_answer(world, tmp_path, batches):
    """Every token is trained on once; rows of an answer share advantage and number; a round counts answers."""
    env = Chunked(chunks=3, carry=8, head=2)
    stage = small(recipe_of("delethink").stages[0], world, reward=EVEN, environment=env)
    stage = dataclasses.replace(stage, steps=1, source=dataclasses.replace(stage.source, rows=48))
    r = run(tmp_path, (stage,))
    ((rows,), main) = rounds(r.folder), batches[0].main
    first = [i for i, t in enumerate(rows) if not t.scores.get("chunk")]
    assert len(first) == 16 < len(rows)
    length = lambda t: len(t.encoded.ids) - t.encoded.prompt_length
    assert lines(r.folder, "rollouts/tokens") == [pytest.approx(sum(map(length, rows)) / 16)]
    number = dict(zip((t.encoded.ids.tobytes() for t in rows), np.cumsum([not t.scores.get("chunk") for t in rows])))
    answers, weights, seen = {}, policy_weights(stage, batches[0]), 0
    for b in range(len(main.tokens)):
        at = main.segment_ids[b] == 1
        if at.any():
            tokens, ids, said = (np.asarray(x)[b][at] for x in (
                main.tokens, main.fields["trace_ids"], main.fields["advantages"]))
            answers.setdefault(int(number[tokens.tobytes()]), set()).add((int(ids[0]), float(said[0])))
            assert len(set(ids)) == len(set(said)) == 1
            seen += int((weights[b] > 0).sum())
    assert all(len(of) == 1 for of in answers.values())
    assert len({i for of in answers.values() for i, _ in of}) == len(answers)
    assert seen == sum(length(t) for t in rows if t.scores["trained"])
    of_answer = [weights[np.asarray(main.fields["trace_ids"]) == i].sum() for i in range(1, len(answers) + 1)]
    np.testing.assert_allclose(of_answer, 1 / len(answers), rtol=1e-5)  # each answer weighs the same


def test_pass_rates():
    """Undecided answers, and right ones behind a thinking that never ended, count as not right."""
    a, b, c = some_traces(3)
    say = lambda t, verdict, *flags: t.replace(verdict=verdict, flags=flags)
    rates = rates_of([say(a, True), say(a, True), say(a, False), say(a, None), say(b, True, "unterminated_think")])
    assert rates == {a.group: 0.5, b.group: 0.0}
    got = list(rated([a, b, c], rates))
    assert [t.meta["reference_pass_rate"] for t in got] == [0.5, 0.0] and [t.id for t in got] == [a.id, b.id]
