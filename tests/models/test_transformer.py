"""The decoder: contracts of `apply`, packing, cache, taps, remat, sharding."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from distill_jax.core import tree
from distill_jax.core.head import NEG
from distill_jax.models.config import AttentionConfig, ModelConfig
from distill_jax.models.transformer import Transformer, init_params, segment_positions
from distill_jax.sharding import batch_spec, make_mesh, param_shardings
from tests.models.common import EVERYTHING, PLAIN, make, tokens

BOTH = pytest.mark.parametrize("config", [PLAIN, EVERYTHING], ids=["plain", "everything"])


@BOTH
def test_shapes_and_parameter_count(config):
    model, params = make(config)
    logits = model.apply({"params": params}, tokens(2, 7))
    assert logits.shape == (2, 7, 61) and logits.dtype == jnp.float32
    assert tree.count(params) == config.num_params
    assert params["layers"]["attention"]["q"]["kernel"].shape[0] == config.num_layers
    assert all(type(x).__name__ == "ArrayImpl" for x in jax.tree.leaves(params))  # no boxed metadata
    assert bool(jnp.all(logits[..., 57:] == NEG)) == (config.real_vocab == 57)


@BOTH
def test_logits_are_head_of_hidden(config):
    model, params = make(config)
    out = model.apply({"params": params}, tokens(2, 7), method="hidden")
    logits = model.apply({"params": params}, tokens(2, 7))
    np.testing.assert_array_equal(model.head(params).logits(out.hidden), logits)
    assert out.taps == () and out.cache is None


@BOTH
def test_packed_documents_never_see_each_other(config):
    """Changing one document leaves the others' logits equal to the bit; a document alone gives the same logits."""
    model, params = make(config)
    segments = jnp.asarray([[1] * 5 + [2] * 7 + [3] * 3 + [0]], jnp.int32)
    apply = jax.jit(lambda t: model.apply({"params": params}, t, segment_ids=segments))
    one = tokens(1, 16)
    other = jnp.where(segments == 2, (one + 1) % 57, one)
    a, b = apply(one), apply(other)
    keep = np.asarray(segments[0]) != 2
    np.testing.assert_array_equal(a[0, keep], b[0, keep])
    assert not np.array_equal(a[0, ~keep], b[0, ~keep])
    alone = model.apply({"params": params}, one[:, 5:12])
    np.testing.assert_allclose(alone[0], a[0, 5:12], atol=2e-5)


@BOTH
def test_padding_on_either_side_changes_nothing(config):
    model, params = make(config)
    row = tokens(1, 6)
    alone = model.apply({"params": params}, row)
    for left, right in [(3, 0), (0, 3), (2, 1)]:
        padded = jnp.pad(row, ((0, 0), (left, right)))
        segments = jnp.pad(jnp.ones_like(row), ((0, 0), (left, right)))
        out = model.apply({"params": params}, padded, segment_ids=segments)
        np.testing.assert_allclose(out[:, left:left + 6], alone, atol=2e-5)


def test_segment_positions():
    ids = jnp.asarray([[1, 1, 1, 2, 2, 3, 0, 0], [0, 0, 5, 5, 5, 5, 2, 2]], jnp.int32)
    np.testing.assert_array_equal(segment_positions(ids), [[0, 1, 2, 0, 1, 0, 0, 1], [0, 1, 0, 1, 2, 3, 0, 1]])


@BOTH
def test_cached_equals_uncached(config):
    """Ragged right-padded prefill, then single tokens, then two at once, one row pausing."""
    model, params = make(config)
    full = tokens(3, 12)
    want = model.apply({"params": params}, full)
    step = jax.jit(lambda t, s, c: model.apply({"params": params}, t, segment_ids=s, cache=c, method="hidden"))
    head = model.head(params)
    have = np.array([7, 4, 1])
    mask = jnp.asarray(np.arange(7)[None] < have[:, None], jnp.int32)
    out = step(jnp.where(mask == 1, full[:, :7], 5), mask, model.init_cache(3, 14))
    logits = head.logits(out.hidden)
    for row, n in enumerate(have):
        np.testing.assert_allclose(logits[row, :n], want[row, :n], atol=2e-5)
    for width, active in [(1, [1, 1, 1]), (1, [1, 0, 1]), (2, [1, 1, 1])]:
        new = jnp.stack([full[r, n:n + width] for r, n in enumerate(have)])
        segments = jnp.broadcast_to(jnp.asarray(active, jnp.int32)[:, None], new.shape)
        out = step(new, segments, out.cache)
        logits = head.logits(out.hidden)
        for row in np.flatnonzero(active):
            np.testing.assert_allclose(logits[row], want[row, have[row]:have[row] + width], atol=2e-5)
        have = have + width * np.array(active)
        np.testing.assert_array_equal(out.cache.lengths, have)


def test_cache_rows_put_and_grow():
    model, params = make(PLAIN)
    out = model.apply({"params": params}, tokens(2, 5), cache=model.init_cache(2, 6), method="hidden")
    doubled = out.cache.rows(jnp.asarray([1, 1, 0])).grow(9)
    assert doubled.k.shape == (2, 3, 2, 9, 8) and doubled.lengths.tolist() == [5, 5, 5]
    np.testing.assert_array_equal(doubled.k[:, 0, :, :6], out.cache.k[:, 1])
    put = model.init_cache(4, 9).put(jnp.asarray([2, 7]), doubled.rows(jnp.asarray([0, 2])))
    assert put.lengths.tolist() == [0, 0, 5, 0]  # row 7 does not exist: dropped
    np.testing.assert_array_equal(put.v[:, 2], doubled.v[:, 0])


def test_a_decoding_loop_works_in_place():
    """The cache is donated and updated where it lies: temporaries stay below a quarter of it."""
    model = Transformer(dataclasses.replace(PLAIN, num_layers=16))
    params = init_params(model, jax.random.key(0))
    cache = model.init_cache(2, 2048)

    def loop(cache, token):
        def step(_, carry):
            cache, token = carry
            out = model.apply({"params": params}, token[:, None], cache=cache, method="hidden")
            return out.cache, model.head(params).logits(out.hidden)[:, 0].argmax(-1).astype(jnp.int32)

        return jax.lax.fori_loop(0, 3, step, (cache, token))

    compiled = jax.jit(loop, donate_argnums=0).lower(cache, jnp.zeros((2,), jnp.int32)).compile()
    memory = compiled.memory_analysis()
    assert memory is not None and memory.temp_size_in_bytes < tree.nbytes((cache.k, cache.v)) / 4
    out, _ = compiled(cache, jnp.zeros((2,), jnp.int32))
    assert out.lengths.tolist() == [3, 3] and cache.k.is_deleted()


@BOTH
def test_taps(config):
    """A tap is the layer's output: what a model of the first layers alone gives."""
    model, params = make(config)
    t = tokens(2, 5)
    out = model.apply({"params": params}, t, method="hidden", taps=(0, -1, 1))
    assert [x.shape for x in out.taps] == [(2, 5, 32)] * 3
    short = dataclasses.replace(config, num_layers=1, attention=dataclasses.replace(
        config.attention, sliding=config.attention.sliding[:1]))
    first = {**params, "layers": jax.tree.map(lambda x: x[:1], params["layers"])}
    want = Transformer(short).apply({"params": first}, t, method="hidden", taps=(0,)).taps[0]
    np.testing.assert_allclose(out.taps[0], want, atol=1e-5)
    assert not np.allclose(out.taps[0], out.taps[1])
    with pytest.raises(ValueError, match="layers 0 to"):
        model.apply({"params": params}, t, method="hidden", taps=(config.num_layers,))


def test_inputs_embeds_replace_the_embedding():
    model, params = make(EVERYTHING)
    t = tokens(2, 5)
    embeds = params["embed"]["embedding"][t] * 5.0
    np.testing.assert_allclose(model.apply({"params": params}, None, inputs_embeds=embeds),
                               model.apply({"params": params}, t), atol=1e-6)


@pytest.mark.parametrize("remat", ["full", "dots"])
def test_remat_changes_no_gradient(remat):
    model, params = make(EVERYTHING)
    t = tokens(2, 9)
    loss = lambda m: jax.jit(jax.grad(lambda p: jnp.mean(m.apply({"params": p}, t, method="hidden").hidden ** 3)))
    want, got = loss(model)(params), loss(Transformer(EVERYTHING, remat=remat))(params)
    # as a tree: recomputed sums are rounded in another order, so single small elements differ by more
    gap = tree.global_norm(jax.tree.map(jnp.subtract, want, got)) / tree.global_norm(want)
    assert float(gap) < 1e-6


def test_bfloat16_compute_keeps_float32_parameters():
    model, params = make(EVERYTHING, dtype=jnp.bfloat16)
    out = model.apply({"params": params}, tokens(2, 7), method="hidden")
    assert out.hidden.dtype == jnp.bfloat16 and {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    exact = Transformer(EVERYTHING).apply({"params": params}, tokens(2, 7), method="hidden").hidden
    assert float(jnp.abs(out.hidden.astype(jnp.float32) - exact).max()) < 0.3


@pytest.mark.parametrize("axes", [{"fsdp": 8}, {"tensor": 2, "fsdp": 2, "data": 2}, {"tensor": 8}],
                         ids=["fsdp", "mixed", "tensor"])
def test_sharded_equals_single_device(axes):
    model, params = make(EVERYTHING)
    t = tokens(8, 6)
    want = jax.jit(model.apply)({"params": params}, t)
    mesh = make_mesh(**axes)
    placed = jax.device_put(params, param_shardings(mesh, params))
    rows = jax.device_put(t, NamedSharding(mesh, batch_spec()))
    with jax.set_mesh(mesh):
        got = jax.jit(model.apply)({"params": placed}, rows)
    np.testing.assert_allclose(got, want, atol=2e-5)


def test_init_under_a_mesh_is_sharded_and_the_same():
    mesh = make_mesh(fsdp=4, tensor=2)
    model = Transformer(PLAIN)
    there, here = init_params(model, jax.random.key(0), mesh=mesh), init_params(model, jax.random.key(0))
    assert there["layers"]["mlp"]["up"]["kernel"].sharding.spec == PartitionSpec(None, "fsdp", "tensor")
    jax.tree.map(np.testing.assert_array_equal, there, here)


def test_flops_against_the_compiler():
    """flops_per_token counts what XLA counts, but for the causal half that a dense score matrix does not save."""
    config = dataclasses.replace(PLAIN, num_layers=1, hidden_size=64, mlp_size=128, vocab_size=128, head_dim=16)
    model, length = Transformer(config), 16
    params = jax.eval_shape(lambda: init_params(model, jax.random.key(0)))
    run = jax.jit(lambda p, t: model.apply({"params": p}, t))
    cost = run.lower(params, jax.ShapeDtypeStruct((1, length), jnp.int32)).compile().cost_analysis()
    assert cost is not None
    want = config.flops_per_token(length) * length
    assert want < cost["flops"] < 1.15 * want
    window = dataclasses.replace(config, attention=AttentionConfig(window=4, sliding=(True,)))
    saved = 2 * 2 * 64 * (8.5 - (4 * 5 / 2 + 12 * 4) / 16)
    assert config.flops_per_token(length) - window.flops_per_token(length) == pytest.approx(saved)


@pytest.mark.parametrize("change, words", [
    ({"num_kv_heads": 3}, "multiple"), ({"activation": "tanh"}, "silu"), ({"real_vocab": 62}, "vocab_size"),
    ({"attention": AttentionConfig(sliding=(True,), window=4)}, "2 layers"),
    ({"attention": AttentionConfig(sliding=(True, False))}, "window"), ({"num_layers": 0}, "num_layers"),
])
def test_bad_configs_say_what_is_wrong(change, words):
    with pytest.raises(ValueError, match=words):
        dataclasses.replace(PLAIN, **change)


def test_unknown_choices():
    with pytest.raises(ValueError, match="full"):
        Transformer(PLAIN, remat="some").init(jax.random.key(0), tokens(1, 2))
    with pytest.raises(ValueError, match="chunked"):
        Transformer(PLAIN, attention="flash").init(jax.random.key(0), tokens(1, 2))


def test_config_is_hashable():
    assert hash(EVERYTHING) == hash(dataclasses.replace(EVERYTHING)) and isinstance(EVERYTHING, ModelConfig)
