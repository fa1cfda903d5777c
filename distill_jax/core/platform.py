"""The platform a program is traced for: where the forms of a computation differ, the trace picks one."""

import contextlib
import contextvars
from collections.abc import Iterator
from typing import Literal

import jax

Platform = Literal["cpu", "gpu", "tpu"]
_target: contextvars.ContextVar[Platform | None] = contextvars.ContextVar("platform", default=None)


def platform() -> Platform:
    """"cpu", "gpu" or "tpu": that of `compiling_for`, else that of this process's devices."""
    there = _target.get() or jax.default_backend()
    return there if there in ("cpu", "tpu") else "gpu"  # type: ignore[return-value]


@contextlib.contextmanager
def compiling_for(target: Platform) -> Iterator[None]:
    """Programs traced inside the block are for devices of another kind, that need not be there."""
    token = _target.set(target)
    try:
        yield
    finally:
        _target.reset(token)
