"""Parts of a job as the tasks of a Ray Data job: `--ray ADDRESS --parts N`.

Every task works off one static partition (`parts.Part`) as `--part I/N` does. Ray Data starts the tasks of a lost node
or process again elsewhere, as often as it takes, and a part goes on after its last committed shard. So the store must
be on a file system that all nodes share, or in an object store, and this package must be installed on them.
"""

import dataclasses
import json
import logging
import os
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from distill_jax.jobs.devices import parse_mesh
from distill_jax.jobs.generate import GenerateJob, generate
from distill_jax.jobs.ops import OpsJob, run_ops
from distill_jax.jobs.parts import Part, join
from distill_jax.jobs.progress import Ticker
from distill_jax.jobs.score import ScoreJob, earlier, score
from distill_jax.jobs.store_parts import join_rows
from distill_jax.rollout.scoring import SignalSpec
from distill_jax.traces.store import Raced, TraceStore

Work = Callable[[Part], dict[str, Any]]
"""Does a part and returns its report. A module-level function, or a `functools.partial` of one and frozen dataclasses:
it travels to the nodes."""

RACES = 12
"""How often a part begins again because a writer that was given up for lost still wrote, and seconds between."""
PAUSE = 5.0


@dataclass(frozen=True, kw_only=True)
class RayCluster:
    """address: `local` (started here, for this job), `auto` (the one this machine belongs to), HOST:PORT or ray://...
    parts: how many tasks. needs: what one task occupies, {"cpu": 1, "gpu": 1, "other resource": 1}."""

    address: str
    parts: int
    needs: dict[str, float] = field(default_factory=lambda: {"cpu": 1.0})

    @classmethod
    def parse(cls, address: str, parts: int, needs: str = "cpu=1", part: str = "") -> "RayCluster | None":
        """Of `--ray`, `--parts`, `--ray-needs cpu=4,gpu=1`, `--part`. None without an address."""
        if address and part:
            raise ValueError(f"--part {part} with --ray {address}: Ray runs all the parts; give one or the other")
        if not address:
            if parts:
                raise ValueError(f"--parts {parts}: is how many tasks --ray ADDRESS starts; one part is --part I/N")
            return None
        if parts < 1:
            raise ValueError(f"--ray {address}: say with --parts N into how many parts the job is cut, some for each "
                             f"worker; got {parts}")
        try:
            amounts = {k.strip().lower(): float(v) for k, v in (item.split("=") for item in needs.split(","))}
        except ValueError:
            raise ValueError(f"--ray-needs {needs}: expected amounts as cpu=4,gpu=1") from None
        return cls(address=address, parts=parts, needs=amounts)

    def options(self) -> dict[str, Any]:
        """As Ray names them."""
        own = {f"num_{k}s": v for k, v in self.needs.items() if k in ("cpu", "gpu")}
        other = {k.upper() if k == "tpu" else k: v for k, v in self.needs.items() if k not in ("cpu", "gpu")}
        return {"num_cpus": 1, **own, **({"resources": other} if other else {})}


def run_parts(work: Work, cluster: RayCluster, name: str) -> list[dict[str, Any]]:
    """The reports of all parts, in order. Raises ValueError for the first part that fails: the same call goes on."""
    ray = _ray()
    with Ticker(name, cluster.parts) as ticker:
        _connect(ray, cluster)
        try:
            task = _Task(work, cluster.parts, os.getcwd())
            rows = ray.data.range(cluster.parts, override_num_blocks=cluster.parts).map_batches(
                task, batch_size=1, **cluster.options())
            reports: dict[int, dict[str, Any]] = {}
            for row in rows.iter_rows():
                if row["error"]:
                    raise ValueError(f"part {row['part']}/{cluster.parts}: {row['error']}")
                reports[int(row["part"])] = json.loads(row["report"])
                ticker.at(len(reports), "parts are whole")
            return [reports[i] for i in sorted(reports)]
        finally:
            ray.shutdown()


def part_of(run: Callable[..., dict[str, Any]], job: Any, mesh: str | None, part: Part) -> dict[str, Any]:
    """What `run` says of one part of `job`; `mesh` as on the command line, None for jobs that take none."""
    options = {} if mesh is None else {"mesh": parse_mesh(mesh)}
    return run(dataclasses.replace(job, part=part), **options)


def score_on_ray(job: ScoreJob, cluster: RayCluster, mesh: str = "") -> dict[str, Any]:
    """`score` in parts, joined. Returns its report."""
    begun = time.monotonic()
    reports = run_parts(partial(part_of, score, job, mesh), cluster, "score")
    store, name = TraceStore.open(job.store), job.signal_name
    join(store, name)
    seconds, tokens = time.monotonic() - begun, sum(r["tokens_read"] for r in reports)
    return {"signal": name, "kind": str(SignalSpec.parse(job.signal)),
            "attached": store.signal(name).header.params["attached"], **earlier(store, name, len(store)).report(),
            "tokens_read": tokens, "seconds": round(seconds, 2), "tokens_per_second": round(tokens / seconds, 1)}


def generate_on_ray(job: GenerateJob, cluster: RayCluster, mesh: str = "") -> dict[str, Any]:
    """`generate` in parts, joined. Returns its summary."""
    run_parts(partial(part_of, generate, job, mesh), cluster, "generate")
    return join_rows(job.out)


def ops_on_ray(job: OpsJob, cluster: RayCluster) -> dict[str, Any]:
    """`run_ops` in parts, joined. Returns its summary."""
    dataclasses.replace(job, part=Part(index=0, count=cluster.parts))  # refuses what cannot run in parts
    run_parts(partial(part_of, run_ops, job, None), cluster, "ops")
    return join_rows(job.out)


class _Task:
    """One part, on whatever node. What a user can mend comes back as text: Ray would wrap it in tracebacks."""

    def __init__(self, work: Work, count: int, folder: str) -> None:
        self.work, self.count, self.folder = work, count, folder

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        part = Part(index=int(batch["id"][0]), count=self.count)
        if Path(self.folder).is_dir():
            os.chdir(self.folder)  # relative paths mean what they mean to the caller
        try:
            report, error = self._patiently(part), ""
        except (ValueError, OSError, ImportError) as e:
            report, error = {}, str(e)
        return {"part": [part.index], "report": [json.dumps(report)], "error": [error]}

    def _patiently(self, part: Part) -> dict[str, Any]:
        for _ in range(RACES):
            try:
                return self.work(part)
            except Raced:
                time.sleep(PAUSE)
        return self.work(part)


def _ray() -> Any:
    try:
        import ray
        import ray.data
    except ImportError as e:
        raise ValueError(f"--ray needs Ray Data ({e}): pip install 'distill_jax[ray]'") from None
    return ray


def _connect(ray: Any, cluster: RayCluster) -> None:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        _reach(cluster.address)
        ray.init(address=cluster.address, log_to_driver=False, logging_level="warning")
    except (OSError, ValueError, RuntimeError) as e:
        raise ValueError(f"--ray {cluster.address}: no cluster there ({str(e).splitlines()[0]}); `ray start --head` "
                         "begins one, --ray local uses this machine alone") from None
    ray.data.DataContext.get_current().enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.WARNING)


def _reach(address: str) -> None:
    """Raises OSError where nobody listens: Ray itself would wait for minutes, and then end the process."""
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if colon and port.isdigit():
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
