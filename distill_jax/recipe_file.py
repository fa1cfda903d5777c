"""Recipes out of files: `load_recipe` reads Python or YAML, `override` applies one `--set path=value`."""

import dataclasses
import difflib
import importlib.util
import sys
import traceback
from pathlib import Path
from typing import Any

from distill_jax.core import spec
from distill_jax.recipe import Recipe, Stage


def load_recipe(path: str | Path, overrides: list[str] | None = None) -> Recipe:
    """A recipe from `recipe()` of a Python file or from a YAML file, with `--set` overrides applied."""
    path = Path(path)
    if not path.is_file():
        there = [p.name for p in path.parent.glob("*.py")] if path.parent.is_dir() else []
        near = difflib.get_close_matches(path.name, there, n=2)
        raise FileNotFoundError(f"no recipe {path}" + (f"; did you mean {' or '.join(near)}?" if near else ""))
    if path.suffix in (".yaml", ".yml"):
        recipe = spec.load(path.read_text(), str(path))
    elif path.suffix == ".py":
        recipe = _of_python(path)
    else:
        raise ValueError(f"{path} is no recipe: expected a .py file with recipe() -> Recipe, or a .yaml file")
    if not isinstance(recipe, Recipe):
        raise ValueError(f"{path}: expected a Recipe, got {type(recipe).__name__}")
    for item in overrides or []:
        recipe = override(recipe, item)
    recipe.to_yaml()  # refuses closures before anything runs
    return recipe


def _of_python(path: Path) -> Any:
    """What `recipe()` of a Python file returns. Raises ValueError naming the line where the file is at fault."""
    _make_importable(path)
    module_spec = importlib.util.spec_from_file_location(f"recipe_{path.stem}", path)
    assert module_spec and module_spec.loader
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[module_spec.name] = module
    try:
        module_spec.loader.exec_module(module)
        if not hasattr(module, "recipe"):
            raise ValueError("there is no function recipe() -> Recipe in it")
        return module.recipe()
    except Exception as e:
        lines = [f.lineno for f in traceback.extract_tb(e.__traceback__) if f.filename == str(path)]
        kind = "" if isinstance(e, ValueError) else f"{type(e).__name__}: "
        raise ValueError(f"{path}{f', line {lines[-1]}' if lines else ''}: {kind}{e}") from e


def _make_importable(path: Path) -> None:
    """Recipes may import what stands beside them in their project (`configs.models`): put its root on the path."""
    root = next((p for p in path.resolve().parents if (p / "pyproject.toml").is_file()), Path.cwd())
    if str(root) not in sys.path:
        sys.path.append(str(root))


def override(recipe: Recipe, item: str) -> Recipe:
    """Apply one `path=value`. A path that is not one of the recipe's own fields applies to every stage that has it.

    `student=X` is short for `providers.student=X`. Raises ValueError with suggestions for an unknown path.
    """
    path, eq, text = item.partition("=")
    if not eq or not path:
        raise ValueError(f"--set {item!r}: expected path=value, e.g. optim.peak_lr=1e-5")
    value = spec.parse(text, f"--set {item}") if text else ""
    own = {f.name for f in dataclasses.fields(recipe)}
    if path.split(".")[0] in own:
        try:
            return spec.set_path(recipe, path, value)
        except KeyError:
            raise _unknown(recipe, path) from None
    hit, stages = False, []
    for stage in recipe.stages:
        full = path
        head = path.split(".")[0]
        if isinstance(stage, Stage) and head in stage.providers:
            full = f"providers.{path}"
        try:
            stages.append(spec.set_path(stage, full, value))
            hit = True
        except KeyError:
            stages.append(stage)
    if not hit:
        raise _unknown(recipe, path)
    return dataclasses.replace(recipe, stages=tuple(stages))


def _unknown(recipe: Recipe, path: str) -> ValueError:
    known = {p for s in recipe.stages for p, _ in spec.leaves(s)} | {f.name for f in dataclasses.fields(recipe)}
    known |= {p.removeprefix("providers.") for p in known}
    ranked = difflib.get_close_matches(path, sorted(known), n=3, cutoff=0.4)
    return ValueError(f"--set {path}: no such field" + (f"; did you mean {', '.join(ranked)}?" if ranked else ""))
