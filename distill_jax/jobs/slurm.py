"""What SLURM says of a job step: where its first task runs, which GPUs are this task's."""

import re
from collections.abc import Mapping

FIRST_PORT, PORTS = 61440, 4096
"""Ports of coordinators: above those that Linux gives to outgoing connections."""


def first_host(hosts: str) -> str:
    """The first name of a host list: `node[003-007,9],other` -> `node003`, `rack[1-2]n[01-04]` -> `rack1n01`."""
    first = re.match(r"(?:\[[^\]]*\]|[^,\[])*", hosts)
    assert first is not None
    return re.sub(r"\[([^\],-]*)[^\]]*\]", r"\1", first.group(0))


def port(job: int, step: int = 0) -> int:
    """The same on every task; steps of a job that run side by side have their own."""
    return FIRST_PORT + (job + 2 * step) % PORTS // 2 * 2


def tasks_on(node: int, tasks: str) -> int:
    """Tasks on node number `node` by a list such as `4(x3),2`. 1 where it does not say."""
    counts = [int(n) for count, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", tasks)
              for n in [count] * int(times or 1)]
    return counts[node] if 0 <= node < len(counts) else 1


def local_devices(environ: Mapping[str, str]) -> list[int] | None:
    """Numbers of the GPUs that this task uses, None for all that it sees. Only where it sees those of the other tasks
    of its node too (no --gpus-per-task) they are shared out. Raises ValueError where that does not come out even."""
    tasks = tasks_on(int(environ.get("SLURM_NODEID", "0")),
                     environ.get("SLURM_STEP_TASKS_PER_NODE") or environ.get("SLURM_TASKS_PER_NODE", "1"))
    visible = [v for v in environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if v]
    given = int(environ.get("SLURM_GPUS_ON_NODE") or tasks)
    if tasks < 2 or len(visible) < 2 or len(visible) != given:
        return None
    if len(visible) % tasks:
        raise ValueError(f"{len(visible)} GPUs do not divide over the {tasks} tasks of this node; start as many tasks "
                         "as GPUs, or give each its own with --gpus-per-task")
    share, task = len(visible) // tasks, int(environ["SLURM_LOCALID"])
    return list(range(task * share, (task + 1) * share))
