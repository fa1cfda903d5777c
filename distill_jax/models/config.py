"""`ModelConfig`: everything that distinguishes one decoder from another. Families fill it from config.json."""

from dataclasses import dataclass, field

from distill_jax.models.rope import Rope

ACTIVATIONS = ("silu", "gelu", "gelu_tanh")


@dataclass(frozen=True, kw_only=True)
class AttentionConfig:
    """How queries, keys and values are made and compared.

    scale        factor on q.k; None: head_dim ** -0.5
    soft_cap     scores become cap * tanh(scores / cap) (Gemma 2)
    window       a token of a sliding layer sees itself and the window - 1 tokens before it
    sliding      for each layer, whether it slides; empty: none does
    rope         rotary embedding of all layers, or of the full ones when `local_rope` is given
    local_rope   rotary embedding of sliding layers, where it differs (Gemma 3)
    """

    qkv_bias: bool = False
    out_bias: bool = False
    qk_norm: bool = False
    scale: float | None = None
    soft_cap: float | None = None
    window: int | None = None
    sliding: tuple[bool, ...] = ()
    rope: Rope = field(default_factory=Rope)
    local_rope: Rope | None = None


@dataclass(frozen=True, kw_only=True)
class MoE:
    """A sparse mixture in place of every layer's MLP.

    experts   their number E
    top_k     experts a token goes to
    size      inner size F of an expert
    norm      the shares of a token's experts are divided by their sum
    balance   factor on the router's load-balancing loss in training (`train.balance`)
    """

    experts: int
    top_k: int
    size: int
    norm: bool = True
    balance: float = 0.001

    def __post_init__(self) -> None:
        if min(self.experts, self.size) < 1 or not 1 <= self.top_k <= self.experts:
            raise ValueError(f"MoE needs size >= 1 and 1 <= top_k <= experts, got size {self.size}, top_k "
                             f"{self.top_k}, experts {self.experts}; correct config.json")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Sizes and switches of a decoder.

    model_type      family, as config.json names it; decides names and layout on export
    context_length  longest position the model was made for
    moe             experts in place of the MLP of every layer; mlp_size then sizes nothing
    norm_offset     RMSNorm multiplies by offset + weight (Gemma stores weight - 1)
    post_norms      also normalise the output of attention and of the MLP before it is added (Gemma)
    tied            logits come from the embedding matrix
    embed_scale     embeddings are multiplied by it, rounded to the compute dtype (Gemma: sqrt(D))
    logit_soft_cap  logits become cap * tanh(logits / cap)
    real_vocab      number of real token ids; the head gives ids beyond it no mass. None: all of vocab_size
    """

    vocab_size: int
    hidden_size: int
    mlp_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    context_length: int = 4096
    model_type: str = "qwen2"
    attention: AttentionConfig = field(default_factory=AttentionConfig)
    moe: MoE | None = None
    activation: str = "silu"
    mlp_bias: bool = False
    norm_eps: float = 1e-6
    norm_offset: float = 0.0
    post_norms: bool = False
    tied: bool = True
    embed_scale: float = 1.0
    logit_soft_cap: float | None = None
    init_std: float = 0.02
    real_vocab: int | None = None

    def __post_init__(self) -> None:
        sizes = ("vocab_size", "hidden_size", "mlp_size", "num_layers", "num_heads", "num_kv_heads", "head_dim",
                 "context_length")
        for name in sizes:
            if getattr(self, name) < 1:
                raise ValueError(f"ModelConfig.{name} must be at least 1, got {getattr(self, name)}")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads {self.num_heads} is not a multiple of num_kv_heads {self.num_kv_heads}")
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation {self.activation!r} is unknown; known: {ACTIVATIONS}")
        if self.moe and self.mlp_bias:
            raise ValueError("mlp_bias with moe is not supported: experts have no biases; set mlp_bias=False")
        a = self.attention
        if a.sliding and len(a.sliding) != self.num_layers:
            raise ValueError(f"attention.sliding has {len(a.sliding)} entries for {self.num_layers} layers")
        if any(a.sliding) and not a.window:
            raise ValueError(f"layers slide, but attention.window is {a.window}; give the window's length in tokens")
        for rope in (a.rope, a.local_rope):
            if rope is not None and rope.rotary_dim(self.head_dim) % 2:
                raise ValueError(f"head_dim {self.head_dim} x rotary fraction {rope.fraction} is not an even number")
        if self.real_vocab is not None and not 0 < self.real_vocab <= self.vocab_size:
            raise ValueError(f"real_vocab {self.real_vocab} must lie in 1..vocab_size = {self.vocab_size}")

    @property
    def sliding(self) -> tuple[bool, ...]:
        """For each layer, whether its attention slides."""
        return self.attention.sliding or (False,) * self.num_layers

    @property
    def num_params(self) -> int:
        """Number of parameters; a tied embedding counts once."""
        return self._params(self.moe.experts if self.moe else 0)

    @property
    def num_active_params(self) -> int:
        """Parameters that one token passes through: of a mixture's experts only `top_k`."""
        return self._params(self.moe.top_k if self.moe else 0)

    @property
    def expert_params(self) -> int:
        """Parameters in experts: what the `expert` axis divides; 0 of a dense model."""
        return self.num_layers * self.moe.experts * 3 * self.hidden_size * self.moe.size if self.moe else 0

    @property
    def inner_size(self) -> int:
        """Inner values of the MLP per token: those of all its experts."""
        return self.moe.top_k * self.moe.size if self.moe else self.mlp_size

    def params_per_device(self, parts: int, expert: int = 1) -> float:
        """Parameters a device holds: all cut into `parts`, experts also over an `expert` axis that divides them."""
        owned = 1 - 1 / expert if self.moe and self.moe.experts % expert == 0 else 0.0
        return (self.num_params - owned * self.expert_params) / parts

    def mlp_weights(self, experts: int | None = None) -> int:
        """Matrix entries of one layer's MLP: those a token passes through, or with so many experts."""
        if self.moe is None:
            return 3 * self.hidden_size * self.mlp_size
        used = self.moe.top_k if experts is None else experts
        return self.hidden_size * (3 * self.moe.size * used + self.moe.experts)

    @property
    def layer_weights(self) -> int:
        """Matrix entries of one layer that a token passes through."""
        q, kv = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        return self.hidden_size * (2 * q + 2 * kv) + self.mlp_weights()

    def _params(self, experts: int) -> int:
        d, a = self.hidden_size, self.attention
        q, kv = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        layer = d * (2 * q + 2 * kv) + self.mlp_weights(experts) + d * (4 if self.post_norms else 2)
        layer += (q + 2 * kv) * a.qkv_bias + d * a.out_bias + 2 * self.head_dim * a.qk_norm
        layer += (2 * self.mlp_size + d) * self.mlp_bias
        return self.num_layers * layer + d + self.vocab_size * d * (1 if self.tied else 2)

    def flops_per_token(self, length: int, *, head: bool = True) -> float:
        """Forward FLOPs of one token in a document of `length` tokens: multiply-adds count 2, causal pairs only.

        Of a mixture only the experts a token goes to. A training step is three times that. Packed rows: sum
        over documents with their own lengths.
        """
        q, dense = self.num_heads * self.head_dim, self.layer_weights * self.num_layers
        seen = 0.0  # keys a token sees, on average, summed over layers
        for slides in self.sliding:
            w = min(self.attention.window or length, length) if slides else length
            seen += (w * (w + 1) / 2 + (length - w) * w) / length
        return 2.0 * (dense + 2 * q * seen + self.hidden_size * self.vocab_size * head)
