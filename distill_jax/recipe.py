"""`Recipe`: a list of stages. A method of a paper is one of these, not a fork of the trainer.

A stage with a model to train is a `Stage`; the other stages (`Generate`, `Score`, ...) make what the next one reads.
A stage refers to an earlier one as `stage:NAME`: a model after a training stage, a store after a data stage.
"""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from distill_jax.core import spec
from distill_jax.core.batch import Stream
from distill_jax.core.roles import SUPERVISED, Role
from distill_jax.data.source_specs import Retokenised, Source
from distill_jax.data.views import Derived
from distill_jax.decode.sampling import Sampling
from distill_jax.models.config import ModelConfig
from distill_jax.models.lora import Lora
from distill_jax.objective.coupled import Layer
from distill_jax.objective.memory import Loop
from distill_jax.objective.term import AnyTerm
from distill_jax.objective.tokens import TokenTerm
from distill_jax.rollout.estimators import Estimator
from distill_jax.rollout.on_policy import OnPolicy
from distill_jax.rollout.reinforce import Reinforce
from distill_jax.train.optim import AdamW, Optimizer

Precision = Literal["float32", "bfloat16"]


@dataclass(frozen=True, kw_only=True)
class Student:
    """A trained model. Give `model` (run, HF directory, hub id, URL or `stage:NAME`) or `config` for random weights.

    tokenizer   where the tokenizer comes from; default: with the model
    trainable   False keeps it fixed (a frozen teacher); see `Frozen`
    precision   dtype of the computation; parameters of trained models are float32 masters
    remat       what the backward pass keeps, the rest is recomputed: a name in `models.remat.REMAT`
    attention   "auto" or the name of one implementation (`models.attention`)
    matmul      how layers multiply with their kernels: "full" in `precision`; "int8" or "fp8" in the forward pass;
                "int8_dx", "fp8_dx" for the states' gradient too (`models.quantized`)
    optim       its own optimiser; None: the stage's
    lora        trained adapters on the frozen model, which keeps `precision`; None: all parameters are trained
    """

    model: str | None = None
    config: ModelConfig | None = None
    tokenizer: str | None = None
    trainable: bool = True
    precision: Precision = "float32"
    remat: Literal["none", "dots", "qkv_attention", "full"] = "none"
    attention: str = "auto"
    matmul: Literal["full", "int8", "fp8", "int8_dx", "fp8_dx"] = "full"
    init_seed: int = 0
    optim: Optimizer | None = None
    lora: Lora | None = None

    def __post_init__(self) -> None:
        if self.lora and (self.model is None or not self.trainable):
            raise ValueError("lora= trains adapters of a model that is there: give model=, and no trainable=False; a "
                             "run with adapters is loaded by its name like any other")
        if (self.model is None) == (self.config is None):
            raise ValueError("a provider needs exactly one of model= (trained weights) and config= (random weights)")

    def with_string(self, model: str) -> "Student":
        """`--set student=MODEL`: the same provider starting from other weights."""
        return dataclasses.replace(self, model=model, config=None)


def Frozen(model: str, **kwargs: Any) -> Student:
    """A teacher on the mesh: like `Student`, never trained."""
    return Student(model=model, trainable=False, **kwargs)


@dataclass(frozen=True, kw_only=True)
class Projector:
    """A trained linear map of a model's states into another model's space, where it predicts with that one's head.

    Terms name it like a model: `student="t2s/main"`.

    reads   provider whose states of `view` it maps
    like    provider whose width and head it takes; the head is a constant
    layers  which states: "final", "embedding" or layer numbers; each has a map of its own
    optim   its own optimiser; None: the stage's
    """

    reads: str
    like: str
    view: str = "main"
    layers: tuple[Layer, ...] = ("final",)
    bias: bool = True
    optim: Optimizer | None = None
    init_seed: int = 0

    @property
    def models(self) -> tuple[str, str]:
        """The providers it stands between."""
        return self.reads, self.like


@dataclass(frozen=True, kw_only=True)
class CrossModelAttention:
    """DSKD's cross-model attention (`models.projectors.CrossAttention`), trained: the teacher's states at the
    student's positions, and the other way round. Terms name its fields: `"cma.t2s/main"` and `"cma.s2t/main"`.

    student_view, teacher_view  may be two tokenisations; rows and segment numbers must be the same documents
    on                          roles of the tokens that take part
    optim                       its own optimiser; None: the stage's
    """

    student: str = "student"
    teacher: str = "teacher"
    student_view: str = "main"
    teacher_view: str = "main"
    on: tuple[Role, ...] = SUPERVISED
    optim: Optimizer | None = None
    init_seed: int = 0

    @property
    def models(self) -> tuple[str, str]:
        """The providers it stands between."""
        return self.student, self.teacher


@dataclass(frozen=True, kw_only=True)
class Critic:
    """A trained value of the state before each token, read off a model's final states (`models.projectors.ValueHead`):
    `Term(value_error, student="critic/main", target="fields")` trains it, `Gae(critic="critic")` asks it.

    reads   provider whose states it reads: the student, or a trainable model of its own
    detach  True: the critic does not move that model; False: it does
    optim   its own optimiser; None: the stage's
    """

    reads: str = "student"
    detach: bool = True
    optim: Optimizer | None = None
    init_seed: int = 0

    @property
    def models(self) -> tuple[str, ...]:
        """The provider it stands on."""
        return (self.reads,)


AnyProjector = Projector | CrossModelAttention | Critic
AnyView = Retokenised | Derived | Callable[[Stream], Stream]


@dataclass(frozen=True, kw_only=True)
class MeshShape:
    """Devices along each axis (`sharding.mesh`); -1 takes what is left. The product must be the number of devices."""

    data: int = 1
    fsdp: int = -1
    expert: int = 1
    context: int = 1
    tensor: int = 1

    @property
    def sizes(self) -> dict[str, int]:
        """{axis: size}, as `sharding.make_mesh` takes it."""
        return dataclasses.asdict(self)


@dataclass(frozen=True, kw_only=True)
class Saving:
    """When checkpoints are written: every `steps` updates (0: only at the end), keeping the newest `keep`.

    at  where: None: in the run's folder; a folder or `gs://bucket/path`: below it, by the names of run and stage, with
        the model's configuration and tokenizer beside them. The rest of the run stays in its folder
    """

    steps: int = 500
    keep: int = 2
    at: str | None = None

    def __post_init__(self) -> None:
        scheme, url, _ = (self.at or "").partition("://")
        if url and scheme != "gs":
            raise ValueError(f"saving.at={self.at!r}: checkpoints go to a folder or to gs://, Orbax cannot write them "
                             f"to {scheme}://; give a folder where the bucket is mounted (trace stores can be on s3://)")


@dataclass(frozen=True, kw_only=True)
class Stage:
    """Training: batches of `source` through `providers`, the sum of `terms`, `optim` for `steps` updates.

    providers      models, trained projectors between them, and critics
    views          further views of the batch's rows: in the tokens of another provider (`Retokenised`), or made of
                   `main` by a function of `data.views` (of another view: `Derived`)
    micro_batches  gradient accumulation; does not change the gradient (but see `objective.coupled` for what couples
                   rows)
    loss_loop      what the loss loops over: "tokens", "vocabulary" (less memory, a third more products; for losses that
                   read a topk, sampled or token signal or the tokens), or "auto" by an estimate (`objective.memory`)
    heldout        rows of the source's held-out split on which the loss is reported at the end (0: none)
    on_policy      sequences the student writes itself, beside those of the source or in their place; `Reinforce`:
                   judged and rewarded, for policy losses
    """

    name: str = "train"
    source: Source
    providers: Mapping[str, Student | AnyProjector]
    terms: Mapping[str, AnyTerm]
    views: Mapping[str, AnyView] = field(default_factory=dict)
    optim: Optimizer = AdamW()
    steps: int = 1000
    micro_batches: int = 1
    loss_loop: Loop = "auto"
    saving: Saving = Saving()
    log_every: int = 20
    heldout: int = 0
    on_policy: OnPolicy | None = None

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps must be at least 1, got {self.steps}")
        stored = sorted(n for n, t in self.terms.items() if t.target.startswith("signals/"))
        if self.on_policy and (stored or getattr(self.source, "controller", None)):
            raise ValueError(f"on_policy: nothing is stored for what the student writes, so terms {stored} need a live "
                             'teacher (target="teacher/main"), and the shares of a Mix cannot be steered')
        if isinstance(self.on_policy, Reinforce):
            self._check_reinforce(self.on_policy)
        if not any(p.trainable for p in self.models.values()):
            raise ValueError(f"stage {self.name!r} trains no model: no provider has trainable=True")
        for name, view in self.retokenised.items():
            if view.reader not in self.models:
                raise ValueError(f"view {name!r} of stage {self.name!r} is in the tokens of {view.reader!r}, and there "
                                 f"is no such model; models: {sorted(self.models)}")
        for name, projector in self.projectors.items():
            if missing := sorted(set(projector.models) - set(self.models)):
                raise ValueError(f"provider {name!r} of stage {self.name!r} stands on {list(projector.models)}, and "
                                 f"there is no model {missing}; models: {sorted(self.models)}")

    def _check_reinforce(self, reinforce: Reinforce) -> None:
        policy = sorted(n for n, t in self.terms.items() if isinstance(t, TokenTerm) or t.target == "fields")
        if self.heldout or len(policy) < len(self.terms):
            raise ValueError(f"stage {self.name!r} reinforces: its terms are TokenTerms (or a critic's, "
                             'target="fields"), and heldout=0, for rows that nobody sampled have no advantages; got '
                             f"TokenTerms {policy} of {sorted(self.terms)} and heldout={self.heldout}")
        asks = reinforce.advantage
        for name, kind in ((asks.critic, Critic), (asks.reference, Student)) if isinstance(asks, Estimator) else ():
            if name and not isinstance(self.providers.get(name), kind):
                there = sorted(n for n, p in self.providers.items() if isinstance(p, kind))
                raise ValueError(f"stage {self.name!r}: {type(asks).__name__} reads the provider {name!r}, which must "
                                 f"be a {kind.__name__}; there are {there}")

    @property
    def models(self) -> dict[str, Student]:
        """The providers that read tokens."""
        return {n: p for n, p in self.providers.items() if isinstance(p, Student)}

    @property
    def retokenised(self) -> dict[str, Retokenised]:
        """The views that the source makes."""
        return {n: v for n, v in self.views.items() if isinstance(v, Retokenised)}

    @property
    def made_views(self) -> dict[str, Derived | Callable[[Stream], Stream]]:
        """The views that the step makes of those."""
        return {n: v for n, v in self.views.items() if not isinstance(v, Retokenised)}

    @property
    def projectors(self) -> dict[str, AnyProjector]:
        """The providers that read other providers' states."""
        return {n: p for n, p in self.providers.items() if not isinstance(p, Student)}


@dataclass(frozen=True, kw_only=True)
class Generate:
    """The teacher answers the questions of `questions` (a store); verified traces go into a new store."""

    name: str = "generate"
    teacher: str
    questions: str
    n: int = 1
    sampling: Sampling = Sampling()
    keep: Literal["correct", "all"] = "correct"
    batch_size: int = 256
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class Score:
    """The teacher's signal for every row of `store`, written beside the rows. signal: `topk:K` or `token`."""

    name: str = "score"
    store: str
    teacher: str
    signal: str = "topk:64"
    batch_tokens: int = 16384


@dataclass(frozen=True, kw_only=True)
class Call:
    """A stage that is one module-level function `fn(folder: Path, context: RunContext, **kwargs)`.

    It writes into `folder`; what it leaves there is what `stage:NAME` refers to.
    """

    name: str
    fn: Callable[..., Any]
    kwargs: Mapping[str, Any] = field(default_factory=dict)


AnyStage = Stage | Generate | Score | Call


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Stages in order, under one name and one seed."""

    name: str
    stages: tuple[AnyStage, ...]
    seed: int = 0
    mesh: MeshShape = MeshShape()
    runs: str = "runs"

    def __post_init__(self) -> None:
        object.__setattr__(self, "stages", tuple(self.stages))
        names = [s.name for s in self.stages]
        if not names or len(set(names)) != len(names):
            raise ValueError(f"a recipe needs at least one stage and distinct stage names, got {names}")
        for name in (self.name, *names):  # they are folders
            if not name or {"", ".", ".."} & set(name.split("/")):
                raise ValueError(f"name {name!r}: expected the name of a folder, e.g. kd or 2024/kd")

        if "://" in self.runs:
            raise ValueError(f"runs={self.runs!r}: a run's own files take a folder that all hosts see; its checkpoints "
                             f"can go to gs:// by themselves: --set saving.at={self.runs}")

    @property
    def folder(self) -> Path:
        return Path(self.runs) / self.name

    def stage_folder(self, name: str) -> Path:
        """Where a stage writes: the run itself when it is the only stage, else a folder of its own."""
        return self.folder if len(self.stages) == 1 else self.folder / name

    def to_yaml(self) -> str:
        return spec.dump(self)


def resolve(recipe: Recipe, reference: str) -> str:
    """`stage:NAME` -> the folder of that stage; anything else unchanged. Raises ValueError for unknown stages."""
    if not reference.startswith("stage:"):
        return reference
    name = reference.removeprefix("stage:").split("/")[0]
    names = [s.name for s in recipe.stages]
    if name not in names:
        raise ValueError(f"{reference!r}: no stage of that name; stages: {names}")
    return str(recipe.stage_folder(name)) + reference.removeprefix(f"stage:{name}")
