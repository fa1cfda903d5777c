"""Code that a student wrote, where the platform cannot shut it in: refused, unless the user says otherwise, aloud."""

import dataclasses

import pytest

from distill_jax.cli.main import main
from distill_jax.data.source_specs import Store
from distill_jax.jobs.reinforce import judge_of
from distill_jax.jobs.run_recipe import allow_unsafe_code
from distill_jax.losses.tokens.policy import ppo_clip
from distill_jax.objective.tokens import TokenTerm
from distill_jax.recipe import Recipe, Stage, Student
from distill_jax.rewards import sandbox
from distill_jax.rewards.journal import Journal
from distill_jax.rewards.sample import Sample
from distill_jax.rollout.reinforce import Reinforce
from distill_jax.traces.trace import simple_trace

TESTS = {"function": "add", "calls": [[[1, 2], 3], [[-1, 1], 0]]}


@pytest.fixture
def open_platform(monkeypatch):
    """One that has no namespaces."""
    monkeypatch.setattr(sandbox.platform, "system", lambda: "Plan9")


def program(text: str) -> Sample:
    return Sample.of(simple_trace("Add.", "", f"```python\n{text}\n```").replace(meta={"tests": TESTS}))


def test_it_refuses_and_says_what_to_do(open_platform, tmp_path):
    with pytest.raises(ValueError, match=r"programs cannot be shut in here: this is Plan9.*Needed are.*"
                                         r"Reinforce\(unsafe_code=True\).*--unsafe-code"):
        judge_of(Reinforce(judge="code"), Journal(tmp_path / "verdicts.jsonl"))


def test_it_runs_where_it_may_and_keeps_the_limits(open_platform, tmp_path, capsys):
    judge, end = judge_of(Reinforce(judge="code", unsafe_code=True), Journal(tmp_path / "verdicts.jsonl"))
    try:
        judged = judge([program("def add(a, b):\n    return a + b"), program("def add(a, b):\n    return 3"),
                        program("def add(a, b):\n    return bytearray(1 << 40)"),
                        program("def add(a, b):\n    while True:\n        print('x' * 1000)")])
    finally:
        end()
    assert [s.correct for s in judged] == [True, False, False, False]
    assert judged[3].verdict is not None and judged[3].verdict.method == "output"
    assert "WARNING: unsafe code is allowed" in capsys.readouterr().out


def recipe(**judges: str) -> Recipe:
    return Recipe(name="r", stages=tuple(
        Stage(name=name, source=Store(path="s"), providers={"student": Student(model="m")},
              terms={"policy": TokenTerm(ppo_clip)}, on_policy=Reinforce(judge=judge))  # type: ignore[arg-type]
        for name, judge in judges.items()))


def test_the_flag_is_for_stages_that_run_code(tmp_path, capsys):
    both = recipe(a="code", b="answers")
    allowed = allow_unsafe_code(both)
    assert [s.on_policy.unsafe_code for s in allowed.stages if isinstance(s, Stage)  # type: ignore[union-attr]
            ] == [True, False] and allowed.stages[1] == both.stages[1]
    (tmp_path / "recipe.yaml").write_text(recipe(b="answers").to_yaml())
    with pytest.raises(SystemExit):
        main(["train", str(tmp_path / "recipe.yaml"), "--unsafe-code"])
    assert "no stage of recipe 'r' runs code" in capsys.readouterr().err
    with pytest.raises(ValueError, match="and judge is 'knights': drop one of them"):
        dataclasses.replace(Reinforce(judge="knights"), unsafe_code=True)
