"""A layer's mixture of experts, forward and backward: in tiles (`models.tiles`) against XLA's `ragged_dot`.

Both sides are `models.moe.grouped` in one process, one after the other, on the same tokens, experts and routing
(random, not balanced); their values and gradients are compared. Temporaries are the compiler's. A side whose
temporaries are beyond --most GB is compiled, not run. Useful FLOPs: nine products of the N k copies, three forward and
six backward.

    python -m benchmarks.experts                        # on this CPU; benchmarks/results/experts.md has the result
    python -m benchmarks.experts --small                # seconds: does it run and agree
    JAX_PLATFORMS=cpu python -m benchmarks.experts --on compile:h200
                                                        # memory only, no device (jax-cuda13-plugin of jax's version)
"""

import argparse
import json
import os
import platform
import time
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from distill_jax.core.platform import Platform, compiling_for
from distill_jax.jobs.compiled import PLATFORMS, abstract_devices
from distill_jax.jobs.hardware import parse
from distill_jax.models.moe import grouped, route
from distill_jax.models.tiles import rows_of

Array = Any


@dataclass(frozen=True, kw_only=True)
class Case:
    """experts: of this device, of `owners` times as many; tokens: those it sees."""

    tokens: int
    width: int
    inner: int
    experts: int
    top_k: int
    owners: int = 1
    dtype: str = "float32"

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """x, shares, gate, up, down, experts' ids"""
        E, D, F, N, k = self.experts, self.width, self.inner, self.tokens, self.top_k
        return (N, D), (N, k), (E, D, F), (E, D, F), (E, F, D), (N, k)

    @property
    def useful(self) -> float:
        """FLOPs"""
        return 9 * 2.0 * self.tokens * self.top_k / self.owners * self.width * self.inner


CPU = tuple(Case(tokens=n, width=d, inner=256, experts=e, top_k=k) for n, d, e, k in (
    (512, 256, 8, 2), (2048, 256, 8, 2), (8192, 256, 8, 2), (2048, 1024, 8, 2), (16, 512, 64, 8), (512, 512, 64, 8),
    (2048, 512, 64, 8), (8192, 512, 64, 8), (2048, 1024, 64, 8), (512, 512, 128, 2), (2048, 512, 128, 2)))
SMALL = (Case(tokens=64, width=32, inner=16, experts=4, top_k=2),)
COMPILED = (Case(tokens=65536, width=2048, inner=768, experts=8, top_k=8, owners=8, dtype="bfloat16"),
            Case(tokens=8192, width=2048, inner=768, experts=64, top_k=8, dtype="bfloat16"))
"""The mixture of `benchmarks.shapes`, 8,192 tokens a device: over eight devices of an expert axis, and on one."""


def total(case: Case, x: Array, shares: Array, gate: Array, up: Array, down: Array, ids: Array) -> Array:
    out = grouped(x, ids, shares, {"gate": gate, "up": up, "down": down}, activation=jax.nn.silu,
                  experts=case.experts * case.owners)
    return jnp.sum(out.astype(jnp.float32) ** 2)


def compiled(case: Case, way: Platform, arrays: Any) -> Any:
    """The program of value and gradients. way: the platform whose form is taken; "tpu" is `ragged_dot`'s."""
    with compiling_for(way):
        return jax.jit(jax.value_and_grad(partial(total, case), argnums=range(5))).lower(*arrays).compile()


def inputs(case: Case) -> tuple[Array, ...]:
    keys = jax.random.split(jax.random.key(0), 5)
    x, _, *kernels, _ = case.shapes
    states, router = jax.random.normal(keys[3], x), jax.random.normal(keys[4], (case.width, case.experts))
    _, shares, ids = route(states, router / case.width**0.5, case.top_k, True)
    made = (jax.random.normal(k, s) / s[1] ** 0.5 for k, s in zip(keys, kernels))
    return *(a.astype(case.dtype) for a in (states, shares, *made)), ids


def seconds(program: Any, arrays: Any, repeats: int) -> tuple[float, float, Any]:
    """Best wall-clock and CPU seconds (of all threads), and the result."""
    wall, cpu, out = [], [], None
    for _ in range(repeats):
        start = time.perf_counter(), time.process_time()
        out = jax.block_until_ready(program(*arrays))
        wall.append(time.perf_counter() - start[0])
        cpu.append(time.process_time() - start[1])
    return min(wall), min(cpu), jax.tree.map(lambda a: np.asarray(a, np.float32), out)


def difference(a: Any, b: Any) -> float:
    """Largest relative difference over value and gradients."""
    return max(float(np.linalg.norm(np.ravel(x - y)) / np.linalg.norm(np.ravel(y)))
               for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


def run(case: Case, args: argparse.Namespace) -> dict[str, Any]:
    arrays, out, results = inputs(case), {}, {}
    for name, way in (("tiles", "cpu"), ("ragged", "tpu")):
        program = compiled(case, way, arrays)  # type: ignore[arg-type]
        results[name] = {"temp_gb": program.memory_analysis().temp_size_in_bytes / 1e9}
        if results[name]["temp_gb"] <= args.most:
            wall, cpu, out[name] = seconds(program, arrays, args.repeats)
            results[name] |= {"seconds": wall, "cpu_seconds": cpu}
    if len(out) == 2:
        results["difference"] = difference(out["tiles"], out["ragged"])
    return results


def memory(case: Case, target: str) -> dict[str, Any]:
    """Temporaries of both sides for a device that need not be there."""
    device = parse(target)
    here = NamedSharding(Mesh(np.array(abstract_devices(device)[:1]), ("x",)), PartitionSpec())
    *real, ids = case.shapes
    arrays = (*(jax.ShapeDtypeStruct(s, jnp.dtype(case.dtype), sharding=here) for s in real),
              jax.ShapeDtypeStruct(ids, jnp.int32, sharding=here))
    sides: dict[str, Platform] = {"tiles": PLATFORMS[device.platform], "ragged": "tpu"}
    return {name: {"temp_gb": compiled(case, way, arrays).memory_analysis().temp_size_in_bytes / 1e9}
            for name, way in sides.items()}


def line(case: Case, results: dict[str, Any]) -> str:
    """A row of the table: tiles, ragged_dot, tiles / ragged_dot."""
    a, b = results["tiles"], results["ragged"]
    cell = lambda x: f"{x:.3g}" if x is not None else "not run"
    times = [cell(s.get("cpu_seconds")) for s in (a, b)]
    ratio = cell(a["cpu_seconds"] / b["cpu_seconds"]) if "cpu_seconds" in a and "cpu_seconds" in b else "-"
    speed = cell(case.useful / 1e9 / a["cpu_seconds"]) if "cpu_seconds" in a else "-"
    said = f"{results['difference']:.0e}" if "difference" in results else "-"
    what = (f"{case.tokens:,} | {case.experts}{f' of {case.experts * case.owners}' if case.owners > 1 else ''}, "
            f"top-{case.top_k} | {case.width}, {case.inner}")
    return (f"| {what} | {case.dtype} | {times[0]} | {times[1]} | {ratio} | {speed} | {1e3 * a['temp_gb']:,.1f} | "
            f"{1e3 * b['temp_gb']:,.1f} | {a['temp_gb'] / b['temp_gb']:.3g} | {said} |")


COLUMNS = ("tokens", "experts", "D, F", "dtype", "tiles, CPU s", "ragged_dot, CPU s", "ratio", "useful GFLOP/s",
           "tiles, MB", "ragged_dot, MB", "ratio", "difference")
HEAD = f"| {' | '.join(COLUMNS)} |\n{'|---' * len(COLUMNS)}|"


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--small", action="store_true")
    p.add_argument("--repeats", type=int, default=2)
    p.add_argument("--most", type=float, default=3.0, help="GB of temporaries beyond which a side is not run")
    p.add_argument("--on", default="", help="compile:h200: memory only, nothing runs")
    p.add_argument("--out", default=None, help="write the result as JSON")
    args = p.parse_args()
    target = args.on.removeprefix("compile:")
    if target and parse(target).platform == "tpu":
        p.error(f"--on {args.on}: on TPUs both sides are ragged_dot; give a GPU, compile:h200")
    machine = target or f"{jax.devices()[0].device_kind}, {platform.machine()}, {os.cpu_count()} cores"
    print(f"jax {jax.__version__} on {machine}; temporaries in MB\n\n{HEAD}", flush=True)
    cases, found = SMALL if args.small else COMPILED if target else CPU, []
    for case in cases:
        results = memory(case, target) if target else run(case, args)
        with compiling_for(PLATFORMS[parse(target).platform] if target else "cpu"):
            rows = rows_of(case.tokens * case.top_k / case.experts / case.owners)
        found.append(asdict(case) | {"rows": rows, "results": results})
        print(line(case, results), flush=True)
    if args.out:
        with open(args.out, "w") as f:
            json.dump({"jax": jax.__version__, "device": machine, "cases": found}, f, indent=1)


if __name__ == "__main__":
    main()
