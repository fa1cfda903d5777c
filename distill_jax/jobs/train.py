"""A training stage of a recipe: open providers, source and objective, hand them to `train.loop.fit`."""

import contextlib
import dataclasses
import hashlib
import importlib.util
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from distill_jax.core import spec
from distill_jax.core.head import Head
from distill_jax.data.source_specs import Source, Store, map_stores
from distill_jax.data.sources import Readings, check_supervised, open_source, serve
from distill_jax.data.tokenizer import Tokenizer, load_tokenizer
from distill_jax.jobs.context import RunContext, Stopped
from distill_jax.jobs.estimates import Measures
from distill_jax.jobs.mixing import steering_of
from distill_jax.jobs.on_policy import OnPolicySteering
from distill_jax.jobs.opening import readings_of
from distill_jax.jobs.projectors import open_projector
from distill_jax.jobs.reinforce import ReinforceSteering
from distill_jax.jobs.rounds import batch_flops, spent
from distill_jax.loading import is_run, load, local_folder
from distill_jax.losses.rows.cross_entropy import cross_entropy
from distill_jax.models import families, hf
from distill_jax.models.lora import BASE, Base, to_json
from distill_jax.models.parallel import check_mesh
from distill_jax.models.quantized import check_matmul
from distill_jax.models.transformer import Transformer
from distill_jax.objective.chunks import kernel_spec
from distill_jax.objective.reduce import means
from distill_jax.objective.term import Term, build_objective
from distill_jax.recipe import Stage, Student
from distill_jax.rollout.reinforce import Reinforce
from distill_jax.sharding.mesh import make_mesh
from distill_jax.sharding.rules import param_shardings
from distill_jax.train import peers
from distill_jax.train.bilevel import fused_term, make_outer
from distill_jax.train.checkpoint import POINTER, checkpoints_of, latest_step
from distill_jax.train.feed import place_global
from distill_jax.train.flops import Flops
from distill_jax.train.loop import STEERED, Evaluation, Outer, Run, fit
from distill_jax.train.state import TrainState, create_state
from distill_jax.train.step import StepConfig, make_evaluation


@dataclass(frozen=True, kw_only=True)
class Provider:
    """An opened provider: its model, parameters on the mesh, and tokenizer."""

    model: Transformer
    params: Any
    tokenizer: Tokenizer
    spec: Student


def open_provider(student: Student, context: RunContext, mesh: Mesh) -> Provider:
    """Load or initialise a provider on the mesh. Raises ValueError where the tokenizer has more ids than the head."""
    dtype = jnp.dtype(student.precision)
    where = context.resolve(student.model) if student.model else ""
    tokenizer = load_tokenizer(context.resolve(student.tokenizer) if student.tokenizer else local_folder(where))
    if student.config is not None:
        config = dataclasses.replace(student.config, real_vocab=min(tokenizer.real, student.config.vocab_size))
        model = Transformer(config)
        params = init_params(model, mesh, student.init_seed + context.seed)
    else:
        kept = jnp.float32 if student.trainable and student.lora is None else dtype
        model, params = load(where, mesh=mesh, dtype=kept)
        config = dataclasses.replace(model.config, real_vocab=min(tokenizer.real, model.config.vocab_size))
    if tokenizer.real > config.vocab_size:
        raise ValueError(f"the tokenizer has {tokenizer.real} ids, the model's head only {config.vocab_size}: "
                         f"give the tokenizer that belongs to {where or 'the configuration'}")
    model = Transformer(config, dtype=dtype, remat=student.remat, attention=student.attention,
                        matmul=student.matmul)
    check_matmul(student.matmul, config)
    return Provider(model=model, params=params, tokenizer=tokenizer, spec=student)


def init_params(model: Transformer, mesh: Mesh, seed: int) -> Any:
    """Random float32 parameters, created where they live on the mesh."""
    tokens = jnp.zeros((1, 8), jnp.int32)
    return _init(lambda rng: model.init(rng, tokens)["params"], mesh, seed)


def _init(make: Callable[[Any], Any], mesh: Mesh, seed: int) -> Any:
    shapes = jax.eval_shape(make, jax.random.key(0))
    return jax.jit(make, out_shardings=param_shardings(mesh, shapes))(jax.random.key(seed))


def resolved(source: Source, context: RunContext) -> Any:
    """The source with `stage:NAME` paths replaced by folders."""
    return map_stores(source, lambda s: dataclasses.replace(s, path=context.resolve(s.path)))


@dataclass(frozen=True, kw_only=True)
class Opened:
    """All that a stage trains with: what its step is compiled for, the state of update 0, what is frozen, and where
    batches come from; `readings`: what its views take of the text."""

    config: StepConfig
    models: Mapping[str, Transformer]
    state: TrainState
    frozen: Mapping[str, Any]
    source: Any
    steering: Any
    student: Provider
    readings: Readings


def open_stage(stage: Stage, context: RunContext) -> Opened:
    """Open a training stage on the recipe's mesh. Raises ValueError for what does not fit together."""
    mesh = make_mesh(devices=None, **context.recipe.mesh.sizes)
    providers = {n: open_provider(p, context, mesh) for n, p in stage.models.items()}
    models = {n: p.model for n, p in providers.items()}
    student = next(p for p in providers.values() if p.spec.trainable)
    where = resolved(stage.source, context)
    readings = readings_of(stage, {n: p.tokenizer for n, p in providers.items()})
    source = open_source(where, student.tokenizer, seed=context.seed, readings=readings)
    if source.seq_len > student.model.config.context_length:
        raise ValueError(f"rows of {source.seq_len} tokens do not fit the student's context of "
                         f"{student.model.config.context_length}; lower source.seq_len")
    for name, model in models.items():
        check_mesh(model.config, mesh, source.seq_len, name)
    config = step_config(stage, models, mesh)
    if missing := sorted(set(config.objective.signals) - set(source.signals)):
        raise ValueError(f"terms need the signals {missing}, the source carries {sorted(source.signals)}: add them to "
                         "source.signals after `distill-jax score`")
    trained, frozen = _parameters(stage, context, config, providers)
    frozen |= stored_heads(source, config.objective.signals, student, mesh)
    opened = {"student": next(iter(trained)), "model": student.model, "mesh": mesh, "seed": context.seed}
    if isinstance(stage.on_policy, Reinforce):
        steering = ReinforceSteering(stage.on_policy, where, source, student.tokenizer, folder=context.folder,
                                     measures=Measures(config, frozen), **opened)
    elif stage.on_policy is not None:
        steering = OnPolicySteering(stage.on_policy, where, source, student.tokenizer, folder=context.folder, **opened)
    else:
        steering = steering_of(where, source, student.tokenizer, **opened)
    controllers = config.objective.init() | ({STEERED: steering.initial()} if steering else {})
    state = create_state(trained, config.optimizers, mesh=mesh, seed=context.seed, controllers=controllers)
    return Opened(config=config, models=models, state=state, frozen=frozen, source=source, steering=steering,
                  student=student, readings=readings)


def _parameters(stage: Stage, context: RunContext, config: StepConfig, providers: Mapping[str, Provider]
                ) -> tuple[dict[str, Any], dict[str, Any]]:
    """({provider: parameters that are trained}, {provider: those that are not}); adapters are trained, not their base.
    """
    trained = {n: p.params for n, p in providers.items() if p.spec.trainable}
    frozen = {n: p.params for n, p in providers.items() if not p.spec.trainable}
    for n, p in providers.items():
        if (lora := p.spec.lora) is not None:
            frozen[BASE + n] = Base(params=p.params, scale=lora.scale)
            make = partial(lora.init, hf.param_shapes(p.model))
            trained[n] = _init(make, config.mesh, p.spec.init_seed + context.seed)
    trained |= {n: _init(p.init, config.mesh, stage.projectors[n].init_seed + context.seed)
                for n, p in config.projectors.items()}
    return trained, frozen


def train_stage(stage: Stage, context: RunContext) -> dict[str, Any]:
    """Run one training stage to its end. Raises `Stopped` after SIGTERM or Ctrl-C, with everything saved."""
    opened = open_stage(stage, context)
    config, student, steering = opened.config, opened.student, opened.steering
    if jax.process_index() == 0:
        write_model_files(context.folder / "model", student, context)
    place_checkpoints(stage, context)
    run = Run(folder=context.folder, steps=stage.steps, name=stage.name, log_every=stage.log_every,
              save_every=stage.saving.steps, keep=stage.saving.keep, identity=identity(stage))
    evaluations, outer = {}, None
    if (found := fused_term(config.objective)) is not None:
        outer = Outer(fn=make_outer(config), every=found[2].every,
                      heldout=open_heldout(stage, context, student.tokenizer, opened.readings))
    if stage.heldout:
        heldout = Heldout(stage, config, opened.frozen,
                          open_heldout(stage, context, student.tokenizer, opened.readings))
        evaluations["heldout"] = Evaluation(fn=heldout)
    check = None if isinstance(stage.on_policy, Reinforce) else (  # a round of equal rewards has nothing, and may
        lambda batch: check_supervised(batch, student.tokenizer))
    with jax.set_mesh(config.mesh), contextlib.closing(steering) if steering else contextlib.nullcontext():
        fitted = fit(config, opened.state, opened.source, run, frozen=opened.frozen, evaluations=evaluations,
                     check=check, serve=serve, steering=steering, outer=outer, damaged=opened.source.damaged)
    if fitted.stopped:
        raise Stopped(f"by {fitted.stopped} after update {fitted.step} of {stage.steps}, saved")
    cost = spent(context.folder, stage.steps) if isinstance(stage.on_policy, Reinforce) else {
        "flops": total_flops(opened.source, config, stage.steps)}
    result = {"steps": stage.steps, **cost, "skipped": int(fitted.state.skipped),
              "params": {n: m.config.num_params for n, m in opened.models.items()}}
    return result | ({"heldout": heldout.values} if stage.heldout else {})


def step_config(stage: Stage, models: Mapping[str, Transformer], mesh: Mesh) -> StepConfig:
    """What the step of a stage is compiled for: its terms, optimisers, projectors and views. No weights, no data."""
    configs = {n: m.config for n, m in models.items()}
    specs = {n: stage.providers[n].optim or stage.optim for n, p in stage.models.items() if p.trainable}
    flops = {n: Flops.of(c, trained=n in specs) for n, c in configs.items()}
    for n, p in stage.models.items():
        if p.lora is not None:  # no gradient of the frozen matrices: two passes
            flops[n] = dataclasses.replace(flops[n], passes=2)
    specs |= {n: p.optim or stage.optim for n, p in stage.projectors.items()}
    return StepConfig(
        objective=build_objective(stage.terms, stage.steps, stage.loss_loop), models=models, mesh=mesh,
        views=stage.made_views,
        projectors={n: open_projector(p, configs) for n, p in stage.projectors.items()}, flops=flops,
        micro_batches=stage.micro_batches, optimizers={n: s.build(stage.steps) for n, s in specs.items()},
        schedules={n: s.schedule(stage.steps) for n, s in specs.items()})


def identity(stage: Stage) -> str:
    """Hash of what must not change between the start of a stage and its continuation."""
    return hashlib.blake2b(spec.dump(stage).encode(), digest_size=8).hexdigest()


def stored_heads(source: Any, signals: Sequence[str], student: Provider, mesh: Mesh) -> dict[str, Any]:
    """{"signals/<name>": Head} of the signals that are hidden states, sharded like other heads. Raises ValueError
    where the teacher's ids are not the student's."""
    out: dict[str, Any] = {}
    for name in signals:
        if source.signals[name].kind != "hidden":
            continue
        head, real = source.head(name), student.tokenizer.real
        if head.real != real:
            raise ValueError(f"signal {name!r}: the teacher's head has {head.real} real ids, the student's tokenizer "
                             f"{real}: their vocabularies differ. Use a topk or sampled signal, which are translated")
        put = lambda x, spec: jax.make_array_from_callback(x.shape, NamedSharding(mesh, spec), lambda i, x=x: x[i])
        out[f"signals/{name}"] = Head(
            kernel=put(head.kernel, kernel_spec(mesh, head.kernel.shape)), real=head.real, scale=head.scale,
            bias=None if head.bias is None else put(head.bias, PartitionSpec()), soft_cap=head.soft_cap)
    return out


def write_model_files(folder: Path, student: Provider, context: RunContext) -> None:
    """`config.json` and the tokenizer beside the checkpoints, in the Hugging Face layout; of adapters, what they
    belong to."""
    folder.mkdir(parents=True, exist_ok=True)
    config = dataclasses.replace(student.model.config, real_vocab=None)  # the tokenizer beside it says so
    (folder / "config.json").write_text(json.dumps(families.to_hf(config), indent=2) + "\n")
    student.tokenizer.save(folder)
    if student.spec.lora is not None and not (folder / "adapter.json").exists():
        base = context.resolve(student.spec.model or "")
        here = local_folder(base)
        found = to_json(student.spec.lora, base, latest_step(checkpoints_of(here)) if is_run(here) else None)
        (folder / "adapter.json").write_text(json.dumps(found, indent=2) + "\n")


def place_checkpoints(stage: Stage, context: RunContext) -> None:
    """Write down where the stage's checkpoints go, if not into its folder, and put the model's files beside them.

    Raises ValueError where what writes to gs:// is not installed, or the stage has checkpoints in another place.
    """
    pointer, at = context.folder / POINTER, stage.saving.at
    if at is None:
        return
    if at.startswith("gs://") and (missing := [m for m in ("gcsfs", "google.cloud.storage") if not _there(m)]):
        raise ValueError(f"saving.at={at!r} needs {' and '.join(missing)}: pip install 'distill_jax[gcs]'")
    below = context.folder.relative_to(context.recipe.runs)
    url = epath.Path(at if "://" in at else Path(at).expanduser().absolute()) / below.as_posix()
    if (here := context.folder / "checkpoints").is_dir() and any(here.iterdir()):
        raise ValueError(f"{here} has checkpoints, saving.at={at!r} would begin anew; move them to {url}/checkpoints, "
                         "or give the run another name")
    if jax.process_index() == 0:
        try:
            (url / "model").mkdir(parents=True, exist_ok=True)
            for file in (context.folder / "model").iterdir():
                (url / "model" / file.name).write_bytes(file.read_bytes())
        except Exception as e:  # clients of object stores raise kinds of their own
            reason = str(e).strip() or type(e).__name__
            raise OSError(f"saving.at={at!r}: cannot write to {url}: {reason.splitlines()[0][:300]}") from e
    tmp = pointer.with_suffix(f".{jax.process_index()}.tmp")  # by every process: their folders may be their own
    tmp.write_text(f"{url}/checkpoints\n")
    tmp.replace(pointer)
    peers.current().barrier(f"{stage.name}: place of checkpoints")


def _there(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # a parent of it
        return False


def total_flops(source: Any, config: StepConfig, steps: int, sample: int = 16) -> float:
    """Model FLOPs of the whole stage: the mean over batches spread evenly over it, times the number of updates. What a
    student wrote in the place of some of them (`OnPolicy`) counts as the source's own rows."""
    n = min(sample, steps)
    one = lambda step: batch_flops(config, source.batch(step), lambda stream: stream.weights > 0)
    return sum(one(i * steps // n) for i in range(n)) / n * steps


def open_heldout(stage: Stage, context: RunContext, tokenizer: Tokenizer, readings: Readings) -> Any:
    """Batches of whole rows of the held-out split. Raises ValueError where the source has none."""
    if not isinstance(stage.source, Store):
        raise ValueError(f"held-out rows need a single Store as source, got a {type(stage.source).__name__}")
    where = dataclasses.replace(resolved(stage.source, context), split="heldout", prefix=None)
    return open_source(where, tokenizer, seed=context.seed, readings=readings)


class Heldout:
    """Means of every term and of plain cross-entropy over whole rows of the held-out split: a callback of the loop."""

    def __init__(self, stage: Stage, config: StepConfig, frozen: Mapping[str, Any], source: Any) -> None:
        self.source = source
        self.batches = -(-stage.heldout // self.source.rows)
        self.frozen, self.mesh = frozen, config.mesh
        objective = build_objective({**stage.terms, "cross_entropy": Term(loss=cross_entropy)}, stage.steps,
                                    stage.loss_loop)
        self.controllers = tuple(objective.init())
        self.values: dict[str, float] = {}
        self._sums = make_evaluation(dataclasses.replace(config, objective=objective))

    def __call__(self, state: TrainState) -> Mapping[str, float]:
        total, controllers = None, {name: state.controllers[name] for name in self.controllers}
        for i in range(self.batches):
            batch = place_global(self.source.batch(i), self.mesh)
            got = jax.device_get(self._sums(state.params, self.frozen, batch, state.step, controllers))
            total = got if total is None else jax.tree.map(np.add, total, got)
        assert total is not None
        self.values = {name: float(v) for name, v in means(total).items() if "/" not in name or float(v)}
        return self.values
