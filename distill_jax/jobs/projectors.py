"""From a recipe's projectors to `models.projectors`: sized for the models they stand between."""

from collections.abc import Mapping

from distill_jax.models.config import ModelConfig
from distill_jax.models.projectors import CrossAttention, LinearProjector, ProjectorModel, ValueHead
from distill_jax.recipe import AnyProjector, Critic, Projector


def open_projector(spec: AnyProjector, configs: Mapping[str, ModelConfig]) -> ProjectorModel:
    """The projector of a spec; `configs` of the stage's models by provider."""
    if isinstance(spec, Critic):
        return ValueHead(source=f"{spec.reads}/main", width=configs[spec.reads].hidden_size, detach=spec.detach)
    first, second = (configs[name].hidden_size for name in spec.models)
    if isinstance(spec, Projector):
        return LinearProjector(source=f"{spec.reads}/{spec.view}", like=spec.like, layers=tuple(spec.layers),
                               width_in=first, width_out=second, bias=spec.bias)
    return CrossAttention(student=f"{spec.student}/{spec.student_view}", teacher=f"{spec.teacher}/{spec.teacher_view}",
                          student_width=first, teacher_width=second, on=tuple(spec.on))
