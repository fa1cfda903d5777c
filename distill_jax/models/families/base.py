"""What every family shares: reading and writing the common fields of config.json, and the tensor names of a decoder.

A family is a `Family`: how its config.json becomes a `ModelConfig` and back, and which tensors it stores.
transformers 4 writes `rope_theta`, `rope_scaling`, `torch_dtype`; transformers 5 writes `rope_parameters`, `dtype`.
Both are read; both are written, so that either version (and engines pinned to one) loads what we export.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from distill_jax.models.config import ModelConfig
from distill_jax.models.rope import Dynamic, Linear, Llama3, Rope, Yarn
from distill_jax.models.tensorfile import TensorInfo

Json = Mapping[str, Any]

ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh",
               "gelu_new": "gelu_tanh"}
HF_ACTIVATIONS = {"silu": "silu", "gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh"}
ROPE_TYPES = ("default", "linear", "dynamic", "llama3", "yarn")


@dataclass(frozen=True, kw_only=True)
class Tensor:
    """A parameter and what the files call it.

    path       parameter in our tree
    name       tensor in the file, with `{}` for the number of the layer where the parameter is stacked, and a second
               one for the number of the expert
    transpose  the file holds [out, in] where we hold [in, out]
    """

    path: str
    name: str
    transpose: bool = False

    @property
    def stacked(self) -> int:
        """Leading dimensions of the parameter that the files hold apart."""
        return self.name.count("{}")


@dataclass(frozen=True, kw_only=True)
class Family:
    """One `model_type`.

    architecture  class name in config.json
    read          config.json -> ModelConfig
    write         ModelConfig -> the fields of config.json that `read` does not find in `write_common`
    norms         our norm path -> its name in a layer of the file
    """

    model_type: str
    architecture: str
    read: Callable[[Json], ModelConfig]
    write: Callable[[ModelConfig], dict[str, Any]]
    norms: Mapping[str, str]

    def tensors(self, config: ModelConfig) -> list[Tensor]:
        """All tensors of a checkpoint of `config`, in the order they are written."""
        a, layer = config.attention, "model.layers.{}."
        out = [Tensor(path="embed/embedding", name="model.embed_tokens.weight")]
        for part, bias in (("q", a.qkv_bias), ("k", a.qkv_bias), ("v", a.qkv_bias), ("o", a.out_bias)):
            out += _dense(f"layers/attention/{part}", f"{layer}self_attn.{part}_proj", bias)
        if a.qk_norm:
            out += [Tensor(path=f"layers/attention/{p}_norm/scale", name=f"{layer}self_attn.{p}_norm.weight")
                    for p in ("q", "k")]
        out += self.mlp(config)
        out += [Tensor(path=f"layers/{ours}/scale", name=f"{layer}{theirs}.weight")
                for ours, theirs in self.norms.items()]
        out.append(Tensor(path="final_norm/scale", name="model.norm.weight"))
        if not config.tied:
            out.append(Tensor(path="lm_head/kernel", name="lm_head.weight"))
        return out

    def mlp(self, config: ModelConfig) -> list[Tensor]:
        """The tensors of what follows attention in a layer."""
        return [t for part in ("gate", "up", "down")
                for t in _dense(f"layers/mlp/{part}", f"model.layers.{{}}.mlp.{part}_proj", config.mlp_bias)]

    def stored(self, tensors: Mapping[str, TensorInfo]) -> Mapping[str, TensorInfo]:
        """What the files hold, by the names of `tensors`: where a family is stored in several ways, they meet here."""
        return tensors


def _dense(path: str, name: str, bias: bool) -> list[Tensor]:
    kernel = Tensor(path=f"{path}/kernel", name=f"{name}.weight", transpose=True)
    return [kernel, Tensor(path=f"{path}/bias", name=f"{name}.bias")] if bias else [kernel]


LLAMA_NORMS = {"attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}
GEMMA_NORMS = {"attention_norm": "input_layernorm", "attention_post_norm": "post_attention_layernorm",
               "mlp_norm": "pre_feedforward_layernorm", "mlp_post_norm": "post_feedforward_layernorm"}


def require(cfg: Json, *names: str) -> None:
    missing = [n for n in names if cfg.get(n) is None]
    if missing:
        raise ValueError(f"config.json of model_type {cfg.get('model_type')!r} lacks {missing}; it has {sorted(cfg)}")


def refuse(cfg: Json, **unsupported: str) -> None:
    """Fields that, when set, mean a computation we do not do: better an error than other logits."""
    for name, why in {"quantization_config": "quantised weights are not read; use the unquantised checkpoint",
                      **unsupported}.items():
        if cfg.get(name):
            raise ValueError(f"config.json sets {name} = {cfg[name]!r}: {why}")


def read_common(cfg: Json, *, tied: bool, activation: str = "hidden_act") -> dict[str, Any]:
    """Fields of ModelConfig that every family writes alike. tied: meaning of an absent `tie_word_embeddings`."""
    require(cfg, "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
            "max_position_embeddings")
    refuse(cfg)
    heads, act = cfg["num_attention_heads"], cfg.get(activation) or "silu"
    if act not in ACTIVATIONS:
        raise ValueError(f"config.json: {activation} = {act!r} is not known; known: {sorted(ACTIVATIONS)}")
    return {
        "model_type": cfg["model_type"], "vocab_size": cfg["vocab_size"], "hidden_size": cfg["hidden_size"],
        "mlp_size": cfg["intermediate_size"], "num_layers": cfg["num_hidden_layers"], "num_heads": heads,
        "num_kv_heads": cfg.get("num_key_value_heads") or heads,
        "head_dim": cfg.get("head_dim") or cfg["hidden_size"] // heads,
        "context_length": cfg["max_position_embeddings"], "norm_eps": cfg.get("rms_norm_eps", 1e-6),
        "activation": ACTIVATIONS[act], "init_std": cfg.get("initializer_range", 0.02),
        "tied": bool(cfg.get("tie_word_embeddings", tied)),
    }


def write_common(config: ModelConfig, *, activation: str = "hidden_act") -> dict[str, Any]:
    return {
        "model_type": config.model_type, "vocab_size": config.vocab_size, "hidden_size": config.hidden_size,
        "intermediate_size": config.mlp_size, "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads, "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim, "max_position_embeddings": config.context_length,
        "rms_norm_eps": config.norm_eps, activation: HF_ACTIVATIONS[config.activation],
        "initializer_range": config.init_std, "tie_word_embeddings": config.tied, "use_cache": True,
    }


def read_layer_types(cfg: Json, default: Sequence[bool]) -> tuple[bool, ...]:
    """For each layer, whether it slides: from `layer_types` where given, else `default`. Empty if none does."""
    names = cfg.get("layer_types")
    known = {"sliding_attention": True, "full_attention": False}
    strange = sorted(set(names or ()) - set(known))
    if strange:
        raise ValueError(f"config.json: layer_types {strange} are not known; known: {sorted(known)}")
    sliding = tuple(default) if names is None else tuple(known[n] for n in names)
    return sliding if any(sliding) else ()


def write_layer_types(config: ModelConfig) -> list[str]:
    return ["sliding_attention" if s else "full_attention" for s in config.sliding]


def read_rope(cfg: Json, *, layer_type: str | None = None, theta: float = 10000.0) -> Rope:
    """The rotary embedding in either generation's fields. layer_type: which of nested `rope_parameters` to take."""
    given = cfg.get("rope_parameters")
    if given and layer_type and layer_type in given:
        given = given[layer_type]
    if not given:
        given = cfg.get("rope_scaling") or {}
    theta = given.get("rope_theta") or cfg.get("rope_theta") or theta
    fraction = given.get("partial_rotary_factor") or cfg.get("partial_rotary_factor") or 1.0
    return Rope(theta=float(theta), fraction=float(fraction), scaling=_read_scaling(given, cfg))


def _read_scaling(given: Json, cfg: Json) -> Any:
    kind = given.get("rope_type") or given.get("type") or "default"
    if kind not in ROPE_TYPES:
        raise ValueError(f"config.json: rope type {kind!r} is not supported; supported: {', '.join(ROPE_TYPES)}")
    if kind == "default":
        return None
    longest = cfg["max_position_embeddings"]
    original = given.get("original_max_position_embeddings") or longest
    factor = float(given.get("factor") or 0.0)
    if not factor and kind != "yarn":
        raise ValueError(f"config.json: rope type {kind!r} needs a factor; got {dict(given)}")
    if kind == "linear":
        return Linear(factor=factor)
    if kind == "dynamic":
        return Dynamic(factor=factor, original=longest)
    if kind == "llama3":
        return Llama3(factor=factor, low_freq_factor=float(given["low_freq_factor"]),
                      high_freq_factor=float(given["high_freq_factor"]), original=original)
    return Yarn(factor=factor or longest / original, original=original,
                beta_fast=float(given.get("beta_fast") or 32), beta_slow=float(given.get("beta_slow") or 1),
                attention_factor=given.get("attention_factor"), mscale=given.get("mscale"),
                mscale_all_dim=given.get("mscale_all_dim"), truncate=given.get("truncate", True))


def write_rope(rope: Rope) -> dict[str, Any]:
    """`rope_parameters` of transformers 5; `scaling_of` makes transformers 4's `rope_scaling` of it."""
    out: dict[str, Any] = {"rope_type": "default", "rope_theta": rope.theta}
    if rope.fraction != 1.0:
        out["partial_rotary_factor"] = rope.fraction
    s = rope.scaling
    if isinstance(s, Linear | Dynamic):
        out |= {"rope_type": "linear" if isinstance(s, Linear) else "dynamic", "factor": s.factor}
    elif isinstance(s, Llama3):
        out |= {"rope_type": "llama3", "factor": s.factor, "low_freq_factor": s.low_freq_factor,
                "high_freq_factor": s.high_freq_factor, "original_max_position_embeddings": s.original}
    elif isinstance(s, Yarn):
        optional = {"attention_factor": s.attention_factor, "mscale": s.mscale, "mscale_all_dim": s.mscale_all_dim}
        out |= {"rope_type": "yarn", "factor": s.factor, "original_max_position_embeddings": s.original,
                "beta_fast": s.beta_fast, "beta_slow": s.beta_slow, "truncate": s.truncate,
                **{k: v for k, v in optional.items() if v is not None}}
    return out


def both_ropes(rope: Rope) -> dict[str, Any]:
    """The fields of both generations, for families with one rotary embedding."""
    new = write_rope(rope)
    old: dict[str, Any] = {"rope_theta": rope.theta}
    if rope.fraction != 1.0:
        old["partial_rotary_factor"] = rope.fraction
    return {"rope_parameters": new, **old, "rope_scaling": scaling_of(new)}


def scaling_of(rope_parameters: Json) -> dict[str, Any] | None:
    if rope_parameters["rope_type"] == "default":
        return None
    return {k: v for k, v in rope_parameters.items() if k not in ("rope_theta", "partial_rotary_factor")}
