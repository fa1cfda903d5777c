"""Adafactor, Muon, and AdamW with small moments: hand values, references, curves, bytes, layouts, resuming."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from distill_jax.sharding import make_mesh
from distill_jax.train.checkpoint import Checkpoints
from distill_jax.train.feed import place_global
from distill_jax.train.moments import BLOCK, FIRST, SECOND, block_size, select
from distill_jax.train.optim import Adafactor, AdamW, Muon
from distill_jax.train.state import create_state, opt_state_shardings
from distill_jax.train.step import make_step
from tests.train.tiny import Synthetic, setup

FLAT = {"warmup": 0, "decay": "constant", "grad_clip": None}


def tree_of(seed, scale=1.0, axes=(2, 128, 192)):
    rng = np.random.default_rng(seed)
    draw = lambda *shape: jnp.asarray(scale * rng.normal(size=shape), jnp.float32)
    layers, inner, outer = axes
    return {"embed": {"embedding": draw(48, inner)}, "final_norm": {"scale": draw(inner)},
            "layers": {"mlp": {"up": {"kernel": draw(layers, inner, outer), "bias": draw(layers, outer)}}}}


def updates_of(tx, params, grads):
    """The updates for one gradient after the other."""
    state, out, update = tx.init(params), [], jax.jit(tx.update)
    for g in grads:
        got, state = update(g, state, params)
        out.append(got)
    return out


@pytest.mark.parametrize(("length", "block"), [
    (1536, 96), (8960, 140), (896, 56 * 4), (4096, 256), (256, 256), (128, 128), (48, 48), (1, 1), (509, 509)])
def test_blocks(length, block):
    assert block_size(length) == block and length % block == 0


@pytest.mark.parametrize("code", [FIRST, SECOND])
def test_codes(code):
    """Hand values; exact in the mean; the largest is exact; zeros stay; nothing of v becomes zero."""
    c = jnp.asarray([[0, 1, code.top]], code.dtype)
    want = [0, 2 * (1 / code.top) ** code.power, 2]
    np.testing.assert_allclose(code.decode(c, jnp.full((1, 1), 2.0))[0], want, rtol=1e-6)
    rng = np.random.default_rng(0)
    x = rng.normal(size=(3, 512)) * 10.0 ** rng.uniform(-4, 0, size=(3, 512))
    x[0, :256] = 0
    x = jnp.asarray(x if code.signed else x**2, jnp.float32)
    total = 0
    for seed in range(200):
        codes, scales = code.encode(x, jax.random.uniform(jax.random.key(seed), x.shape))
        total += code.decode(codes, scales) / 200
    assert codes.dtype == code.dtype and scales.shape == (3, 2)
    top = np.abs(x).reshape(3, 2, 256).max(-1)
    np.testing.assert_array_equal(scales, top)
    grid = np.repeat(top, 256, axis=-1) * 4.5 / code.top  # widest step, over the square root of the draws: 5 sigma
    assert np.all(np.abs(np.asarray(total - x)) <= grid / np.sqrt(200) * 2.5)
    assert not np.any(codes[0, :256]) and np.all(np.isfinite(code.decode(codes, scales)))
    if not code.signed:
        assert np.all(np.asarray(codes)[np.asarray(x) > 0] > 0)


def test_adafactor_is_optax_adafactor():
    params, grads = tree_of(0), [tree_of(s, 0.1) for s in (1, 2, 3)]
    for relative in (False, True):
        ours = updates_of(Adafactor(peak_lr=0.01, relative=relative, **FLAT).build(9), params, grads)
        with jax.numpy_dtype_promotion("standard"):
            theirs = updates_of(optax.adafactor(0.01, multiply_by_parameter_scale=relative), params, grads)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-9), ours, theirs)


def orthogonal(g):
    """Newton-Schulz of a matrix in NumPy (Jordan 2024)."""
    x = g / np.linalg.norm(g)
    if transposed := x.shape[0] > x.shape[1]:
        x = x.T
    for _ in range(5):
        a = x @ x.T
        x = 3.4445 * x + (-4.775 * a + 2.0315 * a @ a) @ x
    return x.T if transposed else x


def test_muon_treats_each_layer_alone():
    """First update by hand: Newton-Schulz of every layer, 0.2 sqrt(max(in, out)), decay; the rest is Adam's sign."""
    params, grad = tree_of(0), tree_of(1)
    got = updates_of(Muon(peak_lr=0.1, weight_decay=0.5, **FLAT).build(9), params, [grad])[0]
    up, kernel = got["layers"]["mlp"]["up"], np.asarray(params["layers"]["mlp"]["up"]["kernel"])
    for layer in range(2):
        o = orthogonal(np.asarray(grad["layers"]["mlp"]["up"]["kernel"][layer], np.float64))
        want = -0.1 * (0.2 * np.sqrt(192) * o + 0.5 * kernel[layer])
        np.testing.assert_allclose(up["kernel"][layer], want, atol=2e-4)
        alone = np.asarray(up["kernel"][layer]) + 0.05 * kernel[layer]
        assert np.sqrt(np.mean(alone**2)) == pytest.approx(0.1 * 0.2, rel=0.2)  # the size of an AdamW update
    np.testing.assert_allclose(up["bias"], -0.1 * np.sign(grad["layers"]["mlp"]["up"]["bias"]), atol=1e-5)
    want = -0.1 * (np.sign(grad["embed"]["embedding"]) + 0.5 * np.asarray(params["embed"]["embedding"]))
    np.testing.assert_allclose(got["embed"]["embedding"], want, atol=3e-5)


@pytest.mark.parametrize(("state", "error"), [("bfloat16", 0.006), ("int8", 0.04)])
def test_small_moments_follow_adam(state, error):
    """Twelve updates with gradients of very different sizes: each close to optax's, and no bias in their sum."""
    params = tree_of(0)
    sizes = jax.tree.map(lambda x: jnp.exp(0.5 * x), tree_of(9))
    grads = [jax.tree.map(lambda x, s: x * s + s, tree_of(s), sizes) for s in range(1, 13)]
    make = lambda **kwargs: AdamW(peak_lr=1.0, **FLAT, **kwargs).build(20)
    ours, exact = updates_of(make(state=state), params, grads), updates_of(make(), params, grads)
    norm = lambda tree: float(optax.global_norm(tree))
    gap = jax.tree.map(lambda a, b: a - b, ours, exact)
    assert all(norm(g) < error * norm(e) for g, e in zip(gap, exact)), [norm(g) / norm(e) for g, e in zip(gap, exact)]
    total = lambda updates: jax.tree.map(lambda *u: sum(u), *updates)
    assert norm(total(gap)) < error * norm(total(exact))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), ours[0], exact[0])


@pytest.mark.parametrize("state", ["bfloat16", "int8"])
def test_second_moments_do_not_stand_still(state):
    """With b2 = 0.999 and no gradient v falls by a thousandth an update; rounded to nearest it never would."""
    params = {"w": {"kernel": jnp.zeros((8, 256))}}
    tx = AdamW(b2=0.999, state=state, **FLAT).build(9)
    grad = {"w": {"kernel": jnp.asarray(np.random.default_rng(0).uniform(1, 2, (8, 256)), jnp.float32)}}
    kept = tx.init(params)
    update = jax.jit(lambda g, s: tx.update(g, s, params)[1])
    moment = lambda s: next(x for x in jax.tree.leaves(s, is_leaf=lambda x: hasattr(x, "nu")) if hasattr(x, "nu"))

    def mean(s):
        m = moment(s)
        nu = m.nu["w"]["kernel"]
        return float(jnp.mean(SECOND.decode(nu, m.nu_scale["w"]["kernel"]) if state == "int8" else
                              nu.astype(jnp.float32)))

    kept = update(grad, kept)
    before = mean(kept)
    for _ in range(100):
        kept = update(jax.tree.map(jnp.zeros_like, grad), kept)
    assert mean(kept) / before == pytest.approx(0.999**100, rel=0.01)


def losses(optim, steps=40):
    config, state = setup(optim=optim, total=steps)
    step, source, out = make_step(config, state), Synthetic(), []
    for i in range(steps):
        state, metrics = step(state, {}, place_global(source.batch(i), config.mesh))
        out.append(float(metrics["loss"]))
    return np.array(out)


@pytest.mark.slow
def test_curves_of_a_tiny_model():
    """The loss with small moments stays within 2% of AdamW's at every update, and falls by a quarter of its start."""
    exact = losses(AdamW(peak_lr=1e-2, warmup=2))
    assert exact[-1] < 0.75 * exact[0]
    for state in ("bfloat16", "int8"):
        np.testing.assert_allclose(losses(AdamW(peak_lr=1e-2, warmup=2, state=state)), exact, rtol=0.02, err_msg=state)


@pytest.mark.parametrize("optim", [Adafactor(peak_lr=1e-2), Muon(peak_lr=1e-2)])
def test_others_learn(optim):
    curve = losses(optim)
    assert curve[-1] < 0.75 * curve[0]


def test_bytes_of_the_state():
    params = tree_of(0, axes=(2, 256, 1024))
    n = sum(x.size for x in jax.tree.leaves(params))
    size = {name: AdamW(state=name).state_bytes(params) / n for name in ("float32", "bfloat16", "int8")}
    assert size["float32"] == pytest.approx(8, abs=0.01) and size["bfloat16"] == pytest.approx(4, abs=0.01)
    assert 2 < size["int8"] <= 2 + 8 / 64 + 0.01
    assert Adafactor().state_bytes(params) < 0.15 * n
    assert Muon().state_bytes(params) < 4.3 * n
    assert block_size(1024) <= BLOCK


@pytest.mark.parametrize("optim", [AdamW(), AdamW(state="bfloat16"), AdamW(state="int8"), Muon(), Adafactor()])
def test_states_lie_like_their_parameters(optim):
    """On eight devices: moments and scales cut like the parameter; an AdamW update sends nothing but the norm."""
    mesh = make_mesh(fsdp=2, tensor=4)
    lies = lambda *spec: NamedSharding(mesh, PartitionSpec(*spec))
    params = jax.device_put(tree_of(0, axes=(2, 256, 1024)), {
        "embed": {"embedding": lies("tensor", "fsdp")}, "final_norm": {"scale": lies()},
        "layers": {"mlp": {"up": {"kernel": lies(None, "fsdp", "tensor"), "bias": lies(None, "tensor")}}}})
    tx = optim.build(9)
    state = create_state({"student": params}, {"student": tx}, mesh=mesh).opt_state["student"]
    shapes = jax.eval_shape(tx.init, params)
    here = sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(state))
    whole = sum(x.nbytes for x in jax.tree.leaves(state))
    if isinstance(optim, Adafactor):
        return  # rows and columns are small, and on every device
    assert here < 1.05 * whole / 8 + 2 * 4 * (256 + 1024), (here, whole)
    placed = opt_state_shardings(shapes, params, mesh)
    if isinstance(optim, AdamW):
        update = jax.jit(tx.update, out_shardings=(jax.tree.map(lambda p: p.sharding, params), placed))
        text = update.lower(params, state, params).compile().as_text()
        assert not any(word in text for word in ("all-gather", "all-to-all", "collective-permute")), "an update gathers"


def test_resumes_with_the_same_bits(tmp_path):
    """Eight bits: three updates, or two, a checkpoint, and one."""
    config, state = setup(optim=AdamW(peak_lr=1e-2, state="int8"))
    step, source = make_step(config, state), Synthetic()
    batch = lambda i: place_global(source.batch(i), config.mesh)
    for i in range(2):
        state, _ = step(state, {}, batch(i))
    checkpoints = Checkpoints(tmp_path / "c")
    checkpoints.save(2, state, {})
    checkpoints.wait()
    restored = checkpoints.restore(2, state)
    checkpoints.close()
    assert {x.dtype for x in jax.tree.leaves(restored.opt_state)} >= {np.dtype("int8"), np.dtype("uint8")}
    a, b = step(state, {}, batch(2))[0], step(restored, {}, batch(2))[0]
    jax.tree.map(np.testing.assert_array_equal, (a.params, a.opt_state), (b.params, b.opt_state))


def test_bad_state():
    with pytest.raises(ValueError, match=r"AdamW.state must be one of float32, bfloat16, int8, got 'int4'"):
        AdamW(state="int4")
    with pytest.raises(ValueError, match="Muon needs peak_lr >= 0"):
        Muon(peak_lr=-1.0)


@pytest.mark.parametrize("optim", [AdamW(), AdamW(state="bfloat16"), AdamW(state="int8"), Muon(), Adafactor()])
def test_an_update_that_is_not_ok_changes_no_state(optim):
    params, tx = tree_of(0), optim.build(9)
    same = lambda a, b: jax.tree.map(np.testing.assert_array_equal, a, b)
    update = jax.jit(lambda g, s, ok: tx.update(g, s, params, ok=ok))
    _, first = update(tree_of(1), tx.init(params), True)
    plain = jax.jit(lambda g, s: tx.update(g, s, params))(tree_of(1), tx.init(params))
    same(plain[1], first)
    same(update(jax.tree.map(lambda x: x * np.nan, tree_of(2)), first, False)[1], first)
    assert any(np.any(a != b) for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(tx.init(params))))


def test_the_cpu_copies_no_moments():
    """Moments are overwritten where they lie: beside parameters and state there is one array and no second."""
    params, tx = {"w": {"kernel": jnp.zeros((256, 1024))}}, AdamW().build(9)

    def step(params, state, grads):
        ok = jnp.isfinite(optax.tree.norm(grads))
        updates, state = tx.update(grads, state, params, ok=ok)
        return select(ok, optax.apply_updates(params, updates), params), state

    made = jax.jit(step, donate_argnums=(0, 1)).lower(params, tx.init(params), params).compile()
    assert made.memory_analysis().temp_size_in_bytes < 1.5 * params["w"]["kernel"].nbytes
