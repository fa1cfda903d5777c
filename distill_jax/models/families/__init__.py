"""The one registry of the package: families by the `model_type` that a checkpoint carries.

A new family is one file here with a `FAMILY`, one line below, and a parity test.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from distill_jax.models.config import ModelConfig
from distill_jax.models.families import gemma2, gemma3_text, llama, mistral, qwen2, qwen3, qwen3_moe
from distill_jax.models.families.base import Family

FAMILIES: dict[str, Family] = {
    f.model_type: f
    for f in (qwen2.FAMILY, qwen3.FAMILY, llama.FAMILY, mistral.FAMILY, gemma2.FAMILY, gemma3_text.FAMILY,
              qwen3_moe.FAMILY)
}


def family(model_type: str | None) -> Family:
    if model_type not in FAMILIES:
        raise ValueError(f"model_type {model_type!r} is not supported; supported: {', '.join(FAMILIES)}")
    return FAMILIES[model_type]


def from_hf(config_json: Mapping[str, Any]) -> ModelConfig:
    """The decoder that a config.json describes. Raises ValueError for what cannot be computed faithfully."""
    return family(config_json.get("model_type")).read(config_json)


def to_hf(config: ModelConfig, dtype: str = "float32") -> dict[str, Any]:
    """A config.json for `config` that transformers 4 and 5 load; dtype: that of the weights next to it.

    Raises ValueError where the family cannot express the configuration.
    """
    kind = family(config.model_type)
    out = {"architectures": [kind.architecture], "dtype": dtype, "torch_dtype": dtype, **kind.write(config)}
    back = kind.read(out)
    if back != replace(config, real_vocab=None):
        raise ValueError(f"a {config.model_type} config.json cannot say {config}; it would be read as {back}")
    return out
