"""The preference recipes as `distill-jax train` runs them: two updates on judged answers of the generated world."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from configs.preference import compares, preference
from distill_jax.data.source_specs import Pairs
from distill_jax.data.sources import open_source
from distill_jax.data.tokenizer import load_tokenizer
from distill_jax.decode import Sampling
from distill_jax.jobs.generate import Keeping, ModelTeacher, generate_store
from distill_jax.jobs.hardware import DEVICES
from distill_jax.jobs.opening import open_feed
from distill_jax.jobs.plan import plan_stage
from distill_jax.jobs.run_recipe import run_recipe
from distill_jax.jobs.score import ScoreJob, score
from distill_jax.jobs.write_store import write_store
from distill_jax.losses.tokens.preference import dpo
from distill_jax.recipe import Recipe, Saving, Stage, Student
from distill_jax.recipe_file import load_recipe
from distill_jax.traces.pairing import BestWorst, RightWrong
from distill_jax.traces.world.generate import WorldSpec, traces
from distill_jax.traces.world.tokenizer import build_tokenizer
from distill_jax.train.checkpoint import latest_params
from tests.data.storing import judged_answers
from tests.jobs.teachers import teacher_folder, tiny_model

FAST, SLOW = ("dpo", "kto", "redi"), ("ipo", "simpo", "orpo")
FIRST = {"dpo": np.log(2), "ipo": 25.0, "kto": 0.5}
"""Values of the first update, where policy and reference are equal."""


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """(student folder, store of judged answers to questions of the generated world)."""
    root = tmp_path_factory.mktemp("world")
    tok = load_tokenizer(build_tokenizer(root / "tokenizer"))
    write_store(str(root / "store"), judged_answers(list(traces(WorldSpec(kind="lookup", k=2), 16))), tok)
    return teacher_folder(root / "student", tok), root / "store"


def tiny(name, world, runs, *extra):
    student, store = world
    sets = [f"source.path={store}", f"runs={runs}", "source.rows=8", "source.seq_len=96", "source.holdout=0.25",
            "steps=2", "micro_batches=1", "heldout=0", "log_every=1", "student.precision=float32", "student.remat=none",
            f"stages.0.providers.student.model={student}"]
    if name in FIRST:
        sets += [f"reference={student}", "reference.precision=float32"]
    return load_recipe(f"configs/recipes/{name}.py", [*sets, *extra])


def lines_of(folder, name):
    return [json.loads(x) for x in (folder / "metrics" / f"{name}.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("name", [*FAST, *(pytest.param(n, marks=pytest.mark.slow) for n in SLOW)])
def test_two_updates_through_the_recipe(name, world, tmp_path):
    recipe = tiny(name, world, tmp_path, *(["heldout=8"] if name == "dpo" else []))
    assert run_recipe(recipe, lambda line: None)
    stage = recipe.stages[-1]
    assert isinstance(stage, Stage)
    folder = recipe.stage_folder(stage.name)
    lines = lines_of(folder, stage.name)
    for term in stage.terms:
        values = [line[term] for line in lines if term in line]
        assert len(values) == 2 and np.all(np.isfinite(values)), term
        if term in FIRST:
            assert np.isclose(values[0], FIRST[term], rtol=1e-4)
    start = jax.tree.leaves(latest_params(recipe.stage_folder("sft") / "checkpoints", "student")) if (
        name == "redi") else None
    params = [np.asarray(x) for x in jax.tree.leaves(latest_params(folder / "checkpoints", "student"))]
    assert all(np.isfinite(x).all() for x in params)
    assert start is None or any((a != np.asarray(b)).any() for a, b in zip(params, start, strict=True))
    done = json.loads((folder / "done.json").read_text())["result"]
    assert done["skipped"] == 0
    if name == "dpo":
        assert {"dpo", "cross_entropy", "chosen_logprob", "rejected_logprob"} <= set(done["heldout"])
    plan = plan_stage(recipe, stage, DEVICES["h200"], 1)
    assert plan.flops > 0 and set(plan.params) == set(stage.providers)


def test_batch_opens_what_the_recipe_trains_on(world, tmp_path):
    """What `distill-jax batch RECIPE` shows, with fields of the source changed on the way."""
    path = tmp_path / "dpo.yaml"
    path.write_text(tiny("dpo", world, tmp_path).to_yaml())
    feed = open_feed(str(path), rows=2)
    assert isinstance(feed.source, Pairs) and feed.source.rows == 2
    batch = open_source(feed.source, feed.tokenizer, seed=feed.seed).batch(0)
    assert batch.main.tokens.shape == (2, 96) and (batch.main.fields["pair_ids"] > 1).any()


def test_variants_that_the_headers_name():
    kwargs = lambda name, *sets: load_recipe(f"configs/recipes/{name}.py", [*sets]).stages[0].terms[name]  # type: ignore
    varied = kwargs("dpo", "terms.dpo.kwargs.divergence=js", "terms.dpo.kwargs.label_smoothing=0.1",
                    "terms.dpo.where=apart")
    assert (varied.kwargs["divergence"], varied.kwargs["label_smoothing"]) == ("js", 0.1) and varied.where == "apart"
    assert kwargs("kto", "terms.kto.kwargs.desirable=1.3").kwargs["desirable"] == 1.3


def test_pairs_of_what_generate_writes(world, tmp_path):
    """`generate --keep all` by a random model: nothing is right, everything cut, and answers have a mean_logprob."""
    student, _ = world
    tok = load_tokenizer(student)
    model, params = tiny_model(tok.real)
    teacher = ModelTeacher(model, params, tok, Sampling(temperature=1.0, max_new_tokens=6), n=3, batch_size=4)
    asked = list(traces(WorldSpec(kind="lookup", k=2), 4))
    generate_store(str(tmp_path / "s"), asked, teacher, tok, Keeping(keep="all"))
    best = Pairs(path=str(tmp_path / "s"), build=BestWorst(score="mean_logprob"), over_long="cut", rows=2, seq_len=96)
    part = open_source(best, tok, seed=0).parts[0]
    scores = np.array([t.scores["mean_logprob"] for t in part.rowset.store.traces(part.rowset.origin)])
    assert part.describe()["pairs"] == 4 and (scores[::2] > scores[1::2]).all()
    with pytest.raises(ValueError, match=r"RightWrong finds nothing to compare: 12 answers \(0 right"):
        open_source(dataclasses.replace(best, build=RightWrong()), tok, seed=0)


@pytest.mark.slow
def test_a_stored_reference_is_as_good_as_a_live_one(world, tmp_path):
    """The start's log-probs of the tokens, stored by `score`, in place of the start: the same updates."""
    student, store = world
    score(ScoreJob(store=str(store), teacher=str(student), signal="token"))
    live = tiny("dpo", world, tmp_path / "live")
    assert run_recipe(live, lambda line: None)
    first = live.stages[0]
    assert isinstance(first, Stage)
    stage = preference({"dpo": compares(dpo, target="signals/token", beta=0.1)}, metrics={"beta": 0.1})
    assert list(stage.providers) == ["student"] and stage.source.signals == ("token",)
    stage = dataclasses.replace(
        stage, source=dataclasses.replace(first.source, signals=("token",)), steps=2, micro_batches=1, heldout=0,
        log_every=1, saving=Saving(), providers={"student": Student(model=str(student))})
    stored = Recipe(name="stored", runs=str(tmp_path / "stored"), stages=(stage,))
    assert run_recipe(stored, lambda line: None)
    for a, b in zip(lines_of(live.folder, "train"), lines_of(stored.folder, "train"), strict=True):
        for name in {*stage.terms, "grad_norm"} - {"preference_accuracy"}:  # at a margin of 0 rounding decides
            if name in a:
                assert np.isclose(a[name], b[name], rtol=1e-3, atol=1e-4), name
