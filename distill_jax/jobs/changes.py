"""The smallest change of a recipe that makes it fit: remat policy, micro-batches, precision, mesh, more devices."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

from distill_jax.jobs.hardware import Device, Target
from distill_jax.jobs.plan import StagePlan, fits, plan_stage
from distill_jax.models.remat import REMAT
from distill_jax.recipe import Recipe, Stage
from distill_jax.recipe_file import override

MOST_DEVICES = 4096


@dataclass(frozen=True, kw_only=True)
class Change:
    """sets: what `--set` takes; devices: how many it takes; plan: of the stage with it."""

    sets: tuple[str, ...]
    devices: int
    plan: StagePlan

    def text(self, name: str, before: int) -> str:
        """As one line says it."""
        words = [f"--set {s}" for s in self.sets]
        if self.devices != before:
            words.append(f"--on {name}:{self.devices}")
        return " ".join(words)


def smallest_change(recipe: Recipe, name: str, device: Device, devices: int) -> Change | None:
    """Of the combinations with the fewest settings that make stage `name` fit, the fastest; more devices only where no
    setting does. None: nothing fits on up to 4,096 devices."""
    count = devices
    while count <= MOST_DEVICES:
        groups = _choices(recipe, name, count)
        for size in range(0 if count > devices else 1, len(groups) + 1):
            found = [c for picked in itertools.combinations(groups, size) for sets in itertools.product(*picked)
                     if (c := _tried(recipe, name, sum(sets, ()), device, count))]
            if found:
                return min(found, key=lambda c: (c.plan.seconds, len(c.sets)))
        count *= 2
    return None


def refuse(recipe: Recipe, plans: list[StagePlan], target: Target) -> None:
    """Raises ValueError, with the smallest change that fits, for the first stage that does not."""
    for p in plans:
        if fits(p, target.device):
            continue
        change = smallest_change(recipe, p.name, target.device, target.count)
        how = "nothing that plan can change makes it fit; use a smaller model or more memory" if change is None else (
            f"smallest change that fits: {change.text(target.name, target.count)} "
            f"({change.plan.total_memory / 1e9:.3g} GB, {change.plan.seconds / p.seconds:.2g}x the time)")
        raise ValueError(f"does not fit {target.text} ({target.device.memory / 1e9:.0f} GB a device): stage {p.name} "
                         f"needs {p.total_memory / 1e9:.3g} GB; {how}")


def _choices(recipe: Recipe, name: str, devices: int) -> list[list[tuple[str, ...]]]:
    """[[settings that exclude each other] by what they change], each a tuple of `path=value`."""
    stage = next(s for s in recipe.stages if s.name == name and isinstance(s, Stage))
    trained = {n: p for n, p in stage.models.items() if p.trainable}
    order = list(REMAT)
    remat = [tuple(f"{n}.remat={policy}" for n, p in trained.items() if order.index(p.remat) < order.index(policy))
             for policy in order]
    cuts = [(f"micro_batches={n}",) for n in _divisors(stage.source.rows) if n > stage.micro_batches]
    precision = [tuple(f"{n}.precision=bfloat16" for n, p in stage.models.items() if p.precision == "float32")]
    mesh = [(f"mesh.data=1 mesh.fsdp={devices // tensor} mesh.tensor={tensor} mesh.context=1 mesh.expert=1",)
            for tensor in (1, 2, 4, 8) if devices % tensor == 0 and devices > 1]
    return [[c for c in group if c] for group in (remat, cuts, precision, mesh) if any(group)]


def _divisors(n: int) -> Iterator[int]:
    return (d for d in range(1, n + 1) if n % d == 0)


def _tried(recipe: Recipe, name: str, sets: tuple[str, ...], device: Device, devices: int) -> Change | None:
    flat = tuple(item for s in sets for item in s.split())
    try:
        for item in flat:
            recipe = override(recipe, item)
        stage = next(s for s in recipe.stages if s.name == name and isinstance(s, Stage))
        plan = plan_stage(recipe, stage, device, devices)
    except ValueError:
        return None
    return Change(sets=flat, devices=devices, plan=plan) if fits(plan, device) else None
