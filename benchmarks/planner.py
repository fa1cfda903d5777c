"""The planner's memory against the compiler's, for whole training steps compiled without weights or devices.

Needs the compilers of the targets in one environment (`jax[tpu]`; `pip install --no-deps jax-cuda13-plugin
jax-cuda13-pjrt` of jax's version). A GPU target takes seconds a case, a TPU target minutes; nothing runs.

    JAX_PLATFORMS=cpu python -m benchmarks.planner                # all cases, and benchmarks/results/planner.{json,md}
    JAX_PLATFORMS=cpu python -m benchmarks.planner --only h200    # the cases of one target; the others stay as they are
    python -m benchmarks.planner --table                          # what is in planner.json, formulas as they are now
"""

import argparse
import datetime
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from benchmarks.shapes import SHAPES, step_recipe
from distill_jax.jobs.compiled import Compiled, compile_step
from distill_jax.jobs.hardware import parse
from distill_jax.jobs.plan import StagePlan, plan_stage
from distill_jax.recipe import MeshShape, Recipe, Stage

RESULTS = Path(__file__).parent / "results" / "planner.json"


@dataclass(frozen=True, kw_only=True)
class Case:
    """A step on a target. rows: of the whole batch; tensor, data, context, expert: sizes of these mesh axes, fsdp has
    the rest."""

    on: str
    size: str
    loss: str = "kd"
    rows: int
    length: int = 4096
    remat: str = "dots"
    micro_batches: int = 1
    tensor: int = 1
    data: int = 1
    context: int = 1
    expert: int = 1

    @property
    def mesh(self) -> dict[str, int]:
        return {n: v for n in ("tensor", "data", "context", "expert") if (v := getattr(self, n)) > 1}

    @property
    def key(self) -> str:
        cut = "".join(f" {n} {v}" for n, v in self.mesh.items())
        return (f"{self.on} {self.size} {self.loss} {self.rows}x{self.length} {self.remat} "
                f"micro {self.micro_batches}{cut}")

    @property
    def recipe(self) -> Recipe:
        return step_recipe(self.size, self.loss, rows=self.rows, length=self.length, remat=self.remat,
                           micro_batches=self.micro_batches, mesh=MeshShape(**self.mesh))

    @property
    def stage(self) -> Stage:
        return self.recipe.stages[0]  # type: ignore[return-value]


CASES = (
    Case(on="h200", size="0.5B", rows=8),
    Case(on="h200", size="0.5B", loss="ce", rows=8),
    Case(on="h200", size="0.5B", rows=8, remat="none"),
    Case(on="h200", size="0.5B", rows=2, length=16384, remat="full"),
    Case(on="h200", size="1.5B", rows=8),
    Case(on="h200", size="1.5B", loss="ce", rows=8),
    Case(on="h200", size="1.5B", rows=8, remat="full"),
    Case(on="h200", size="1.5B", rows=8, micro_batches=4),
    Case(on="h200", size="7B", rows=2, remat="full"),
    Case(on="h200", size="7B", loss="ce", rows=2, remat="full"),
    Case(on="h200:8", size="1.5B", rows=64, micro_batches=2),
    Case(on="h200:8", size="7B", rows=32, remat="full"),
    Case(on="h200:8", size="7B", rows=16, tensor=2),
    Case(on="h200:8", size="1.5B", rows=8, length=32768, remat="full", context=4),
    Case(on="h200:8", size="0.5B", rows=2, length=131072, remat="full", context=8),
    Case(on="h200:8", size="moe", rows=16, remat="full", expert=8),
    Case(on="h200:8", size="moe", rows=16, remat="full", expert=2),
    Case(on="h200:8", size="moe", rows=32, remat="dots", expert=4),
    Case(on="h200:8", size="moe", rows=32, remat="none", expert=8),
    Case(on="v6e:4", size="0.5B", rows=8, remat="full"),
    Case(on="v6e:4", size="0.5B", rows=8, micro_batches=2),
    Case(on="v6e:8", size="1.5B", rows=16, remat="full"),
    Case(on="v6e:16", size="7B", rows=32, remat="full"),
    Case(on="v5p:4x4x4", size="7B", rows=128, remat="full"),  # FSDP over the whole slice
    Case(on="v5p:4x4x4", size="7B", rows=128, remat="full", data=4),
    Case(on="v5p:8x8x16", size="7B", rows=2048, remat="full", data=16),
    Case(on="v5p:8x8x16", size="7B", rows=2048, remat="full", data=64),
)


def compiled(case: Case) -> dict[str, Any]:
    """The compiler's numbers of a case, as they are kept in planner.json."""
    began = time.perf_counter()
    c: Compiled = compile_step(case.recipe, case.stage, parse(case.on), {"student": SHAPES[case.size]})
    kinds: dict[str, list[float]] = {}
    for one in c.collectives:
        kinds[one.kind] = [kinds.get(one.kind, [0, 0])[0] + one.trips, kinds.get(one.kind, [0, 0])[1] + one.sent]
    return {"hbm": dict(c.hbm), "sent": c.sent, "collectives": kinds, "seconds": round(time.perf_counter() - began),
            "jax": jax.__version__, "date": datetime.date.today().isoformat()}


def planned(case: Case) -> StagePlan:
    """The planner's numbers of a case."""
    target = parse(case.on)
    return plan_stage(case.recipe, case.stage, target.device, target.count)


def error(case: Case, found: dict[str, Any]) -> float:
    """planner / compiler - 1."""
    return planned(case).total_memory / sum(found["hbm"].values()) - 1


def table(found: dict[str, dict[str, Any]]) -> str:
    """Markdown of all cases that were compiled."""
    lines = ["# The planner's memory against the compiler's", "",
             "Whole training steps (AdamW, float32 masters, bfloat16 compute, top-64 KD or cross-entropy, V = 152k), "
             "compiled for the target, without a device, by `python -m benchmarks.planner`. GB of one device, peak. "
             "Nothing ran: tokens/s are modelled (FLOPs at an assumed MFU, links at their published speed). Sent: by "
             "one device in one step, from the HLO.", "",
             "| step | planner | compiler | | of it temporary | sent | tokens/s, modelled |",
             "|---|---|---|---|---|---|---|"]
    errors = []
    for case in CASES:
        if (one := found.get(case.key)) is None:
            continue
        p, hbm = planned(case), one["hbm"]
        errors.append(error(case, one))
        lines.append(f"| {case.key} | {p.total_memory / 1e9:.2f} | {sum(hbm.values()) / 1e9:.2f} | {errors[-1]:+.1%} | "
                     f"{hbm['temporary'] / 1e9:.2f} | {one['sent'] / 1e9:.2f} | {p.tokens_per_second:,.0f} |")
    lines += ["", f"{len(errors)} cases; largest error {max(map(abs, errors)):.1%}; "
              f"within 10%: {sum(abs(e) <= 0.1 for e in errors)}.", "", *ratios(found), ""]
    return "\n".join(lines)


def ratios(found: dict[str, dict[str, Any]]) -> list[str]:
    """Memory of a KD step over that of the same step with cross-entropy."""
    out = ["| KD step / cross-entropy step | peak memory, compiled |", "|---|---|"]
    for case in CASES:
        other = case.key.replace(" kd ", " ce ")
        if case.loss == "kd" and case.key in found and other in found:
            kd, ce = (sum(found[k]["hbm"].values()) for k in (case.key, other))
            out.append(f"| {case.key} | {kd / ce:.4f} |")
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="cases whose key begins so")
    parser.add_argument("--missing", action="store_true", help="only cases that planner.json has not")
    parser.add_argument("--table", action="store_true", help="compile nothing")
    args = parser.parse_args()
    found = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    for case in () if args.table else CASES:
        if case.key.startswith(args.only) and not (args.missing and case.key in found):
            found[case.key] = compiled(case)
            print(f"{case.key}: {error(case, found[case.key]):+.1%}", flush=True)
            RESULTS.write_text(json.dumps(found, indent=1) + "\n")
    text = table(found)
    RESULTS.with_suffix(".md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
