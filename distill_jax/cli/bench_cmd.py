"""`distill-jax bench`."""

from typing import Annotated

import typer

NAMES = ("loss", "store", "rollout", "train", "peers", "planner", "scaling", "experts")


def bench(
    name: Annotated[str, typer.Argument(help=f"one of {', '.join(NAMES)}")],
    args: Annotated[list[str] | None, typer.Argument(help="options of the benchmark, after --")] = None,
) -> None:
    """Run a benchmark of the checkout (`python -m benchmarks.NAME`)."""
    import importlib.util
    import subprocess
    import sys

    if name not in NAMES:
        raise ValueError(f"no benchmark {name!r}; there are {', '.join(NAMES)}")
    sys.path.insert(0, "")
    if importlib.util.find_spec("benchmarks") is None:
        raise ValueError("the installed package has no benchmarks; run this in a checkout of the repository")
    command = [sys.executable, "-m", f"benchmarks.{name}", *(args or [])]
    raise SystemExit(subprocess.run(command, check=False).returncode)
