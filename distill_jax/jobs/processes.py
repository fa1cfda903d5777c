"""Several processes working on one run: who they are, how they meet, how they end.

The first of these that is there says it: `DISTILL_JAX_COORDINATOR=host:port DISTILL_JAX_PROCESSES=2
DISTILL_JAX_PROCESS=0` (or the options of `distill-jax train`; launch/local.sh and the manifests set them), SLURM with
several tasks, `DISTILL_JAX_DISTRIBUTED=auto` (Cloud TPU: JAX finds the others). They meet at the coordinator's port,
where process 0 listens as long as the run lasts (`train.peers`); JAX's own service takes the next free port.
"""

import atexit
import contextlib
import ctypes
import math
import os
import random
import signal
import socket
import sys
import time
import traceback
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from distill_jax.jobs import slurm
from distill_jax.train import peers
from distill_jax.train.hub import GRACE
from distill_jax.train.peers import RESTART, Absent

NAMES = ("DISTILL_JAX_COORDINATOR", "DISTILL_JAX_PROCESSES", "DISTILL_JAX_PROCESS")
OURS = ("RESOURCE_EXHAUSTED", "INVALID_ARGUMENT", "UNIMPLEMENTED", "NOT_FOUND")
"""Beginnings of XLA's errors for which no other process is to blame."""


@dataclass(frozen=True, kw_only=True)
class Start:
    """`host:port` where process 0 of `processes` listens, the number of this one, and its GPUs (None: all it sees)."""

    host: str
    port: int
    processes: int
    process: int
    devices: list[int] | None = None


def index() -> int:
    """Number of this process within the run; 0 where it is alone. Process 0 writes the files that all share."""
    return peers.current().process


def start_of(environ: Mapping[str, str]) -> Start | None:
    """What the environment says; None where this process is alone, or JAX must find out. Raises ValueError."""
    given = {name: environ[name] for name in NAMES if environ.get(name)}
    if given:
        return _explicit(given)
    if int(environ.get("SLURM_NTASKS", "1")) < 2 or environ.get("DISTILL_JAX_DISTRIBUTED"):
        return None
    nodes = environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_JOB_NODELIST", "")
    if "SLURM_PROCID" not in environ or not nodes:
        raise ValueError(f"SLURM_NTASKS={environ['SLURM_NTASKS']}, but no SLURM_PROCID and node list: start the tasks "
                         "with srun, or set SLURM_NTASKS=1 to run alone")
    step = environ.get("SLURM_STEP_ID", "0")
    return Start(host=slurm.first_host(nodes), processes=int(environ["SLURM_NTASKS"]),
                 port=slurm.port(int(environ.get("SLURM_JOB_ID", "0")), int(step) if step.isdigit() else 0),
                 process=int(environ["SLURM_PROCID"]), devices=slurm.local_devices(environ))


def _explicit(given: Mapping[str, str]) -> Start:
    if missing := [name for name in NAMES if name not in given]:
        raise ValueError(f"{', '.join(given)} without {', '.join(missing)}: a run of several processes needs all three")
    host, _, port = given[NAMES[0]].rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise ValueError(f"{NAMES[0]}={given[NAMES[0]]!r}: expected host:port of process 0, e.g. node1:8476")
    if not all(given[name].isdigit() for name in NAMES[1:]):
        raise ValueError(f"{NAMES[1]}={given[NAMES[1]]!r}, {NAMES[2]}={given[NAMES[2]]!r}: expected two whole numbers")
    processes, process = int(given[NAMES[1]]), int(given[NAMES[2]])
    if process >= processes:
        raise ValueError(f"{NAMES[2]}={process} with {NAMES[1]}={processes}: processes are numbered from 0 to "
                         f"{processes - 1}")
    return Start(host=host.strip("[]"), port=int(port), processes=processes, process=process)


def join(environ: Mapping[str, str] = os.environ) -> None:
    """Meet the other processes, if there are any. Call before anything touches a device.

    Raises ValueError for what has to be changed, Absent where a process did not come within DISTILL_JAX_START_SECONDS.
    """
    limit = peers.seconds_of("DISTILL_JAX_START_SECONDS", 300)
    heartbeat = peers.seconds_of("DISTILL_JAX_HEARTBEAT_SECONDS", 60)
    start = start_of(environ)
    if start is None:
        if (how := environ.get("DISTILL_JAX_DISTRIBUTED")) and how != "auto":
            raise ValueError(f"DISTILL_JAX_DISTRIBUTED={how!r}: the only value is auto")
        return _auto(limit, heartbeat) if how else None
    if start.processes == 1:
        return None
    free = lambda: {"jax": _next_port(start.port)}
    ours, offer = peers.call_roll(start.host, start.port, start.process, start.processes, start_seconds=limit,
                                  heartbeat=heartbeat, offer=free)
    peers.become(ours)
    host = "localhost" if start.process == 0 else start.host
    _initialize(limit, heartbeat, coordinator_address=f"[{host}]:{offer['jax']}" if ":" in host else
                f"{host}:{offer['jax']}", num_processes=start.processes, process_id=start.process,
                local_device_ids=start.devices, cluster_detection_method="deactivate")


def _initialize(limit: float, heartbeat: float, **kwargs: Any) -> None:
    """Start JAX's service. It would wait longer than we do: who is gone is said by us."""
    import jax

    _delay_abort()
    jax.config.update("jax_enable_preemption_service", False)  # takes SIGTERM for itself; `train.votes` handles it
    patience = int(max(100, 3 * heartbeat))
    jax.distributed.initialize(**kwargs, initialization_timeout=max(1, int(limit)), shutdown_timeout_seconds=patience,
                               heartbeat_timeout_seconds=patience)
    jax.devices()  # found by all together; later one process may work while the others wait


def _delay_abort() -> None:
    """When process 0 is gone, JAX's service aborts this process, and the exit code would be whose thread is first. So
    an abort sleeps before it ends the process: `sleep(6)` as the handler of SIGABRT, which is signal 6. (A callback in
    its place cannot be given: jaxlib 0.10 and 0.11 fail to convert its argument.)
    """
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None)
        libc.signal.argtypes = [ctypes.c_int, ctypes.c_void_p]
        libc.signal(signal.SIGABRT, ctypes.cast(libc.sleep, ctypes.c_void_p))


def _auto(limit: float, heartbeat: float) -> None:
    """JAX finds the processes; they then meet at a port that process 0 says through JAX's service."""
    try:
        _initialize(limit, heartbeat)
    except (RuntimeError, ValueError) as e:
        raise ValueError(f"DISTILL_JAX_DISTRIBUTED=auto: JAX could not find the processes of this run "
                         f"({str(e).splitlines()[0][:200]}); give {', '.join(NAMES)} instead") from e
    import jax
    from jax._src.distributed import global_state

    if jax.process_count() == 1:
        return
    client, process, listener = global_state.client, jax.process_index(), None
    assert client is not None
    if process == 0:
        listener = peers.listen(0)
        address = _address_towards(str(global_state.coordinator_address).rpartition(":")[0].strip("[]"))
        client.key_value_set("distill_jax/peers", f"{address} {listener.getsockname()[1]}")
    host, port = client.blocking_key_value_get("distill_jax/peers", int(1000 * limit)).split()
    ours, _ = peers.call_roll(host, int(port), process, jax.process_count(), start_seconds=limit, heartbeat=heartbeat,
                              listener=listener)
    peers.become(ours)


def _address_towards(host: str) -> str:
    """The address under which others reach this host when they reach it as `host`."""
    family, _, _, _, there = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, socket.SOCK_DGRAM) as s:
        s.connect(there)
        return s.getsockname()[0]


def _next_port(port: int) -> int:
    """The port after `port` where it is free, else another one. Not of the range that outgoing connections take theirs
    from (32768 and up): one of them could have it before JAX listens there."""
    others = random.sample(range(15000, 32000), 50)
    for wanted in (port + 1, *others) if port + 1 < 32768 else others:
        with contextlib.suppress(OSError, OverflowError), socket.socket() as s:
            s.bind(("", wanted))
            return s.getsockname()[1]
    raise ValueError("no free port for JAX's service on the host of process 0")


@contextlib.contextmanager
def joined(environ: Mapping[str, str] = os.environ) -> Iterator[None]:
    """Inside the block this process is one of the run's. However it ends, no other process waits for it in vain: after
    an error they are told and end with RESTART, and this one does not wait for them."""
    try:
        join(environ)
        yield
        peers.current().barrier("the end of the run", seconds=math.inf)
        peers.current().leave()
    except BaseException as e:
        if peers.current() is peers.ALONE:
            if not isinstance(e, Absent):
                raise
            print(f"error: {e}", file=sys.stderr)
            raise SystemExit(RESTART) from None
        _leave_after(e)
        raise


def _leave_after(error: BaseException) -> None:
    """Decide how this process ends after an error, and see that it ends."""
    text = (str(error).splitlines() or [""])[0][:300]
    if isinstance(error, Absent) or (_of_xla(error) and not text.startswith(OURS)):
        time.sleep(GRACE)  # most often another process is gone: then the peers' thread says which, and ends this one
        if not isinstance(error, Absent):
            traceback.print_exception(error)
        peers.current().leave(RESTART, text)
        peers.end_for_restart(text)
    code = 2 if isinstance(error, ValueError | OSError | ImportError) else 1
    if isinstance(error, KeyboardInterrupt):
        code = 130
    if isinstance(error, SystemExit):
        code = error.code if isinstance(error.code, int) else 1
    peers.current().leave(code, f"{type(error).__name__}: {text}")
    atexit.register(_end, code)  # runs before JAX's, which would wait for the others


def _of_xla(error: BaseException) -> bool:
    import jax

    return isinstance(error, jax.errors.JaxRuntimeError)


def _end(code: int) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
