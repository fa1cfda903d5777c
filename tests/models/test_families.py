"""config.json to ModelConfig and back, for both generations of field names."""

import dataclasses
import json
import math

import pytest

from distill_jax.models.config import AttentionConfig, MoE
from distill_jax.models.families import FAMILIES, from_hf, to_hf
from distill_jax.models.rope import Dynamic, Linear, Llama3, Rope, Yarn
from tests.models.common import PLAIN

# As published (Qwen2.5-0.5B, Llama-3.2-1B, gemma-2-2b, gemma-3-1b), fields that change nothing left out.
QWEN = {"model_type": "qwen2", "hidden_act": "silu", "hidden_size": 896, "initializer_range": 0.02,
        "intermediate_size": 4864, "max_position_embeddings": 32768, "max_window_layers": 24,
        "num_attention_heads": 14, "num_hidden_layers": 24, "num_key_value_heads": 2, "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0, "sliding_window": 32768, "tie_word_embeddings": True, "use_sliding_window": False,
        "vocab_size": 151936}
LLAMA = {"model_type": "llama", "attention_bias": False, "head_dim": 64, "hidden_act": "silu", "hidden_size": 2048,
         "intermediate_size": 8192, "max_position_embeddings": 131072, "mlp_bias": False, "num_attention_heads": 32,
         "num_hidden_layers": 16, "num_key_value_heads": 8, "rms_norm_eps": 1e-05, "tie_word_embeddings": True,
         "rope_scaling": {"factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
                          "original_max_position_embeddings": 8192, "rope_type": "llama3"},
         "rope_theta": 500000.0, "vocab_size": 128256}
GEMMA2 = {"model_type": "gemma2", "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0, "head_dim": 256,
          "hidden_activation": "gelu_pytorch_tanh", "hidden_size": 2304, "intermediate_size": 9216,
          "max_position_embeddings": 8192, "num_attention_heads": 8, "num_hidden_layers": 26,
          "num_key_value_heads": 4, "query_pre_attn_scalar": 256, "rms_norm_eps": 1e-06, "rope_theta": 10000.0,
          "sliding_window": 4096, "vocab_size": 256000}
GEMMA3 = {"model_type": "gemma3_text", "attn_logit_softcapping": None, "final_logit_softcapping": None,
          "head_dim": 256, "hidden_activation": "gelu_pytorch_tanh", "hidden_size": 1152, "intermediate_size": 6912,
          "max_position_embeddings": 32768, "num_attention_heads": 4, "num_hidden_layers": 26,
          "num_key_value_heads": 1, "query_pre_attn_scalar": 256, "rms_norm_eps": 1e-06,
          "rope_local_base_freq": 10000, "rope_scaling": None, "rope_theta": 1000000, "sliding_window": 512,
          "sliding_window_pattern": 6, "vocab_size": 262144}


def test_qwen2_as_published():
    c = from_hf(QWEN)
    assert c.tied and c.attention.qkv_bias and not c.attention.out_bias and c.head_dim == 64
    assert c.attention.rope == Rope(theta=1e6) and not any(c.sliding)
    assert c.num_params == 494_032_768  # the published count


def test_llama3_as_published():
    c = from_hf(LLAMA)
    assert c.attention.rope.scaling == Llama3(factor=32.0, low_freq_factor=1.0, high_freq_factor=4.0, original=8192)
    assert c.num_params == 1_235_814_400


def test_gemma_as_published():
    c = from_hf(GEMMA2)
    assert c.num_params == 2_614_341_888 and c.sliding[:3] == (True, False, True) and c.embed_scale == math.sqrt(2304)
    assert (c.attention.soft_cap, c.logit_soft_cap, c.attention.scale) == (50.0, 30.0, 1 / 16)
    c = from_hf(GEMMA3)
    assert c.num_params == 999_885_952 and [i for i, s in enumerate(c.sliding) if not s] == [5, 11, 17, 23]
    assert c.attention.rope.theta == 1e6 and c.attention.local_rope == Rope(theta=1e4)
    assert c.attention.soft_cap is None and c.attention.window == 512


@pytest.mark.parametrize("published", [QWEN, LLAMA, GEMMA2, GEMMA3], ids=lambda c: c["model_type"])
def test_what_we_write_reads_back(published):
    config = from_hf(published)
    written = json.loads(json.dumps(to_hf(config, "bfloat16")))
    assert from_hf(written) == config
    new = {k: v for k, v in written.items() if k not in ("rope_theta", "rope_scaling", "rope_local_base_freq")}
    assert from_hf(new) == config, "transformers 5 fields alone"
    if published["model_type"] != "gemma3_text":
        old = {k: v for k, v in written.items() if k != "rope_parameters"}
        assert from_hf(old) == config, "transformers 4 fields alone"


@pytest.mark.parametrize("scaling", [
    Linear(factor=2.0), Dynamic(factor=2.0, original=4096),
    Yarn(factor=4.0, original=1024, mscale=0.7, truncate=False),
    Llama3(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original=64)])
@pytest.mark.parametrize("model_type", ["qwen2", "llama", "gemma3_text"])
def test_scalings_read_back(scaling, model_type):
    base = {"qwen2": QWEN, "llama": LLAMA, "gemma3_text": GEMMA3}[model_type] | {"max_position_embeddings": 4096}
    c = from_hf(base)
    c = dataclasses.replace(c, attention=dataclasses.replace(c.attention, rope=Rope(theta=1e5, scaling=scaling)))
    assert from_hf(to_hf(c)) == c


def test_windows():
    on = from_hf({**QWEN, "use_sliding_window": True, "max_window_layers": 20, "sliding_window": 64})
    assert on.attention.window == 64 and sum(on.sliding) == 4 and on.sliding[20]
    listed = from_hf({**QWEN, "use_sliding_window": True, "sliding_window": 64,
                      "layer_types": ["sliding_attention", "full_attention"] * 12})
    assert listed.sliding == (True, False) * 12
    assert from_hf(to_hf(on)) == on and from_hf(to_hf(listed)) == listed
    mistral = {**LLAMA, "model_type": "mistral", "rope_scaling": None}
    assert all(from_hf({**mistral, "sliding_window": 32}).sliding)
    assert not any(from_hf({**mistral, "sliding_window": None}).sliding)


@pytest.mark.parametrize("change, words", [
    ({"model_type": "bert"}, "'bert' is not supported; supported: qwen2, qwen3, llama"),
    ({"hidden_act": "relu6"}, "relu6"),
    ({"vocab_size": None}, "lacks .*vocab_size"),
    ({"rope_scaling": {"rope_type": "longrope", "factor": 2}}, "longrope.*supported: default, linear"),
    ({"rope_scaling": {"type": "linear"}}, "needs a factor"),
    ({"quantization_config": {"bits": 4}}, "unquantised"),
    ({"use_sliding_window": True, "layer_types": ["chunked_attention"] * 24}, "chunked_attention"),
])
def test_what_cannot_be_computed_is_refused(change, words):
    with pytest.raises(ValueError, match=words):
        from_hf({**QWEN, **change})


def test_a_config_its_family_cannot_express_is_refused():
    with pytest.raises(ValueError, match="cannot say"):
        to_hf(dataclasses.replace(PLAIN, attention=AttentionConfig(qkv_bias=False)))  # Qwen2 always has biases


def test_every_family_is_registered_under_its_name():
    assert all(name == f.model_type for name, f in FAMILIES.items())


# Qwen3-30B-A3B as published
QWEN3_MOE = {"model_type": "qwen3_moe", "attention_bias": False, "decoder_sparse_step": 1, "head_dim": 128,
             "hidden_act": "silu", "hidden_size": 2048, "initializer_range": 0.02, "intermediate_size": 6144,
             "max_position_embeddings": 40960, "max_window_layers": 48, "mlp_only_layers": [],
             "moe_intermediate_size": 768, "norm_topk_prob": True, "num_attention_heads": 32, "num_experts": 128,
             "num_experts_per_tok": 8, "num_hidden_layers": 48, "num_key_value_heads": 4, "rms_norm_eps": 1e-06,
             "rope_scaling": None, "rope_theta": 1000000.0, "router_aux_loss_coef": 0.001, "sliding_window": None,
             "tie_word_embeddings": False, "use_sliding_window": False, "vocab_size": 151936}


def test_qwen3_moe_as_published():
    c = from_hf(QWEN3_MOE)
    assert c.moe == MoE(experts=128, top_k=8, size=768, norm=True, balance=0.001)
    assert c.num_params == 30_532_122_624  # "30.5B in total and 3.3B activated"
    assert round(c.num_active_params / 1e9, 2) == 3.35
    embeddings, norms = 151936 * 2048, 48 * (2 * 2048 + 2 * 128) + 2048
    assert c.flops_per_token(1) == 2 * (c.num_active_params - embeddings - norms) + 4 * 48 * 32 * 128
    written = json.loads(json.dumps(to_hf(c, "bfloat16")))
    assert from_hf(written) == c
    assert {k: written[k] for k in QWEN3_MOE if k in written} == {k: v for k, v in QWEN3_MOE.items() if k in written}


@pytest.mark.parametrize("change, words", [
    ({"mlp_only_layers": [0]}, r"mlp_only_layers = \[0\].*layers must be alike"),
    ({"decoder_sparse_step": 2}, "decoder_sparse_step = 2.*layers must be alike"),
    ({"num_experts": 0}, "needs num_experts, got 0"),
    ({"num_experts_per_tok": None}, "lacks .*num_experts_per_tok"),
    ({"num_experts_per_tok": 129}, "top_k 129, experts 128"),
])
def test_mixtures_that_cannot_be_computed_are_refused(change, words):
    with pytest.raises(ValueError, match=words):
        from_hf({**QWEN3_MOE, **change})
