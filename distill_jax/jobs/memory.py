"""Device memory of a training step by formula: what is there at the step's peak, in bytes of one device.

What XLA was seen to keep (`benchmarks/planner.py` holds the formulas against the compiler): a step peaks either
in the loss, with its logits and the head's gradient, or in the backward pass of one layer, with all gradients and that
layer's working set. The larger of the two counts. Legend: D hidden size, F inner size of the MLP, Q and K widths of all
query and of all key heads, V vocabulary, L layers.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import prod

from distill_jax.losses.rows.vocabulary import may_be_cut, needs_whole
from distill_jax.losses.targets import Full, Known, Labels, SampledTarget, TopKTarget
from distill_jax.models.config import ModelConfig
from distill_jax.models.remat import Widths, policy_of
from distill_jax.objective.memory import BUDGET, CHUNK, Loop, chunk_size, lift_bytes
from distill_jax.objective.term import Term
from distill_jax.recipe import Stage, Student

PARTS = ("parameters", "optimiser", "gradients", "activations", "loss", "batch")
"""What device memory goes to, in the order it is printed."""


def stage_memory(stage: Stage, configs: Mapping[str, ModelConfig], runs: Mapping[str, Sequence[int]],
                 sizes: Mapping[str, int], *, trained: Mapping[str, tuple[int, float]], signals: float,
                 platform: str = "cuda") -> dict[str, float]:
    """{part: bytes} at the step's peak.

    runs       {model: tokens of a row in each view it is run on}
    sizes      {mesh axis: devices}
    trained    {provider: (numbers it trains, its parameters or its adapters; bytes of their optimiser's state)}
    signals    bytes of a token's teacher signals
    """
    cut = Cut.of(stage, sizes, platform)
    always: dict[str, float] = {part: 0.0 for part in PARTS}  # noqa: C420
    in_loss, in_layer = dict(always), dict(always)
    for name, provider in stage.models.items():
        count, state = trained.get(name, (0, 0.0))
        one = _Model.of(configs[name], provider, runs[name], cut, count)
        always["parameters"] += one.parameters
        always["optimiser"] += state * one.trained / count if count else 0.0
        for phase, parts in ((in_loss, one.in_loss(cut)), (in_layer, one.in_layer(cut))):
            for part, size in parts.items():
                phase[part] += size
    lengths = stage.source.seq_len + sum(v.seq_len or stage.source.seq_len for v in stage.retokenised.values())
    always["batch"] = stage.source.rows / cut.rows / cut.context * (7 * 4 * lengths + signals * stage.source.seq_len)
    peak = max((in_loss, in_layer), key=lambda p: sum(p.values()))
    return {part: always[part] + peak[part] for part in PARTS}


def target_kind(target: str) -> type:
    """The class of what a term's loss compares with, by the term's `target` (`objective.rows.kind_of`)."""
    if target in ("tokens", "fields"):
        return Labels if target == "tokens" else Known
    kinds = {"topk": TopKTarget, "token": TopKTarget, "sampled": SampledTarget}
    name = target.removeprefix("signals/")
    return Full if name == target else kinds.get(name.rstrip("0123456789").rstrip("_"), Full)


@dataclass(frozen=True, kw_only=True)
class Cut:
    """How a step is cut up. rows: parts of the batch's rows; platform: as `hardware.Device` says; loop: of the loss
    where it may choose; vocabulary: parts of it, over `tensor`."""

    rows: int
    expert: int
    context: int
    tensor: int
    fsdp: int
    micro_batches: int
    batch: int
    platform: str
    loop: Loop
    vocabulary: int

    @classmethod
    def of(cls, stage: Stage, sizes: Mapping[str, int], platform: str) -> "Cut":
        terms = [(t, target_kind(t.target)) for t in stage.terms.values() if isinstance(t, Term)]
        cuts = all(may_be_cut(t.loss, kind) for t, kind in terms)
        whole = any(needs_whole(t.loss, kind, t.kwargs) for t, kind in terms) or not terms
        return cls(loop="tokens" if whole else stage.loss_loop, vocabulary=sizes["tensor"] if cuts else 1,
                   rows=sizes["data"] * sizes["fsdp"] * sizes["expert"], context=sizes["context"], platform=platform,
                   expert=sizes["expert"],
                   tensor=sizes["tensor"], fsdp=sizes["fsdp"], micro_batches=stage.micro_batches,
                   batch=stage.source.rows)

    def tokens(self, length: int) -> float:
        """Tokens of a micro-batch on one device."""
        return self.batch * length / self.rows / self.context / self.micro_batches

    def parts(self, c: ModelConfig) -> int:
        """Parts that fsdp cuts the parameters into: 1 where it does not divide the hidden size (`sharding.rules`)."""
        return self.fsdp if c.hidden_size % self.fsdp == 0 else 1

    @property
    def devices(self) -> int:
        return self.rows * self.context * self.tensor


@dataclass(frozen=True, kw_only=True)
class _Model:
    config: ModelConfig
    provider: Student
    item: int  # bytes of the compute dtype
    tokens: float  # of all views it is run on
    longest: float  # of the longest of them
    count: float  # parameters here
    trained: float  # numbers here that have gradients

    @classmethod
    def of(cls, c: ModelConfig, provider: Student, views: Sequence[int], cut: Cut, trained: int) -> "_Model":
        count = c.params_per_device(cut.parts(c) * cut.tensor, cut.expert)
        return cls(config=c, provider=provider, item=2 if provider.precision == "bfloat16" else 4,
                   tokens=sum(map(cut.tokens, views)), longest=cut.tokens(max(views)),
                   count=count, trained=trained / (cut.parts(c) * cut.tensor) if provider.lora else
                   count * provider.trainable)

    @property
    def parameters(self) -> float:
        if self.provider.lora:  # the base stays as it is, beside its adapters
            return self.count * self.item + 4 * self.trained
        return self.count * (4 if self.provider.trainable else self.item)

    def in_loss(self, cut: Cut) -> dict[str, float]:
        """While the loss runs."""
        c, tpu = self.config, cut.platform == "tpu"
        head = float(prod((c.vocab_size, c.hidden_size)))
        way, loss = self._lifted(cut)
        if self.provider.lora:
            loss -= 4 * head  # no gradient of the head
        elif cut.devices > 1 and self.provider.trainable and way == "tokens":
            # On GPUs the head's gradient once more, for sending it, when the logits are gone. On TPUs the head and its
            # gradient, and over five times a chunk's logits (fitted to two steps).
            logits = chunk_size(int(self.longest), CHUNK) * c.vocab_size * (4 + self.item)
            loss = 5.4 * logits + (4 + self.item) * head if tpu else (
                max(loss, 8 * head + self.longest * c.hidden_size * self.item))
        grads = 4 * self.trained * ((cut.micro_batches > 1) + tpu)
        return {"activations": self._kept(cut), "loss": loss, "gradients": grads}

    def _lifted(self, cut: Cut) -> tuple[Loop, float]:
        """The loop that `objective.chunks` takes, and the bytes it holds."""
        c = self.config
        parts = cut.vocabulary if c.vocab_size % cut.vocabulary == 0 else 1
        held = partial(lift_bytes, tokens=int(self.longest * parts / cut.tensor), vocab=c.vocab_size,
                       width=c.hidden_size, itemsize=self.item, trainable=self.provider.trainable, parts=parts,
                       shards=cut.parts(c))
        less = held(loop="vocabulary") < held(loop="tokens") > BUDGET
        way: Loop = cut.loop if cut.loop != "auto" else "vocabulary" if less else "tokens"
        return way, float(held(loop=way, copies=2 if cut.platform == "tpu" else 1))

    def in_layer(self, cut: Cut) -> dict[str, float]:
        """While the backward pass of a layer runs; of a frozen model, its forward pass."""
        w = Widths.of(self.config, cut.tensor, cut.platform)
        if not self.provider.trainable:
            states = cut.expert * w.d * (4 + 2 * self.item) if self.config.moe and cut.platform != "tpu" else 0.0
            return {"activations": self.longest * (states + self.item * (4 * w.d + 2 * w.q + 2 * w.k + 3 * w.f))}
        policy = policy_of(self.provider.remat)
        working = self.item * self.longest * (
            policy.working(w if self.config.moe is None else replace(w, f=0.0)) + self._scores(cut))
        working += self._mixture(cut)
        layer = w.d * (2 * w.q + 2 * w.k + 3 * w.f)
        grads = 4 * self.trained * (2 if cut.micro_batches > 1 else 1)
        if cut.parts(self.config) > 1:  # the layer put together, and its gradient before it is cut
            grads += 2 * self.item * layer
            kernels = self.config.num_layers / cut.parts(self.config)
            if cut.platform != "tpu":  # kernels whose cut dimension is not the first are turned round once for sending
                grads += 4 * (kernels * w.d * (w.q + 2 * w.k + 2 * w.f) + self._experts(cut) / cut.parts(self.config))
            else:  # all kernels cast before each loop; products beside a gather hold what both read and write
                grads += 2 * self.item * kernels * layer + 4 * self.item * layer
                working += 4 * self.item * self.longest * w.f
        return {"activations": self._kept(cut) + working, "gradients": grads}

    def _mixture(self, cut: Cut) -> float:
        """Bytes of a layer's mixture in its backward pass, for the tokens of all rows of the expert axis. On TPUs
        copies of them for their experts; elsewhere (`models.tiles`) states, what comes back, their gradient's float32
        sums, and where experts are trained their matrices with their gradients, summed in float32."""
        c, moe = self.config, self.config.moe
        if moe is None:
            return 0.0
        tokens = cut.expert * self.longest
        if cut.platform == "tpu":
            return self.item * tokens * moe.top_k * 5 * c.hidden_size
        kernels = 0 if self.provider.lora else self._experts(cut) / c.num_layers
        return tokens * c.hidden_size * (4 + 3 * self.item) + kernels * (4 + 2 * self.item)

    def _experts(self, cut: Cut) -> float:
        """Parameters of the experts that a device has a part of, in all layers."""
        return self.config.expert_params / cut.expert / cut.tensor

    def _scores(self, cut: Cut) -> float:
        """Short rows are attended to all at once: their scores, in numbers a token."""
        length = self.longest / max(1.0, cut.batch / cut.rows / cut.micro_batches)
        return 4.0 * self.config.num_heads / cut.tensor * length if length <= 1024 else 0.0

    def _kept(self, cut: Cut) -> float:
        if not self.provider.trainable:
            return 0.0
        c, w = self.config, Widths.of(self.config, cut.tensor, cut.platform)
        kept = c.num_layers * policy_of(self.provider.remat).kept(w)
        if self.provider.remat == "none":
            kept += c.num_layers * (self._scores(cut) + (w.q + w.k) * c.attention.qk_norm)
        return self.item * (self.tokens * kept + self._kept_mixture(cut))

    def _kept_mixture(self, cut: Cut) -> float:
        """Numbers kept of mixtures, where nothing is recomputed but in their tiles: the states of all rows of the
        expert axis, and the experts' matrices where they were cast or gathered."""
        c = self.config
        if c.moe is None or cut.platform == "tpu" or self.provider.remat != "none":
            return 0.0
        states = c.num_layers * self.tokens * c.hidden_size * (cut.expert if cut.expert > 1 else 0)
        return states + self._experts(cut) * (self.item < 4 or cut.parts(c) > 1)
