"""Preference terms on pairs of a store in a training step: the margin of held-out pairs grows, cuts change nothing."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distill_jax.data.source_specs import Pairs
from distill_jax.data.sources import open_source
from distill_jax.data.tokenizer import load_tokenizer
from distill_jax.losses.rows.cross_entropy import cross_entropy
from distill_jax.losses.tokens.measures import sequence_log_ratio
from distill_jax.losses.tokens.preference import dpo, ipo, kto, odds_ratio, redi, simpo
from distill_jax.models.transformer import Transformer, init_params
from distill_jax.objective.controllers import Watched
from distill_jax.objective.reduce import means
from distill_jax.objective.term import Term, build_objective
from distill_jax.objective.tokens import TokenTerm, preference_metrics
from distill_jax.sharding import make_mesh, param_shardings
from distill_jax.traces.pairing import RightWrong, Singles
from distill_jax.traces.trace import simple_trace
from distill_jax.train.feed import place_global
from distill_jax.train.optim import AdamW
from distill_jax.train.state import create_state
from distill_jax.train.step import StepConfig, make_evaluation, make_gradient, make_step
from tests.data.conftest import tiny_folder
from tests.data.storing import judged_answers, make_store, some_traces
from tests.train.tiny import CONFIG

SEQ, REF = 256, "reference/main"
MODEL = dataclasses.replace(CONFIG, vocab_size=384, num_layers=1, init_std=0.1)


def term(loss, *, where="pair_ids", target="tokens", weight=1.0, **kwargs):
    return TokenTerm(loss, where=where, target=target, per="sequence", weight=weight, kwargs=kwargs)


PAIRED = {
    "dpo": term(dpo, target=REF, divergence="js", label_smoothing=0.1), "ipo": term(ipo, target=REF, weight=0.01),
    "simpo": term(simpo), "apart": term(simpo, where="apart"), "odds": term(odds_ratio), "redi": term(redi),
    "nll": Term(cross_entropy, where="chosen"), **preference_metrics(target=REF, beta=0.1)}
SINGLE = {"kto": term(kto, target=REF, z0=0.3, beta=0.5, desirable=1.2), **preference_metrics(target=REF, pairs=False),
          "z0": term(sequence_log_ratio, target=REF, where="mismatched", weight=0.0)}
TERMS = {"pairs": PAIRED, "singles": SINGLE}
CUTS = ({"parts": 4}, {"mesh": 2, "parts": 2})


@pytest.fixture(scope="module")
def tok(tmp_path_factory):
    return load_tokenizer(tiny_folder(tmp_path_factory.mktemp("tokenizer") / "tiny"))


@pytest.fixture(scope="module")
def models():
    """(model, parameters of the student, of the reference)."""
    model = Transformer(MODEL)
    return model, *(jax.tree.map(np.asarray, init_params(model, jax.random.key(s))) for s in (0, 1))


@pytest.fixture(scope="module", params=(("pairs", RightWrong(limit=2)), ("singles", Singles(limit=1))),
                ids=("pairs", "singles"))
def case(request, tok, tmp_path_factory):
    """(name of the terms, batch of a whole epoch: packed, unpacked)."""
    name, build = request.param
    path = str(tmp_path_factory.mktemp(name) / "s")
    make_store(path, judged_answers(some_traces(6)), tok)
    return name, *(whole_epoch(path, tok, build, pack) for pack in (True, False))


def whole_epoch(path, tok, build, pack):
    """An epoch of a store's pairs as one batch, filled up with empty rows to a multiple of 4."""
    source = open_source(Pairs(path=path, build=build, rows=1, seq_len=SEQ, pack=pack), tok, seed=0)
    n = source.parts[0].plan.sequences
    batch = dataclasses.replace(source, rows=n).batch(0)
    return jax.tree.map(lambda x: np.pad(x, [(0, -n % 4)] + [(0, 0)] * (x.ndim - 1)), batch)


@functools.cache
def compiled(name, mesh, parts):
    """(mesh, what places parameters on it, the gradient's function)."""
    where, model = make_mesh(data=mesh, devices=jax.devices()[:mesh]), Transformer(MODEL)
    config = StepConfig(objective=build_objective(TERMS[name]), models={"student": model, "reference": model},
                        mesh=where, micro_batches=parts, optimizers={"student": AdamW().build(10)})
    put = lambda p: jax.device_put(p, param_shardings(where, p))
    shapes = put(jax.tree.map(np.asarray, init_params(model, jax.random.key(0))))
    return where, put, jax.jit(make_gradient(config, {"student": jax.tree.map(lambda x: x.sharding, shapes)}))


def gradient(name, models, batch, *, mesh=1, parts=1):
    """(gradient tree, metrics) of a batch."""
    _, params, reference = models
    where, put, run = compiled(name, mesh, parts)
    with jax.set_mesh(where):
        grads, metrics = run({"student": put(params)}, {"reference": put(reference)}, place_global(batch, where),
                             np.int32(0), {})
    return jax.tree.map(np.asarray, grads), {k: float(v) for k, v in means(metrics["terms"]).items() if "/" not in k}


def norm(tree):
    return float(np.sqrt(sum((x.astype(np.float64)**2).sum() for x in jax.tree.leaves(tree))))


def test_cuts_of_a_batch_change_nothing(case, models):
    """Loss, metrics and gradient of the same pairs: packed, unpacked, in micro-batches, over two devices."""
    name, packed, unpacked = case
    assert len(packed.main.tokens) < len(unpacked.main.tokens)
    grads, values = gradient(name, models, unpacked)
    assert norm(grads) > 0.1 and all(np.isfinite(list(values.values())))
    for cut in CUTS[:None if name == "pairs" else 1]:
        others, again = gradient(name, models, packed, **cut)
        assert norm(jax.tree.map(np.subtract, others, grads)) < 2e-6 * norm(grads), cut
        for k, v in values.items():
            assert np.isclose(again[k], v, rtol=2e-5, atol=1e-6), (cut, k)


def test_metrics_are_what_they_say(case, models):
    """Share, margin and log-probs counted by hand from the log-probs of every pair; z0 from the answers to others."""
    name, _, batch = case
    model, params, reference = models
    m = batch.main
    logprobs = jax.jit(lambda p: jnp.take_along_axis(jax.nn.log_softmax(model.apply(
        {"params": p}, m.tokens, m.positions, m.segment_ids)[:, :-1]), m.tokens[:, 1:, None], axis=2)[..., 0])
    mine, other = (np.pad(np.asarray(logprobs(p)), ((0, 0), (1, 0))) for p in (params, reference))
    of = lambda side: np.isin(m.roles, (4, 5)) & (m.weights > 0) & (m.fields[side] != 0)
    sums = lambda x, side: np.where(of(side), x, 0.0).sum(axis=1)[of(side).any(axis=1)]
    values = gradient(name, models, batch)[1]
    for side in ("chosen", "rejected"):
        mean = np.mean(sums(mine, side) / sums(np.ones_like(mine), side))
        assert np.isclose(values[f"{side}_logprob"], mean, rtol=1e-4)
    if name == "singles":
        for term, side in (("z0", "mismatched"), ("chosen_reward", "chosen"), ("rejected_reward", "rejected")):
            assert np.isclose(values[term], np.mean(sums(mine - other, side)), rtol=1e-3, atol=1e-4)
    else:
        margin = sums(mine - other, "chosen") - sums(mine - other, "rejected")
        assert np.isclose(values["preference_accuracy"], np.mean(margin > 0)) and 0 < np.mean(margin > 0) < 1
        assert np.isclose(values["reward_margin"], 0.1 * np.mean(margin), rtol=1e-3, atol=1e-5)


def habits(n):
    """Questions with two answers: right ones say apples, wrong ones say Bob; thinking and question vary."""
    return [simple_trace(t.question, t.thinking, f"The answer is {word}.", group=t.group, verdict=word == "apples")
            for t in some_traces(n) for word in ("apples", "Bob")]


def trained(terms, spec, models, tok, steps=8):
    """(term means on held-out pairs before and after, of every update), the reference being the start."""
    model, params, _ = models
    source, heldout = (open_source(dataclasses.replace(spec, split=s), tok, seed=0) for s in ("train", "heldout"))
    mesh, objective = make_mesh(devices=jax.devices()[:1]), build_objective(terms)
    config = StepConfig(objective=objective, models={"student": model, "reference": model}, mesh=mesh,
                        optimizers={"student": AdamW(peak_lr=1e-2, warmup=1, decay="constant").build(steps)})
    copies = lambda: jax.tree.map(jnp.array, params)
    state = create_state({"student": copies()}, config.optimizers, mesh=mesh, seed=0, controllers=objective.init())
    frozen = {"reference": copies()}
    step, evaluate, seen = make_step(config, state), make_evaluation(config), []
    measured = lambda: {k: float(v) for k, v in means(evaluate(
        state.params, frozen, heldout.batch(0), state.step, state.controllers)).items()}
    with jax.set_mesh(mesh):
        before = measured()
        for i in range(steps):
            state, metrics = step(state, frozen, source.batch(i))
            seen.append({k: float(v) for k, v in means(metrics["terms"]).items()})
        return before, measured(), seen


def test_dpo_raises_the_margin_of_held_out_pairs(models, tok, tmp_path):
    make_store(tmp_path / "s", habits(24), tok)
    spec = Pairs(path=str(tmp_path / "s"), rows=4, seq_len=SEQ, holdout=0.3)
    terms = {"dpo": term(dpo, target=REF, beta=0.1), **preference_metrics(target=REF, beta=0.1)}
    before, after, seen = trained(terms, spec, models, tok)
    assert np.isclose(before["dpo"], np.log(2)) and before["reward_margin"] == before["preference_accuracy"] == 0
    assert np.isclose(seen[0]["dpo"], np.log(2)) and seen[-1]["dpo"] < 0.6
    assert after["reward_margin"] > 0.1 and after["preference_accuracy"] == 1 and after["dpo"] < before["dpo"]
    margin = after["chosen_logprob"] - after["rejected_logprob"]
    assert margin > before["chosen_logprob"] - before["rejected_logprob"]


def test_kto_parts_desirable_from_undesirable(models, tok, tmp_path):
    make_store(tmp_path / "s", habits(24), tok)
    spec = Pairs(path=str(tmp_path / "s"), build=Singles(), rows=4, seq_len=SEQ, holdout=0.3)
    terms = {"kto": term(kto, target=REF, beta=0.1, z0=Watched(watch="z0")),
             "z0": term(sequence_log_ratio, target=REF, where="mismatched", weight=0.0),
             **preference_metrics(target=REF, beta=0.1, pairs=False)}
    before, after, seen = trained(terms, spec, models, tok)
    assert np.isclose(before["kto"], 0.5) and np.isclose(seen[0]["kto"], 0.5) and after["kto"] < 0.48
    assert after["chosen_reward"] > after["rejected_reward"] + 0.1
    assert before["z0"] == 0 and after["z0"] != 0
