"""Every family against transformers + torch on tiny random checkpoints: the same files, the same logits.

fp32: max |difference| <= 2e-4 (logits are of order 5). `make parity` runs these; they need torch.
"""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distill_jax.jobs.verify_hf import verify_hf
from distill_jax.models import hf
from distill_jax.models.config import AttentionConfig, ModelConfig
from distill_jax.models.families import FAMILIES, from_hf, to_hf
from distill_jax.models.rope import Llama3, Rope, Yarn
from distill_jax.models.transformer import Transformer
from distill_jax.train.balance import balance_loss
from tests.models.common import make

pytestmark = pytest.mark.parity
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
torch.set_num_threads(1)  # tiny models: more threads only wait for each other

TOLERANCE = 2e-4
VOCAB = 99
ROWS, LENGTH = 3, 33  # one shape for most tests: a compile each for plain and for segmented rows
SIZES = {"vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
         "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.3}
GEMMA = {"head_dim": 16, "query_pre_attn_scalar": 10, "sliding_window": 5}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16}
EXPERTS = {"head_dim": 16, "num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 16}

CASES = {  # name -> (model_type, fields beyond SIZES)
    "qwen2": ("qwen2", {}),
    "qwen2-tied": ("qwen2", {"tie_word_embeddings": True}),
    "qwen2-window": ("qwen2", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}),
    "qwen2-yarn": ("qwen2", {"rope_parameters": YARN}),
    "qwen3": ("qwen3", {"head_dim": 24}),
    "qwen3-bias-window": ("qwen3", {"attention_bias": True, "use_sliding_window": True, "sliding_window": 4,
                                    "max_window_layers": 2, "head_dim": 8}),
    "qwen3_moe": ("qwen3_moe", {**EXPERTS, "norm_topk_prob": True}),
    "llama": ("llama", {}),
    "llama-bias": ("llama", {"attention_bias": True, "mlp_bias": True, "head_dim": 16}),
    "llama-llama3": ("llama", {"rope_parameters": LLAMA3}),
    "llama-linear": ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 3.0}}),
    "mistral": ("mistral", {"sliding_window": None}),
    "mistral-window": ("mistral", {"sliding_window": 5, "head_dim": 16}),
    "gemma2": ("gemma2", GEMMA),
    "gemma3_text": ("gemma3_text", {**GEMMA, "layer_types": ["sliding_attention", "full_attention"] * 2,
                                    "num_hidden_layers": 4}),
    "gemma3_text-capped": ("gemma3_text", {**GEMMA, "final_logit_softcapping": 3.0, "tie_word_embeddings": False}),
}


def build(model_type, fields, folder, dtype="float32"):
    """A random checkpoint written by transformers, with biases and norms that are not trivial."""
    config = transformers.AutoConfig.for_model(model_type, **{**SIZES, **fields})
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    model = model.to(getattr(torch, dtype))
    model.save_pretrained(folder)
    return model


@pytest.fixture(scope="module", params=list(CASES))
def pair(request, tmp_path_factory):
    """(torch model, ours jitted, our parameters, folder)"""
    folder = tmp_path_factory.mktemp("parity") / request.param
    theirs = build(*CASES[request.param], folder)
    ours, params = hf.load(folder)
    return theirs, compiled(ours, params), params, folder, ours


def compiled(model, params):
    """tokens, segment ids or None -> logits"""
    run = jax.jit(lambda p, t, s: model.apply({"params": p}, t, segment_ids=s))
    return lambda t, s=None: np.asarray(run(params, jnp.asarray(t, jnp.int32),
                                            None if s is None else jnp.asarray(s, jnp.int32)))


def ids(rows, length, seed=0):
    return np.random.default_rng(seed).integers(0, VOCAB, (rows, length))


def torch_logits(model, tokens, **kwargs):
    with torch.no_grad():
        return model(torch.tensor(tokens), **{k: torch.tensor(v) for k, v in kwargs.items()}).logits.float().numpy()


def close(got, want, tolerance=TOLERANCE):
    assert np.abs(want).max() > 1, "logits too small to compare"
    assert np.abs(np.asarray(got) - want).max() <= tolerance


@pytest.mark.parametrize("length", [1, LENGTH])
def test_odd_lengths(pair, length):
    theirs, apply, *_ = pair
    t = ids(ROWS, length)
    close(apply(t), torch_logits(theirs, t))


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding(pair, side):
    """Rows of different lengths: what transformers does with an attention mask, we do with segment ids."""
    theirs, apply, *_ = pair
    t, mask = ids(ROWS, LENGTH), np.zeros((ROWS, LENGTH), np.int64)
    for row, n in enumerate((LENGTH, 18, 3)):
        mask[row, (slice(LENGTH - n, LENGTH) if side == "left" else slice(0, n))] = 1
    positions = np.maximum(mask.cumsum(1) - 1, 0)
    want = torch_logits(theirs, t, attention_mask=mask, position_ids=positions)
    got = apply(t, mask)
    close(got[mask == 1], want[mask == 1])


def test_packed_rows(pair):
    """Documents packed into a row have the logits that transformers gives each of them alone."""
    theirs, apply, *_ = pair
    t, lengths = ids(ROWS, LENGTH), (5, 15, 9)
    segments = np.zeros((ROWS, LENGTH), np.int32)
    segments[:, :sum(lengths)] = np.repeat(np.arange(len(lengths)) + 1, lengths)
    got = apply(t, segments)
    start = 0
    for n in lengths:
        close(got[:, start:start + n], torch_logits(theirs, t[:, start:start + n]))
        start += n


def test_memory_linear_attention(pair):
    theirs, _, params, _, ours = pair
    t = ids(ROWS, LENGTH)
    close(compiled(Transformer(ours.config, attention="chunked"), params)(t), torch_logits(theirs, t))


def test_round_trip_through_us_is_bit_identical(pair, tmp_path):
    _, _, params, folder, ours = pair
    hf.save(tmp_path / "out", ours, params, hf.companions(folder))
    a, b = (hf.open_tensors(p) for p in (folder, tmp_path / "out"))
    assert set(a) == set(b)
    for name in a:
        np.testing.assert_array_equal(a[name].read(), b[name].read(), err_msg=name)
    assert (tmp_path / "out" / "config.json").read_bytes() == (folder / "config.json").read_bytes()


def test_transformers_reads_the_config_we_write(pair, tmp_path):
    """Without the original config.json: ours alone must give transformers the same model."""
    theirs, _, params, _, ours = pair
    hf.save(tmp_path / "out", ours, params)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", attn_implementation="eager").eval()
    t = ids(ROWS, LENGTH)
    np.testing.assert_array_equal(torch_logits(again, t), torch_logits(theirs, t))


def test_transformers_4_fields(pair):
    """The same model from a config.json with `rope_theta` and `rope_scaling`, as most on the hub are."""
    *_, folder, ours = pair
    cfg = json.loads((folder / "config.json").read_text())
    old = {k: v for k, v in cfg.items() if k not in ("rope_parameters", "dtype")} | {"torch_dtype": "float32"}
    written = to_hf(ours.config)
    old |= {k: written[k] for k in ("rope_theta", "rope_scaling", "rope_local_base_freq") if k in written}
    assert from_hf(old) == from_hf(cfg) == ours.config


@pytest.mark.parametrize("model_type", list(FAMILIES))
def test_bfloat16(tmp_path, model_type):
    """bf16 files and compute: as close to the exact logits as transformers in bf16 (1.5 times its distance)."""
    fields = GEMMA if "gemma" in model_type else EXPERTS if "moe" in model_type else {}
    theirs = build(model_type, fields, tmp_path / "m", "bfloat16")
    model, params = hf.load(tmp_path / "m", dtype=jnp.bfloat16, param_dtype=None)
    hf.save(tmp_path / "out", model, params, hf.companions(tmp_path / "m"))
    a, b = (hf.open_tensors(tmp_path / p) for p in ("m", "out"))
    assert set(a) == set(b)
    assert all(np.array_equal(a[n].read().view(np.uint16), b[n].read().view(np.uint16)) for n in a)
    t = ids(3, 33)
    half = torch_logits(theirs, t)
    exact = torch_logits(theirs.float(), t)
    got = compiled(model, params)(t)
    rms = lambda x: float(np.sqrt(np.mean(np.square(x))))
    assert rms(got - exact) <= 1.5 * rms(half - exact) < 0.1 * rms(exact)


@pytest.mark.parametrize("model_type", ["qwen2", "llama"])
def test_dynamic_scaling_of_a_full_row(tmp_path, model_type):
    """Beyond the first context the base follows the length; transformers takes it from the longest position."""
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    fields = {"rope_parameters": rope, "max_position_embeddings": 16}
    theirs = build(model_type, fields, tmp_path / "m")
    model, params = hf.load(tmp_path / "m")
    for length in (9, 40):
        t = ids(1, length)
        close(compiled(model, params)(t), torch_logits(theirs, t))


@pytest.mark.parametrize("scaling", [
    Yarn(factor=4.0, original=16, beta_fast=8.0, beta_slow=2.0, mscale=0.7, mscale_all_dim=0.4),
    Yarn(factor=8.0, original=16, attention_factor=1.3, truncate=False),
    Llama3(factor=4.0, low_freq_factor=1.0, high_freq_factor=2.0, original=32)], ids=lambda s: type(s).__name__)
def test_a_fresh_student_serves_in_transformers(tmp_path, scaling):
    """A model that never was a Hugging Face one: initialised here, exported, run there."""
    config = ModelConfig(vocab_size=VOCAB, hidden_size=32, mlp_size=48, num_layers=2, num_heads=4, num_kv_heads=1,
                         head_dim=16, context_length=128, init_std=0.2, model_type="llama",
                         attention=AttentionConfig(rope=Rope(theta=1e5, scaling=scaling)))
    model, params = make(config)
    hf.save(tmp_path / "m", model, params)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m", attn_implementation="eager").eval()
    t = ids(2, 50)
    close(compiled(model, params)(t), torch_logits(theirs, t))


def test_training_is_that_of_torch():
    """Five updates of the trainer's step against a torch loop: the same losses (the small side of the benchmark)."""
    from benchmarks.peers import compare

    assert compare("small", "ce", "float32", rows=2, length=32, steps=3)["largest_relative_loss_gap"] < 1e-5


def test_training_a_mixture_is_that_of_torch(tmp_path):
    """Logits, loss with the routers' balance, and every gradient, of rows with padding: 1e-5."""
    theirs = build("qwen3_moe", {**EXPERTS, "router_aux_loss_coef": 0.3}, tmp_path / "m")
    ours, params = hf.load(tmp_path / "m")
    t, mask = ids(2, 12), np.ones((2, 12), np.int64)
    mask[1, 7:] = 0
    out = theirs(torch.tensor(t), attention_mask=torch.tensor(mask), output_router_logits=True,
                 labels=torch.tensor(np.where(mask == 1, t, -100)))
    out.loss.backward()

    def loss(p):
        made = ours.apply({"params": p}, jnp.asarray(t, jnp.int32), segment_ids=jnp.asarray(mask, jnp.int32),
                          method="hidden")
        logits = ours.head(p).logits(made.hidden)
        picked = jnp.take_along_axis(jax.nn.log_softmax(logits[:, :-1]), jnp.asarray(t)[:, 1:, None], -1)[..., 0]
        real = jnp.asarray(mask[:, 1:], jnp.float32)
        return -jnp.sum(picked * real) / jnp.sum(real) + 0.3 * balance_loss(made.routing, ours.config.moe), logits

    (value, logits), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    close(np.asarray(logits)[mask == 1], out.logits.detach().numpy()[mask == 1], 1e-5 * float(out.logits.abs().max()))
    assert abs(float(value) - out.loss.item()) <= 1e-5 * out.loss.item()
    want = {n: p.grad.numpy() for n, p in theirs.named_parameters()}
    for layer in range(3):  # fused there, an expert each here
        at = f"model.layers.{layer}.mlp.experts."
        both, down = want.pop(at + "gate_up_proj"), want.pop(at + "down_proj")
        for e in range(EXPERTS["num_experts"]):
            gate, up = np.split(both[e], 2)
            want |= {f"{at}{e}.{k}_proj.weight": v for k, v in (("gate", gate), ("up", up), ("down", down[e]))}
    got = {e.name: e.fetch() for e in hf.entries(ours.config, grads, "float32", {})}
    assert set(got) == set(want)
    for name, g in want.items():
        assert np.linalg.norm(got[name] - g) <= 1e-5 * max(np.linalg.norm(g), 0.1), name


def test_fused_experts_are_read(tmp_path):
    """The layout of transformers 5's own modules, as `save_pretrained(save_original_format=False)` writes it."""
    theirs = build("qwen3_moe", EXPERTS, tmp_path / "apart")
    theirs.save_pretrained(tmp_path / "fused", save_original_format=False)
    names = [set(hf.open_tensors(tmp_path / p)) for p in ("apart", "fused")]
    assert "model.layers.0.mlp.experts.gate_up_proj" in names[1] - names[0]
    assert "model.layers.0.mlp.experts.5.up_proj.weight" in names[0]
    jax.tree.map(np.testing.assert_array_equal, *(hf.load(tmp_path / p)[1] for p in ("apart", "fused")))


def test_verify_hf_of_a_mixture(tmp_path):
    """Both layouts of the files pass, also against each other; a changed expert does not."""
    model = build("qwen3_moe", EXPERTS, tmp_path / "apart")
    model.save_pretrained(tmp_path / "fused", save_original_format=False)
    lines = []
    verify_hf(str(tmp_path / "fused"), against=str(tmp_path / "apart"), echo=lines.append)
    assert len(lines) == 6 and all(line.startswith("ok") for line in lines), lines
    with torch.no_grad():
        model.model.layers[1].mlp.experts.down_proj[3] *= 1.5
    model.save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="tensors"):
        verify_hf(str(tmp_path / "fused"), against=str(tmp_path / "other"), echo=lines.append)
    assert any("different: model.layers.1.mlp.experts.3.down_proj.weight" in line for line in lines)
