"""DDK's gaps on stores: the quotient of two perplexities on the same held-out tokens."""

import jax
import numpy as np
import pytest

from distill_jax.core.roles import SUPERVISED
from distill_jax.data import mixture
from distill_jax.data.source_specs import DomainGap, Mix, Store
from distill_jax.data.sources import open_source
from distill_jax.data.tokenizer import load_tokenizer
from distill_jax.jobs.mixing import DomainSteering, steering_of
from distill_jax.models.config import ModelConfig
from distill_jax.models.transformer import Transformer, init_params
from distill_jax.sharding import make_mesh
from distill_jax.traces.world.generate import WorldSpec, traces
from distill_jax.traces.world.tokenizer import build_tokenizer
from tests.data.storing import make_store


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mix")
    tok = load_tokenizer(build_tokenizer(folder / "tok", "compact"))
    for name, k, kind in (("a", 2, "token"), ("b", 4, "token"), ("c", 2, "topk")):
        make_store(folder / name, list(traces(WorldSpec(k=k), 60)), tok, signal=kind)
    stores = tuple(Store(path=str(folder / n), signals=("token",), seq_len=48, holdout=0.3) for n in "ab")
    config = ModelConfig(vocab_size=176, hidden_size=16, mlp_size=16, num_layers=1, num_heads=2, num_kv_heads=2,
                         head_dim=8, real_vocab=tok.real)
    model, mesh = Transformer(config), make_mesh(devices=jax.devices()[:1])
    return folder, tok, stores, model, {"student": init_params(model, jax.random.key(0), mesh=mesh)}, mesh


def test_gaps_are_quotients_of_perplexities(parts):
    _, tok, stores, model, params, mesh = parts
    mix = Mix(sources=stores, weights=(1.0, 1.0), rows=4, controller=DomainGap(every=5, batches=2))
    opened = open_source(mix, tok, seed=0)
    steering = steering_of(mix, opened, tok, student="student", model=model, mesh=mesh, seed=0)
    assert isinstance(steering, DomainSteering) and steering.every == 5
    gaps = steering.gaps(params)
    for gap, source in zip(gaps, steering._heldout, strict=True):
        said = []
        for batch in (source.batch(0), source.batch(1)):
            m, token = batch.main, batch.signals["token"]
            logits = model.apply({"params": params["student"]}, m.tokens, m.positions, m.segment_ids)
            logq = np.asarray(jax.nn.log_softmax(np.asarray(logits, np.float32)))[:, :-1]
            logq = np.take_along_axis(logq, m.tokens[:, 1:, None], -1)[..., 0]
            on = (np.isin(m.roles, SUPERVISED) & (m.weights > 0) & token.mask)[:, 1:]
            said.append(np.stack([token.logprobs[:, 1:][on], logq[on]]))
        logp, logq = np.concatenate(said, axis=1)
        np.testing.assert_allclose(gap, np.exp(-logq.mean()) / np.exp(-logp.mean()), rtol=2e-3)
    state = steering.update(mixture.initial(mix.weights), params, 0)
    np.testing.assert_allclose(state["shares"], mixture.first_shares(gaps), rtol=1e-5)
    later = steering.update(state, params, 5)
    assert int(later["taken"].sum()) == 20 and steering.source(later).since == 5


def test_what_does_not_fit_is_named(parts):
    folder, tok, stores, model, _, mesh = parts
    fixed = Mix(sources=stores, weights=(1.0, 1.0), rows=4)
    options = {"student": "student", "model": model, "mesh": mesh, "seed": 0}
    assert steering_of(fixed, None, tok, **options) is None
    wrong = Store(path=str(folder / "c"), signals=("topk",), seq_len=48, holdout=0.3)
    mix = Mix(sources=(wrong,), weights=(1.0,), rows=4, controller=DomainGap(teacher="topk"))
    with pytest.raises(ValueError, match=r"'topk' is of kind topk\. Run `distill-jax score .*/c --signal token`"):
        steering_of(mix, open_source(mix, tok, seed=0), tok, **options)
