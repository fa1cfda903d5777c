"""Weak scaling, modelled: what a step sends, read from the program compiled for 8 to 256 devices that are not there.

Each device keeps the same tokens. H200: FSDP within a host of 8, replicas across hosts; TPUs: FSDP over up to 16 of the
slice's devices, replicas over the rest. The time of the computation is FLOPs at an assumed share of the peak, that of
sending the HLO's bytes over the published links (rings; a group that spans hosts uses the network; a group within a
slice uses the links along the torus axes that it spans). Two efficiencies are printed: nothing overlaps, and everything
that can does (the slower of the two counts); a real step lies between. Nothing runs.

    JAX_PLATFORMS=cpu python -m benchmarks.scaling                       # H200 and v5p, 1.5B; needs their compilers
    JAX_PLATFORMS=cpu python -m benchmarks.scaling --devices v6e --counts 8 64 --size 0.5B

Results: benchmarks/results/scaling.md (and .json), in which other devices' rows stay.
"""

import argparse
import datetime
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from benchmarks.shapes import SHAPES, step_recipe
from distill_jax.jobs.compiled import compile_step
from distill_jax.jobs.hardware import Device, Target, parse, within_slice
from distill_jax.recipe import MeshShape
from distill_jax.sharding.hlo import Collective

RESULTS = Path(__file__).parent / "results" / "scaling.json"
ROWS, LENGTH = 4, 4096
"""Rows and tokens of a device."""


@dataclass(frozen=True, kw_only=True)
class Times:
    """Seconds of a step on one device."""

    compute: float
    sending: float

    @property
    def apart(self) -> float:
        """Efficiency when nothing is sent beside the computation."""
        return self.compute / (self.compute + self.sending)

    @property
    def together(self) -> float:
        """Efficiency when all of it is."""
        return self.compute / max(self.compute, self.sending)


def mesh_of(device: Device, count: int) -> MeshShape:
    """FSDP within a host, or within a part of a slice: over a whole one, gradients of some widths are all-reduced."""
    inside = min(count, device.host or 16)
    return MeshShape(data=count // inside, fsdp=inside)


def seconds_of(c: Collective, target: Target) -> float:
    """A collective of as many devices as a host has stays in it; of fewer or more, along `data`, crosses hosts."""
    device = target.device
    if device.host is None:
        return c.sent / within_slice(device, target.count, c.group)
    crosses = target.count > device.host and c.group != device.host
    return c.sent / (device.network if crosses else device.link)


def times_of(target: Target, size: str, remat: str) -> tuple[Times, float]:
    """Compile the step for `target` -> its times, and the GB a device sends."""
    recipe = step_recipe(size, "kd", rows=ROWS * target.count, length=LENGTH, remat=remat,
                         mesh=mesh_of(target.device, target.count))
    compiled = compile_step(recipe, recipe.stages[0], target, {"student": SHAPES[size]})  # type: ignore[arg-type]
    flops = 3 * ROWS * LENGTH * SHAPES[size].flops_per_token(LENGTH)
    sending = sum(seconds_of(c, target) for c in compiled.collectives)
    return Times(compute=flops / (target.device.flops * target.device.mfu), sending=sending), compiled.sent / 1e9


def table(found: dict[str, dict[str, Any]]) -> str:
    lines = [__doc__.split("\n\n")[0], "", " ".join(__doc__.split("\n\n")[1].split()), "",
             "| device | devices | student | mesh | compute, s | sending, s | sent, GB | apart | together |",
             "|---|---|---|---|---|---|---|---|---|"]
    for key in sorted(found, key=lambda k: (k.split()[0], found[k]["size"], found[k]["count"])):
        f = found[key]
        lines.append(f"| {f['device']} | {f['count']} | {f['size']} {f['remat']} | {f['mesh']} | {f['compute']:.3f} | "
                     f"{f['sending']:.3f} | {f['sent']:.1f} | {f['apart']:.1%} | {f['together']:.1%} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--devices", nargs="+", default=["h200", "v5p"])
    parser.add_argument("--counts", nargs="+", type=int, default=[8, 64, 256])
    parser.add_argument("--size", choices=SHAPES, default="1.5B")
    parser.add_argument("--remat", default="dots")
    args = parser.parse_args()
    found = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    for name in args.devices:
        for count in args.counts:
            target = parse(f"{name}:{count}")
            times, sent = times_of(target, args.size, args.remat)
            mesh = mesh_of(target.device, count)
            found[f"{name} {count} {args.size} {args.remat}"] = {
                "device": name, "count": count, "size": args.size, "remat": args.remat, "sent": sent,
                "mesh": f"data {mesh.data} x fsdp {mesh.fsdp}", "compute": times.compute, "sending": times.sending,
                "apart": times.apart, "together": times.together, "jax": jax.__version__,
                "date": datetime.date.today().isoformat()}
            RESULTS.write_text(json.dumps(found, indent=1))
            RESULTS.with_suffix(".md").write_text("# " + table(found))
            new = {k: v for k, v in found.items() if v["device"] == name and v["count"] == count}
            print(table(new).splitlines()[-1], flush=True)


if __name__ == "__main__":
    main()
