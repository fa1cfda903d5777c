"""Options of jobs that run in parts: `score`, `generate`, `ops`."""

from typing import Annotated

import typer

Opt = typer.Option

PartOption = Annotated[str, Opt(
    "--part", help="part I of N (0/16 to 15/16); auto: the task of a SLURM array, auto/16: or JOB_COMPLETION_INDEX. "
                   "`store join` puts the parts together")]
RayOption = Annotated[str, Opt(
    "--ray", help="run all parts on a Ray cluster and join them: local (this machine), auto, HOST:PORT or ray://...")]
PartsOption = Annotated[int, Opt("--parts", help="with --ray: number of parts, some for each worker")]
RayNeedsOption = Annotated[str, Opt("--ray-needs", help="with --ray: what a part occupies, e.g. cpu=4,gpu=1")]
