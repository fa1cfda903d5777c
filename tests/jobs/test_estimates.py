"""What a critic and a reference say of rows: equal to running them by hand, however the rows are cut into batches."""

import dataclasses

import jax
import numpy as np
import pytest

from distill_jax.core.roles import ANSWER, INJECTED, QUESTION, THINK
from distill_jax.jobs.estimates import Measures, estimate, load_estimates, numbers_of, save_estimates
from distill_jax.losses.rows.value import value_error
from distill_jax.models.projectors import ValueHead
from distill_jax.models.transformer import Transformer, init_params
from distill_jax.objective.term import Term
from distill_jax.rollout.estimators import Gae, ReinforcePlusPlus
from distill_jax.sharding import make_mesh
from distill_jax.traces.store import Row
from distill_jax.traces.trace import Encoded, simple_trace
from tests.train.tiny import CONFIG, setup

LENGTHS = (9, 4, 14, 6)


def row_of(n: int, seed: int) -> Row:
    """A third question, thinking with one injected token, and an answer of one token."""
    rng = np.random.default_rng(seed)
    roles = np.full(n, int(THINK), np.uint8)
    roles[:n // 3], roles[n // 2], roles[-1] = int(QUESTION), int(INJECTED), int(ANSWER)
    ids = rng.integers(CONFIG.vocab_size, size=n).astype(np.int32)
    injected = np.arange(n) == n // 2
    trace = simple_trace("q", "t", "a").replace(encoded=Encoded(
        tokenizer="", ids=ids, prompt_length=n // 3, injected=injected,
        logprobs=np.where(injected | (np.arange(n) < n // 3), 0, -1.5).astype(np.float32)))
    return Row(trace=trace, text="", tokens=ids, roles=roles, steps=np.zeros(n, np.int32),
               parts=np.zeros(n, np.int16), spans=np.zeros((n, 2), np.int32))


@pytest.fixture(scope="module")
def made():
    """(rows, per-token values and reference log-probs by hand, Measures of some batch size, parameters)."""
    rows = [row_of(n, i) for i, n in enumerate(LENGTHS)]
    model = Transformer(CONFIG)
    reference = init_params(model, jax.random.key(7))
    kernel = np.random.default_rng(0).normal(size=(CONFIG.hidden_size, 1)).astype(np.float32)
    critic = ValueHead(source="student/main", width=CONFIG.hidden_size)

    def measures(devices: int, batch_tokens: int) -> tuple[Measures, dict]:
        mesh = make_mesh(fsdp=devices, devices=jax.devices()[:devices])
        config, state = setup({"v": Term(value_error, student="critic/main", target="fields")}, mesh,
                              projectors={"critic": critic})
        config = dataclasses.replace(config, models={"student": model, "reference": model})
        return Measures(config, {"reference": reference}, batch_tokens), {
            "student": state.params["student"], "critic": {"kernel": kernel, "bias": np.float32([0.25])}}

    _, params = measures(1, 64)
    tokens = np.stack([np.pad(r.tokens, (0, max(LENGTHS) - len(r.tokens))) for r in rows])
    hidden = jax.jit(lambda p: model.apply({"params": p}, tokens, method="hidden").hidden)(params["student"])
    said = jax.nn.log_softmax(jax.jit(lambda p: model.apply({"params": p}, tokens))(reference))
    values = [np.append(0, np.asarray(h @ kernel + 0.25)[:n - 1, 0]) for h, n in zip(hidden, LENGTHS)]
    logprobs = [np.append(0, np.asarray(s)[np.arange(n - 1), r.tokens[1:]]) for s, n, r in zip(said, LENGTHS, rows)]
    return rows, values, logprobs, measures


@pytest.mark.parametrize("devices,batch_tokens", [(1, 1000), (1, 16), (4, 32)])
def test_measures_by_hand(made, devices, batch_tokens):
    rows, values, logprobs, measures = made
    asked, params = measures(devices, batch_tokens)
    with jax.set_mesh(asked.config.mesh):
        got = asked(Gae(reference="reference", beta=0.1), params, rows)
    for i, row in enumerate(rows):
        at = np.isin(row.roles, [int(THINK), int(ANSWER)])
        for name, want in (("values", values), ("reference", logprobs)):
            np.testing.assert_allclose(got[name][i], np.where(at, want[i], 0), atol=2e-5)
    assert asked(ReinforcePlusPlus(), params, rows) == {}, "nobody is asked, nothing runs"


def test_estimates_stand_at_the_tokens_that_were_sampled_and_survive_the_disk(made, tmp_path):
    rows, values, logprobs, _ = made
    traces = [r.trace for r in rows]
    gae = Gae(gamma=1.0, lam=1.0, reference="reference", beta=0.1, whiten=False)
    said = estimate(gae, traces, rows, [1.0] * 4, np.zeros(4, int), [True] * 4,
                    {"values": values, "reference": logprobs})
    for i, row in enumerate(rows):
        at = np.isin(row.roles, [int(THINK), int(ANSWER)])
        kl = (-1.5 - logprobs[i])[at]
        want = 1.0 - 0.1 * np.cumsum(kl[::-1])[::-1]  # the injected token is no step of the episode
        np.testing.assert_allclose(said["returns"][i][at], want, rtol=1e-5)
        np.testing.assert_allclose(said["advantages"][i][at], want - values[i][at], rtol=1e-4, atol=1e-5)
        assert not any(of[i][~at].any() for of in said.values()) and {of[i].dtype for of in said.values()} == {
            np.dtype(np.float32)}
    save_estimates(tmp_path / "rollouts" / "0000003.npz", said)
    back = load_estimates(tmp_path / "rollouts" / "0000003.npz")
    assert [p.name for p in (tmp_path / "rollouts").iterdir()] == ["0000003.npz"]
    for name, of in said.items():
        for a, b in zip(of, back[name], strict=True):
            np.testing.assert_array_equal(a, b)
    numbers = numbers_of(back, traces)
    flat = np.concatenate([r[np.isin(x.roles, [int(THINK), int(ANSWER)])] for r, x in zip(said["returns"], rows)])
    assert numbers["return"] == pytest.approx(float(flat.mean()), rel=1e-5) and numbers["explained_variance"] < 1
    save_estimates(tmp_path / "none.npz", {"advantages": []})
    assert load_estimates(tmp_path / "none.npz") == {"advantages": []} and numbers_of({"advantages": []}, []) == {}
