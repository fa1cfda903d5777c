"""The training step of a recipe, compiled without weights, data or devices: what the compiler says it needs.

`compile_step` lowers the step that `train_stage` would run (`train.step.make_step` with the stage's terms, signals,
precision, remat and mesh) on abstract arrays for an abstract topology:

cuda   `h200` by a text of the GPU's properties (`targets/h200.txtpb`); needs jax-cuda13-plugin and -pjrt, no GPU
tpu    `v5e`, `v5p`, `v6e` slices; needs libtpu (`jax[tpu]`), no TPU
cpu    virtual devices of this process

Memory and FLOPs are the compiler's; nothing here is a time. Sizes are bytes of one device.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from distill_jax.core.batch import Batch, HiddenStates, Sampled, Signal, Stream, TokenLogprob, TopK
from distill_jax.core.head import Head
from distill_jax.core.platform import Platform, compiling_for
from distill_jax.jobs.hardware import Target
from distill_jax.jobs.plan import trained_shapes
from distill_jax.models import hf
from distill_jax.models.config import ModelConfig
from distill_jax.models.lora import BASE, Base
from distill_jax.models.transformer import Transformer
from distill_jax.objective.chunks import kernel_spec
from distill_jax.recipe import Recipe, Stage
from distill_jax.sharding import batch_spec, fit_spec, make_mesh, param_shardings
from distill_jax.sharding.hlo import Collective, collectives
from distill_jax.sharding.mesh import placed
from distill_jax.train.state import TrainState, opt_state_shardings
from distill_jax.train.step import StepConfig, lowerable, make_step

Tree = Any
FIELDS = ("behaviour_logprobs", "old_logprobs", "advantages", "returns", "old_values", "policy_mask", "chosen",
          "rejected", "apart", "mismatched")
"""float32 fields of a stream that some source gives; what a step does not read is not compiled."""
PLATFORMS: dict[str, Platform] = {"cuda": "gpu", "tpu": "tpu", "cpu": "cpu"}
NUMBERS = ("pair_ids", "trace_ids", "group_ids")
FLAGS: dict[str, tuple[str, ...]] = {"tpu": (
    "xla_tpu_enable_async_collective_fusion", "xla_tpu_enable_async_collective_fusion_fuse_all_gather",
    "xla_tpu_overlap_compute_collective_tc", "xla_enable_async_all_gather",
    "xla_tpu_prefer_async_allgather_to_allreduce", "xla_tpu_enable_sparse_core_collective_offload_reduce_scatter",
    "xla_tpu_enable_sparse_core_collective_offload_nd_reduce_scatter")}
"""What `launch/env.sh` turns on, and changes what is sent: without the last three a gather or scatter over a whole
slice becomes an all-reduce of twice the bytes."""


@dataclass(frozen=True, kw_only=True)
class Compiled:
    """hbm: {category: bytes} of what lies there during the step, its sum is the peak; flops: of one device as the
    compiler counts them (a loop counts once: not to be compared with the model's); collectives: of one step."""

    target: str
    devices: int
    hbm: Mapping[str, int]
    flops: float
    collectives: tuple[Collective, ...]
    hlo: str = ""

    @property
    def peak(self) -> int:
        return sum(self.hbm.values())

    @property
    def temporary(self) -> int:
        return self.hbm["temporary"]

    @property
    def arguments(self) -> int:
        return self.peak - self.temporary - self.hbm["results"]

    @property
    def sent(self) -> float:
        """Bytes a device sends in a step."""
        return sum(c.sent for c in self.collectives)


def abstract_devices(target: Target) -> list[Any]:
    """Devices of a target that can be compiled for, not run on. Raises ValueError where the compiler is missing."""
    from jax.experimental import topologies

    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    if target.platform == "cpu":
        there = jax.devices("cpu")
        if len(there) < target.count:
            raise ValueError(f"cpu:{target.count} needs {target.count} virtual devices, there are {len(there)}; set "
                             f"JAX_NUM_CPU_DEVICES={target.count}")
        return there[:target.count]
    try:
        if target.platform == "cuda":
            hosts = max(1, target.count // 8)
            made = topologies.get_topology_desc(
                target.name, "cuda", topology=f"{hosts}x{target.count // hosts}x1",
                target_config=(Path(__file__).parent / "targets" / f"{target.name}.txtpb").read_text())
        else:
            made = topologies.get_topology_desc(f"{target.name}:{target.slice}", "tpu")
    except Exception as e:
        needs = {"cuda": "jax-cuda13-plugin and jax-cuda13-pjrt of jax's version", "tpu": "jax[tpu] (libtpu)"}
        raise ValueError(f"cannot compile for {target.text}: {str(e).splitlines()[0]}; install "
                         f"{needs[target.platform]}") from e
    return list(made.devices)[:target.count]


def compile_step(recipe: Recipe, stage: Stage, target: Target, configs: Mapping[str, Any]) -> Compiled:
    """Compile a stage's step for a target. configs: {provider: ModelConfig} (`plan.model_config`).

    Raises ValueError for a mesh that is not the target's devices, or a target without a compiler.
    """
    from distill_jax.jobs.train import step_config

    mesh = make_mesh(devices=abstract_devices(target), **recipe.mesh.sizes)
    if target.platform == "tpu":  # neighbours on the torus, as `make_mesh` places the devices of a run
        mesh = placed(mesh.axis_sizes, list(mesh.devices.flat))
    models = {n: Transformer(configs[n], dtype=jnp.dtype(p.precision), remat=p.remat, attention=p.attention,
                             matmul=p.matmul)
              for n, p in stage.models.items()}
    config = step_config(stage, models, mesh)
    state, frozen = abstract_state(config, stage), abstract_frozen(config, stage)
    batch = abstract_batch(stage, mesh, student_of(config).hidden_size)
    jitted = lowerable(make_step(config, state))

    def lowered() -> Any:
        with compiling_for(PLATFORMS[target.platform]):
            return jitted.lower(state, frozen, batch)

    if mesh.size > 1:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            program = lowered()
    else:
        program = lowered()
    options: Any = dict.fromkeys(FLAGS.get(target.platform, ()), "true")
    return _report(program.compile(options), target, state, frozen, batch)


def _report(program: Any, target: Target, state: TrainState, frozen: Tree, batch: Batch) -> Compiled:
    memory, text = program.memory_analysis(), program.as_text()
    costs = program.cost_analysis() or {}
    given = {"parameters": device_bytes((state.params, frozen)), "optimiser": device_bytes(state.opt_state)}
    given["batch"] = max(0, memory.argument_size_in_bytes - sum(given.values()))
    return Compiled(
        target=target.text, devices=target.count, flops=float(costs.get("flops", 0.0)), hlo=text,
        collectives=tuple(collectives(text)), hbm=given | {
            "temporary": memory.temp_size_in_bytes,
            "results": max(0, memory.output_size_in_bytes - memory.alias_size_in_bytes)})


def device_bytes(arrays: Tree) -> int:
    """Bytes of abstract arrays on one device."""
    total = 0
    for x in jax.tree.leaves(arrays):
        shape = x.sharding.shard_shape(x.shape)
        size = 1
        for n in shape:
            size *= n
        total += size * x.dtype.itemsize
    return total


def student_of(config: StepConfig) -> ModelConfig:
    """The first model that is trained."""
    return next(m.config for n, m in config.models.items() if n in config.optimizers)  # type: ignore[attr-defined]


def abstract_state(config: StepConfig, stage: Stage) -> TrainState:
    """The state of `create_state`, without arrays: of a provider with adapters, these."""
    params, opt_state = {}, {}
    for name, tx in config.optimizers.items():
        if name in stage.models:
            shapes = trained_shapes(config.models[name].config, stage.models[name])  # type: ignore[attr-defined]
        else:
            shapes = jax.eval_shape(config.projectors[name].init, jax.random.key(0))
        params[name] = _sharded(config.mesh, shapes, jnp.float32)
        shapes = jax.eval_shape(tx.init, params[name])
        opt_state[name] = _placed(shapes, opt_state_shardings(shapes, params[name], config.mesh))
    number = jax.ShapeDtypeStruct((), jnp.int32)
    small = {"step": number, "skipped": number, "rng": jax.ShapeDtypeStruct((2,), jnp.uint32),
             "controllers": jax.eval_shape(config.objective.init)}
    everywhere = NamedSharding(config.mesh, PartitionSpec())
    return TrainState(params=params, opt_state=opt_state,
                      **_placed(small, jax.tree.map(lambda _: everywhere, small)))


def abstract_frozen(config: StepConfig, stage: Stage) -> dict[str, Tree]:
    """What a step is handed beside its state: providers that are not trained and what adapters belong to, in their
    compute dtype; the heads of stored hidden states, as large as the student's, in bfloat16."""
    out: dict[str, Tree] = {}
    for name, provider in stage.models.items():
        if provider.trainable and provider.lora is None:
            continue
        model: Any = config.models[name]
        params = _sharded(config.mesh, hf.param_shapes(model), jnp.dtype(provider.precision))
        lora = provider.lora if provider.trainable else None
        out |= {name: params} if lora is None else {BASE + name: Base(params=params, scale=lora.scale)}
    c = student_of(config)
    for name in config.objective.signals:
        if _kind(name)[0] == "hidden":
            shape = (c.vocab_size, c.hidden_size)
            spec = NamedSharding(config.mesh, kernel_spec(config.mesh, shape))
            out[f"signals/{name}"] = Head(kernel=jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=spec),
                                          real=c.real_vocab or c.vocab_size)
    return out


def _sharded(mesh: Mesh, shapes: Tree, dtype: Any) -> Tree:
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype), shapes)
    return _placed(shapes, param_shardings(mesh, shapes))


def _placed(shapes: Tree, shardings: Tree) -> Tree:
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)


def abstract_batch(stage: Stage, mesh: Mesh, width: int) -> Batch:
    """A global batch as the stage's source gives it and `train.feed` places it. width: D of stored hidden states."""
    rows, length = stage.source.rows, stage.source.seq_len
    cut = PartitionSpec(*batch_spec(), "context")
    array = lambda shape, dtype: jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(
        mesh, fit_spec(cut, shape, mesh.shape)))
    streams = {"main": _stream(array, rows, length)} | {
        n: _stream(array, rows, v.seq_len or length) for n, v in stage.retokenised.items()}
    signals = {n: _signal(array, n, (rows, length), width) for n in stage.source.signals}
    return Batch(views=streams, signals=signals)


def _stream(array: Any, rows: int, length: int) -> Stream:
    number, real = array((rows, length), jnp.int32), array((rows, length), jnp.float32)
    return Stream(tokens=number, positions=number, segment_ids=number, roles=number, step_ids=number, weights=real,
                  row_ids=number, fields=dict.fromkeys(FIELDS, real) | dict.fromkeys(NUMBERS, number))


def _signal(array: Any, name: str, shape: tuple[int, int], width: int) -> Signal:
    kind, count = _kind(name)
    real, mask = array(shape, jnp.float32), array(shape, jnp.bool_)
    ids, kept = array((*shape, count), jnp.int32), array((*shape, count), jnp.float32)
    if kind == "sampled":
        return Sampled(ids=ids, weights=kept, mask=mask)
    if kind == "token":
        return TokenLogprob(logprobs=real, mask=mask)
    if kind == "hidden":
        return HiddenStates(states=array((*shape, width), jnp.bfloat16), scales=real, mask=mask)
    return TopK(ids=ids, logprobs=kept, mask=mask)


def _kind(name: str) -> tuple[str, int]:
    """(kind, outcomes) of a signal by its name as `jobs.score` gives it: topk64, sampled50, hidden, token."""
    kind = name.rstrip("0123456789").rstrip("_")
    return kind, int(name[len(kind):].strip("_") or 64)
