"""A store scored once, with states, top-k and draws, trains recipes of each kind: nothing is scored again."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distill_jax.data.source_specs import Store
from distill_jax.data.tokenizer import load_tokenizer
from distill_jax.jobs.run_recipe import run_recipe
from distill_jax.jobs.score import ScoreJob, score_store
from distill_jax.losses.rows.divergences import forward_kl, reverse_kl
from distill_jax.losses.rows.logprob import log_normalizer
from distill_jax.losses.rows.taid import taid
from distill_jax.losses.targets import Full, SampledTarget
from distill_jax.objective.controllers import TAIDSchedule
from distill_jax.objective.term import Term
from distill_jax.recipe import MeshShape, Recipe, Stage, Student
from distill_jax.train.optim import AdamW
from tests.data.conftest import tiny_folder
from tests.data.storing import make_store, some_traces
from tests.jobs.teachers import tiny_model


def drawn_cross_entropy(logits, target):
    """-sum_s w_s log q(id_s): the gradient of forward KL, in expectation."""
    assert isinstance(target, SampledTarget)
    there = target.ids >= 0
    log_q = jnp.take_along_axis(logits, jnp.where(there, target.ids, 0), axis=-1) - log_normalizer(logits)[:, None]
    return -jnp.sum(jnp.where(there, target.weights * log_q, 0.0), axis=-1)


def full_only(logits, target, *, temperature):
    assert isinstance(target, Full)
    return reverse_kl(logits, target, temperature=temperature)


@pytest.fixture(scope="module")
def scored(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scored")
    tok = load_tokenizer(tiny_folder(folder / "tok"))
    store = make_store(folder / "s", some_traces(12), tok)
    model, params = tiny_model(tok.real)
    for signal in ("hidden", "topk:64", "sampled:16"):
        score_store(store, model, params, tok, ScoreJob(store="", teacher="t", signal=signal, batch_tokens=512))
    return folder, tok, model


TERMS = {"hidden": Term(full_only, target="signals/hidden", kwargs={"temperature": 2.0}),
         "topk64": Term(forward_kl, target="signals/topk64"),
         "sampled16": Term(drawn_cross_entropy, target="signals/sampled16")}


@pytest.mark.parametrize("name", sorted(TERMS))
def test_two_steps_on_each_signal(scored, name):
    folder, _, model = scored
    before = sorted(p for p in (folder / "s").rglob("*") if p.is_file())
    recipe = Recipe(name=name, runs=str(folder / "runs"), stages=(Stage(
        source=Store(path=str(folder / "s"), signals=(name,), rows=8, seq_len=96),
        providers={"student": Student(config=model.config, tokenizer=str(folder / "tok"), precision="float32",
                                      init_seed=1)},
        terms={"kd": TERMS[name]}, optim=AdamW(peak_lr=1e-3, warmup=1), steps=2, log_every=1),))
    run_recipe(recipe)
    lines = [json.loads(x) for x in next((folder / "runs" / name / "metrics").glob("*.jsonl")).read_text().splitlines()]
    losses = [v for line in lines for k, v in line.items() if k.endswith("loss")]
    assert len(losses) >= 2 and np.isfinite(losses).all() and losses[0] > 0
    assert sorted(p for p in (folder / "s").rglob("*") if p.is_file()) == before


def test_hidden_states_on_two_meshes(scored):
    """The stored head is split like the student's; the losses are those of another split."""
    folder, _, model = scored
    found = []
    for shape in (MeshShape(data=2, fsdp=4), MeshShape(data=2, fsdp=2, tensor=2)):
        recipe = Recipe(name=f"hidden{shape.tensor}", runs=str(folder / "runs"), mesh=shape, stages=(Stage(
            source=Store(path=str(folder / "s"), signals=("hidden",), rows=8, seq_len=96),
            providers={"student": Student(config=model.config, tokenizer=str(folder / "tok"), init_seed=1)},
            terms={"kd": TERMS["hidden"]}, optim=AdamW(peak_lr=1e-3, warmup=1), steps=2, log_every=1),))
        run_recipe(recipe)
        lines = next((recipe.folder / "metrics").glob("*.jsonl")).read_text().splitlines()
        found.append([x["loss"] for x in map(json.loads, lines) if "loss" in x])
    assert len(found[0]) == 2 and found[0][0] > 0
    np.testing.assert_allclose(found[0], found[1], rtol=1e-5)


def test_heldout_rows_are_judged_with_the_controllers_of_the_end(scored):
    """TAID at t = 0 is the student's own entropy, towards t = 1 the teacher's cross-entropy. The ramp is as long as the
    stage, whose updates it does not name."""
    folder, _, model = scored
    ramp = TAIDSchedule(start=0.0, adaptive=False)
    recipe = Recipe(name="taid", runs=str(folder / "runs"), stages=(Stage(
        source=Store(path=str(folder / "s"), signals=("topk64",), rows=8, seq_len=96, holdout=0.3),
        providers={"student": Student(config=model.config, tokenizer=str(folder / "tok"), init_seed=1)},
        terms={"taid": Term(taid, target="signals/topk64", kwargs={"t": ramp}),
               "kl": Term(forward_kl, target="signals/topk64", weight=0.0)},
        optim=AdamW(peak_lr=1e-3, warmup=1), steps=6, log_every=1, heldout=8),))
    run_recipe(recipe)
    heldout = json.loads((recipe.folder / "done.json").read_text())["result"]["heldout"]
    assert heldout["taid"] > heldout["kl"] > 2.0  # the entropy is below 1


def test_states_of_another_vocabulary_are_refused(scored, tmp_path):
    """The teacher's head has its own ids: another student's tokens cannot be read by it."""
    from distill_jax.jobs.train import stored_heads

    folder, tok, _ = scored
    from types import SimpleNamespace

    from distill_jax.traces.store import TraceStore
    reader = TraceStore.open(str(folder / "s")).signal("hidden")
    source = SimpleNamespace(signals={"hidden": reader.header}, head=lambda name: reader.head())
    student = SimpleNamespace(tokenizer=SimpleNamespace(real=tok.real + 1))
    with pytest.raises(ValueError, match="their vocabularies differ"):
        stored_heads(source, ("hidden",), student, None)


def test_a_teacher_of_nan(scored, tmp_path):
    """NaN in one row of twelve: counted and left out. In all of them: an error that names the first."""
    _, tok, _ = scored
    store = make_store(tmp_path / "s", some_traces(12), tok)
    model, params = tiny_model(tok.real)
    job = ScoreJob(store="", teacher="t", signal="topk:64", batch_tokens=512)
    only = sorted(set(store.read([5])[0].tokens.tolist()) - {
        t for i in range(12) if i != 5 for t in store.read([i])[0].tokens.tolist()})
    assert only, "row 5 has a token of its own"
    embed = params["embed"]["embedding"].at[only[0]].set(np.nan)
    one = {**params, "embed": {"embedding": embed}, "lm_head": {"kernel": params["embed"]["embedding"]}}
    untied = type(model)(dataclasses.replace(model.config, tied=False))
    assert score_store(store, untied, one, tok, job)["rows_without_signal"] == {"not_finite": 1}
    every = jax.tree.map(lambda x: x * np.nan, params)
    with pytest.raises(ValueError, match="12 of 12 rows, the first is row 0"):
        score_store(store, model, every, tok, dataclasses.replace(job, name="all"))


def test_fidelity_of_a_scored_store(scored):
    """States give the whole teacher back, sixteen draws less of it; a store of another tokenizer is refused."""
    from distill_jax.jobs.fidelity import FidelityJob, measure
    from distill_jax.traces.store import TraceStore

    folder, tok, _ = scored
    models = {"teacher": tiny_model(tok.real), "student": tiny_model(tok.real, seed=1)}
    job = FidelityJob(store="", teacher="t", student="s", holdout=0, tokens=100, chunk=32)
    store = TraceStore.open(str(folder / "s"))
    report = measure(store, models, {"teacher": tok, "student": tok}, job)
    got = report["signals"]
    assert report["tokens"] == 100
    assert got["hidden"]["angle_logits"] < 1 < got["sampled16"]["angle_logits"]
    assert got["hidden"]["kl"] < 1e-3 and got["hidden"]["angle_head"] < got["topk64"]["angle_head"]
    assert got["hidden"]["angle_head"] < got["topk64, renormalised"]["angle_head"]
    mask = sum(int(r.mask.sum()) for r in store.signal("topk64").read(range(len(store))))
    size = sum(b for c in store.signal("topk64").shards for m in c.arrays.values() for b, _ in m.files.values())
    assert got["topk64"]["bytes_per_token"] == pytest.approx(size / mask, rel=1e-6)
    other = load_tokenizer(tiny_folder(folder / "other", vocabulary=300))
    with pytest.raises(ValueError, match="not the store's"):
        measure(store, models, {"teacher": other, "student": tok}, job)
