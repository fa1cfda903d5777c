"""The layers of DESIGN hold: imports point strictly downward, and the jax-free packages stay jax-free."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1] / "distill_jax"

LAYER = {
    "core": 0,
    "traces": 1, "rewards": 1, "losses": 1, "models": 1, "sharding": 1,
    "data": 2, "decode": 2, "objective": 2,
    "rollout": 3, "train": 3,
    "eval": 4,
    # everything at the top of the package (recipe.py, loading.py, ...) and cli/
    "recipe": 5, "recipe_file": 5, "loading": 5, "jobs": 5, "cli": 6, "__init__": 7, "__main__": 7,
}
SIDEWAYS = {("rewards", "traces"), ("models", "sharding")}
TOP = {"recipe", "recipe_file", "loading", "jobs"}  # may see each other; the cycle test still holds
NO_JAX = ("traces", "rewards")


def package(module: str) -> str:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def module_name(path: Path) -> str:
    rel = path.relative_to(ROOT.parent).with_suffix("")
    return ".".join(p for p in rel.parts if p != "__init__")


def imports(path: Path) -> list[tuple[str, int]]:
    out = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            out += [(a.name, node.lineno) for a in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import; write the whole path"
            out.append((node.module or "", node.lineno))
            out += [(f"{node.module}.{a.name}", node.lineno) for a in node.names]
    return out


def all_modules() -> dict[str, Path]:
    return {module_name(p): p for p in ROOT.rglob("*.py")}


def test_arrows_point_down():
    bad = []
    for name, path in all_modules().items():
        here = package(name) if name != "distill_jax" else "__init__"
        assert here in LAYER, f"{path}: package {here!r} has no layer; add it to LAYER and docs/ARCHITECTURE.md"
        for target, line in imports(path):
            if not target.startswith("distill_jax"):
                if target.split(".")[0] in ("configs", "tests", "benchmarks", "examples"):
                    bad.append(f"{path.relative_to(ROOT)}:{line}: imports {target}")
                continue
            there = package(target)
            if there in ("__version__",) or there == here or there not in LAYER:
                continue
            if {here, there} <= TOP or here == "__init__":
                continue
            if LAYER[there] >= LAYER[here] and (here, there) not in SIDEWAYS:
                bad.append(f"{path.relative_to(ROOT)}:{line}: {here} (layer {LAYER[here]}) "
                           f"imports {target} (layer {LAYER[there]})")
    assert not bad, "\n".join(sorted(set(bad)))


def test_no_cycles():
    modules = all_modules()
    graph = {n: {t for t, _ in imports(p) if t in modules and t != n} for n, p in modules.items()}
    graph.pop("distill_jax", None)  # __init__ is lazy
    state: dict[str, int] = {}

    def visit(n: str, stack: list[str]) -> None:
        if state.get(n) == 2 or n not in graph:
            return
        assert state.get(n) != 1, "import cycle: " + " -> ".join([*stack[stack.index(n):], n])
        state[n] = 1
        for t in sorted(graph[n]):
            visit(t, [*stack, n])
        state[n] = 2

    for n in sorted(graph):
        visit(n, [])


@pytest.mark.parametrize("pkg", NO_JAX)
def test_jax_free(pkg):
    """Importing every module of the package loads neither jax nor torch."""
    mods = [m for m in all_modules() if m.startswith(f"distill_jax.{pkg}")]
    code = "import sys\n" + "\n".join(f"import {m}" for m in mods) + (
        "\nbad = [m for m in ('jax', 'torch', 'flax') if m in sys.modules]\nassert not bad, bad")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT.parent)
    assert done.returncode == 0, done.stderr


def test_budgets():
    """DESIGN section 11: files to 600 lines, functions to 100 (160 for the training loop)."""
    bad = []
    for name, path in all_modules().items():
        text = path.read_text()
        if text.count("\n") > 600:
            bad.append(f"{name}: {text.count(chr(10))} lines")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = (node.end_lineno or 0) - node.lineno + 1
                limit = 160 if name == "distill_jax.train.loop" else 100
                if lines > limit:
                    bad.append(f"{name}:{node.name}: {lines} lines")
    assert not bad, "\n".join(bad)
