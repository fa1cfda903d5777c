"""What a recipe will need before it is launched: bytes, memory per device by category, FLOPs and time.

Formulas, not measurements. Parameters and the optimiser's state are exact; the rest of the memory is `jobs.memory`,
within a tenth of what the compiler says where the mesh divides the model (`benchmarks/results/planner.md`). Time: FLOPs
at an assumed share of the peak (`Device.mfu`), or what the layout sends where that takes longer (`jobs.traffic`).
`jobs.compiled` asks the compiler.
"""

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax

from distill_jax.core import tree
from distill_jax.data.source_specs import stores
from distill_jax.data.views import Derived
from distill_jax.jobs import memory as bytes_of
from distill_jax.jobs.hardware import Device
from distill_jax.jobs.projectors import open_projector
from distill_jax.jobs.traffic import in_eight_bits, speed_of, step_seconds
from distill_jax.loading import hub_config
from distill_jax.models import families, hf
from distill_jax.models.config import ModelConfig
from distill_jax.models.remat import policy_of
from distill_jax.models.transformer import Transformer
from distill_jax.objective.term import build_objective
from distill_jax.recipe import AnyProjector, Recipe, Stage, Student, resolve
from distill_jax.train.sources import needed_states, provider_of

SIGNAL_BYTES = {"token": 1.0}  # per token; topk: see `_signal_bytes`


@dataclass(frozen=True, kw_only=True)
class StagePlan:
    """Of one training stage. Bytes are per device, FLOPs per update step over all devices (recomputation not counted).
    waiting: share of the time in which devices wait for what they are sent."""

    name: str
    tokens_per_step: int
    steps: int
    params: dict[str, int]
    memory: dict[str, float]
    flops: float
    seconds: float
    context: tuple[int, int]
    store_bytes: float | None = None
    devices: int = 1
    waiting: float = 0.0
    notes: tuple[str, ...] = field(default=())

    @property
    def total_memory(self) -> float:
        return sum(self.memory.values())

    @property
    def tokens_per_second(self) -> float:
        """Of all devices together, packed rows counted whole."""
        return self.tokens_per_step * self.steps / self.seconds

    def money(self, price: float) -> float:
        """price: of one device for an hour."""
        return price * self.devices * self.seconds / 3600


def model_config(recipe: Recipe, provider: Student) -> ModelConfig:
    """The configuration a provider will have, without loading weights. `stage:NAME` follows to that stage's student."""
    if provider.config is not None:
        return provider.config
    assert provider.model is not None
    if provider.model.startswith("stage:"):
        name = provider.model.removeprefix("stage:")
        for stage in recipe.stages:
            if stage.name == name and isinstance(stage, Stage):
                trained = next(p for p in stage.models.values() if p.trainable)
                return model_config(recipe, trained)
    folder = Path(resolve(recipe, provider.model))
    for candidate in (folder / "config.json", folder / "model" / "config.json"):
        if candidate.is_file():
            return families.from_hf(json.loads(candidate.read_text()))
    if not provider.model.startswith(("stage:", ".", "/", "~")) and provider.model.count("/") == 1:
        return families.from_hf(json.loads(hub_config(provider.model).read_text()))
    raise ValueError(f"cannot plan with model {provider.model!r}: no config.json in {folder} or {folder}/model; give "
                     "a model that is there, or run the stage it comes from")


def plan_stage(recipe: Recipe, stage: Stage, device: Device, devices: int) -> StagePlan:
    """Memory, FLOPs and time of a training stage on `devices` devices of one kind."""
    configs = {name: model_config(recipe, p) for name, p in stage.models.items()}
    source = stage.source
    rows, length = source.rows, source.seq_len
    sizes = mesh_sizes(recipe, devices)
    _divides(stage, sizes)
    lengths = {"main": length} | {n: v.seq_len or length for n, v in stage.retokenised.items()}
    runs = _runs(stage, configs, lengths)
    trained = {n: shapes for n, p in stage.models.items() if (shapes := trained_shapes(configs[n], p)) is not None}
    passes = {n: 1 if not p.trainable else 2 if p.lora else 3 for n, p in stage.models.items()}
    flops = sum(n * rows * t * configs[name].flops_per_token(t) for name, n in passes.items() for t in runs[name])
    again = sum(rows * t * _again(configs[name], p, t, device) for name, p in stage.models.items() if p.trainable
                for t in runs[name])
    memory = bytes_of.stage_memory(
        stage, configs, runs, sizes, platform=device.platform,
        signals=4 * sum(_signal_bytes(s) for s in source.signals),
        trained={n: (tree.count(shapes), (stage.models[n].optim or stage.optim).state_bytes(shapes))
                 for n, shapes in trained.items()})
    projectors = {name: _projector_params(p, configs) for name, p in stage.projectors.items()}
    for n in projectors.values():  # whole on every device, in float32
        memory["parameters"] += 4 * n
        memory["optimiser"] += 8 * n
        memory["gradients"] += 4 * n
    student = next(configs[n] for n, p in stage.models.items() if p.trainable)
    eight = {n: in_eight_bits(p, configs[n], rows * sum(runs[n])) for n, p in stage.models.items()}
    spared = sum(eight[n] * (1 - 1 / speed_of(p, device)) for n, p in stage.models.items())
    compute, waiting = step_seconds(stage, configs, runs, sizes, device, flops + again - spared)
    return StagePlan(
        name=stage.name, tokens_per_step=rows * length, steps=stage.steps, memory=memory, flops=flops,
        params={n: c.num_params for n, c in configs.items()} | projectors, devices=devices,
        seconds=stage.steps * (compute + waiting), waiting=waiting / (compute + waiting),
        context=(length, student.context_length), store_bytes=_store_bytes(recipe, stage),
        notes=_notes(configs, runs, stage.on_policy is not None) + _unsharded(configs, sizes)
        + _eight_bits(stage, device, {n: f / (flops + again) for n, f in eight.items()}))


def _again(c: ModelConfig, provider: Student, length: int, device: Device) -> float:
    """FLOPs of a token that run a second time: what the policy says; of a mixture in tiles (`models.tiles`, not on
    TPUs) at least two of its three products."""
    again = policy_of(provider.remat).again * c.flops_per_token(length, head=False)
    if c.moe is None or device.platform == "tpu":
        return again
    return max(again, 2.0 * c.num_layers * 2 * c.hidden_size * c.inner_size)


def _divides(stage: Stage, sizes: Mapping[str, int]) -> None:
    """Raises ValueError where the batch cannot be cut as the mesh and micro_batches say."""
    parts = sizes["data"] * sizes["fsdp"] * sizes["expert"]
    if stage.source.rows % (parts * stage.micro_batches):
        raise ValueError(f"stage {stage.name}: {stage.source.rows} rows cannot be cut into micro_batches="
                         f"{stage.micro_batches} over the {parts} parts that mesh {dict(sizes)} cuts rows into; make "
                         f"source.rows a multiple of {parts * stage.micro_batches}")


def trained_shapes(c: ModelConfig, provider: Student) -> Any:
    """Shapes of what a provider trains: its parameters or its adapters; None: nothing."""
    if not provider.trainable:
        return None
    shapes = hf.param_shapes(Transformer(c))
    return jax.eval_shape(provider.lora.init, shapes, jax.random.key(0)) if provider.lora else shapes


def _runs(stage: Stage, configs: Mapping[str, ModelConfig], lengths: Mapping[str, int]) -> dict[str, list[int]]:
    """{model: tokens of a row in each of the views it is run on}, once where no term reads it."""
    projectors = {n: open_projector(p, configs) for n, p in stage.projectors.items()}
    of = dict(lengths)
    for name, made in stage.made_views.items():
        of[name] = of[made.of if isinstance(made, Derived) else "main"]
    out: dict[str, list[int]] = {name: [] for name in configs}
    for source in needed_states(build_objective(stage.terms).states, projectors):
        if (name := provider_of(source)) in out:
            out[name].append(of[source.split("/")[1]])
    return {name: views or [lengths["main"]] for name, views in out.items()}


def _projector_params(spec: AnyProjector, configs: Mapping[str, ModelConfig]) -> int:
    return tree.count(jax.eval_shape(open_projector(spec, configs).init, jax.random.key(0)))


def mesh_sizes(recipe: Recipe, devices: int) -> dict[str, int]:
    """{axis: devices} with -1 filled in. Raises ValueError where the product is not `devices`."""
    sizes = recipe.mesh.sizes
    known = math.prod(max(v, 1) for v in sizes.values())
    sizes = {k: (max(1, devices // known) if v == -1 else v) for k, v in sizes.items()}
    product = math.prod(sizes.values())
    if product != devices:
        raise ValueError(f"mesh {sizes} has {product} devices, --on has {devices}; change mesh.* or the count")
    return sizes


def _signal_bytes(name: str) -> float:
    digits = "".join(ch for ch in name if ch.isdigit())
    return 2.0 * int(digits) if digits else SIGNAL_BYTES["token"]


def _store_bytes(recipe: Recipe, stage: Stage) -> float | None:
    total = 0.0
    for s in stores(stage.source):
        folder = Path(resolve(recipe, s.path))
        if not folder.is_dir():
            return None
        total += sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())
    return total


def _notes(configs: Mapping[str, ModelConfig], runs: Mapping[str, list[int]], sampling: bool) -> tuple[str, ...]:
    out = [f"{n}: rows of {max(runs[n])} tokens exceed the model's context of {c.context_length}"
           for n, c in configs.items() if max(runs[n]) > c.context_length]
    if sampling:
        out.append("sampling the student's own answers is not in the FLOPs and the time")
    sizes = {c.vocab_size for c in configs.values()}
    if len(sizes) > 1:
        out.append(f"heads of different sizes {sorted(sizes)}: ids beyond the real ones are masked")
    return tuple(out)


def _unsharded(configs: Mapping[str, ModelConfig], sizes: Mapping[str, int]) -> tuple[str, ...]:
    return tuple(f"{n}: mesh.fsdp={sizes['fsdp']} does not divide the hidden size {c.hidden_size}, so "
                 f"every device holds all parameters; use "
                 f"mesh.fsdp={math.gcd(sizes['fsdp'], c.hidden_size)} and more mesh.data"
                 for n, c in configs.items() if c.hidden_size % sizes["fsdp"])


def _eight_bits(stage: Stage, device: Device, shares: Mapping[str, float]) -> tuple[str, ...]:
    speeds = {n: speed_of(p, device) for n, p in stage.models.items() if p.matmul != "full"}
    return tuple(f"{n}: matmul={stage.models[n].matmul}, {shares[n]:.0%} of the FLOPs, "
                 + (f"reckoned at {speed:.3g} times the bf16 peak" if speed > 1 else
                    "no faster on this device than bf16") for n, speed in speeds.items())


def plan_recipe(recipe: Recipe, device: Device, devices: int) -> list[StagePlan]:
    """Plans of all training stages. Raises ValueError where a context does not fit its model."""
    plans = [plan_stage(recipe, s, device, devices) for s in recipe.stages if isinstance(s, Stage)]
    long = [f"stage {p.name}: {n}" for p in plans for n in p.notes if "exceed" in n]
    if long:
        raise ValueError("; ".join(long) + "; shorten source.seq_len or use a model with a longer context")
    return plans


def fits(plan: StagePlan, device: Device) -> bool:
    """Whether the memory suffices, leaving 8% to the runtime and fragmentation."""
    return plan.total_memory < 0.92 * device.memory


def as_numbers(plan: StagePlan, price: float | None = None) -> dict[str, Any]:
    """What `--json` prints."""
    return dataclasses.asdict(plan) | {
        "total_memory": plan.total_memory, "tokens_per_second": plan.tokens_per_second,
        "money": None if price is None else plan.money(price)}


def table(plans: list[StagePlan], device: Device, name: str, devices: int,
          price: float | None = None) -> Any:
    """Rich table of the plans."""
    from rich.table import Table

    kind = name.split(":")[0]
    t = Table(title=f"{devices} x {kind} ({device.memory / 2**30:.0f} GiB, {device.flops / 1e12:.3g} TFLOP/s peak, "
              f"{device.mfu:.0%} MFU assumed)")
    for column in ("", *(p.name for p in plans)):
        t.add_column(column, justify="left" if not column else "right")
    rows: list[tuple[str, list[str]]] = [
        ("parameters", [", ".join(f"{k} {si(v)}" for k, v in p.params.items()) for p in plans]),
        ("tokens a step", [si(p.tokens_per_step) for p in plans]),
        ("context / model's", ["{} / {}".format(*p.context) for p in plans]),
        ("FLOPs a step", [si(p.flops) for p in plans]),
        ("FLOPs in all", [si(p.flops * p.steps) for p in plans]),
        ("tokens/s (modelled)", [si(p.tokens_per_second) for p in plans]),
        ("time", [duration(p.seconds) for p in plans]),
        ("of it waiting for others", [f"{p.waiting:.0%}" for p in plans]),
        ("store", ["not made yet" if p.store_bytes is None else si(p.store_bytes) + "B" for p in plans]),
    ]
    if price is not None:
        rows.append((f"money at {price:g}/device-hour", [f"{p.money(price):,.2f}" for p in plans]))
    rows += [(f"memory: {k}", [si(p.memory[k]) + "B" for p in plans]) for k in plans[0].memory]
    rows.append(("memory: total", [si(p.total_memory) + "B " + ("fits" if fits(p, device) else "DOES NOT FIT")
                                   for p in plans]))
    for label, cells in rows:
        t.add_row(label, *cells)
    t.caption = "\n".join(f"{p.name}: {note}" for p in plans for note in p.notes) or None
    return t


def si(x: float) -> str:
    for unit, size in (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if x >= size:
            return f"{x / size:.3g} {unit}"
    return f"{x:.3g} "


def duration(s: float) -> str:
    for unit, size, limit in (("s", 1, 120), ("min", 60, 7200), ("h", 3600, 2e5)):
        if s < limit:
            return f"{s / size:.3g} {unit}"
    return f"{s / 86400:.3g} d"
