"""Several processes working on one run. They are told of each other by the environment, whoever starts them.

`DISTILL_JAX_COORDINATOR=host:port DISTILL_JAX_PROCESSES=2 DISTILL_JAX_PROCESS=0 distill-jax train ...` (launch/local.sh
does that); under SLURM with several tasks nothing has to be set.
"""

import os


def index() -> int:
    """Number of this process within the run; 0 where it is alone. Process 0 writes the files that all share."""
    return int(os.environ.get("DISTILL_JAX_PROCESS") or os.environ.get("SLURM_PROCID") or 0)


def join() -> None:
    """Connect to the other processes, if there are any. Call before anything touches a device.

    Raises ValueError where the environment names some of the three variables only.
    """
    names = ("DISTILL_JAX_COORDINATOR", "DISTILL_JAX_PROCESSES", "DISTILL_JAX_PROCESS")
    given = {name: os.environ[name] for name in names if os.environ.get(name)}
    if not given and int(os.environ.get("SLURM_NTASKS", "1")) < 2:
        return
    import jax

    if not given:
        jax.distributed.initialize()
        return
    if missing := [name for name in names if name not in given]:
        raise ValueError(f"{', '.join(given)} without {', '.join(missing)}: a run of several processes needs all three")
    coordinator, count, number = (given[name] for name in names)
    jax.distributed.initialize(coordinator, int(count), int(number))
