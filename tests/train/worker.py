"""One process of a training run: `python -m tests.train.worker FOLDER STEPS --process 0 --processes 2 --devices 4`.

Trains the tiny model on synthetic batches, read ahead by Grain, over a mesh of all devices. SLOW=seconds
stretches each batch, so that a test can send signals in the middle; HANG=step is one that process 1 never makes.
"""

import argparse
import os
import time
from pathlib import Path


def main() -> None:
    p = argparse.ArgumentParser()
    p.add_argument("folder", type=Path)
    p.add_argument("steps", type=int)
    p.add_argument("--process", type=int, default=0)
    p.add_argument("--processes", type=int, default=1)
    p.add_argument("--devices", type=int, default=1)
    p.add_argument("--port", type=int, default=0)
    p.add_argument("--save-every", type=int, default=5)
    p.add_argument("--mesh", default="", help="data=-1,fsdp=2 where there are several devices")
    p.add_argument("--cache", default="")
    args = p.parse_args()
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["XLA_FLAGS"] = (f"--xla_force_host_platform_device_count={args.devices} "
                               "--xla_backend_optimization_level=0")
    import jax

    if args.cache:
        jax.config.update("jax_compilation_cache_dir", args.cache)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    from distill_jax.jobs.processes import NAMES, joined

    start = dict(zip(NAMES, (f"localhost:{args.port}", str(args.processes), str(args.process))))
    with joined(start if args.processes > 1 else {}):
        train(args)


def train(args: argparse.Namespace) -> None:
    import jax

    from distill_jax.data.serve import Served
    from distill_jax.sharding import make_mesh
    from distill_jax.train.loop import Run, fit
    from tests.train.tiny import CE, Synthetic, setup

    class Slow(Synthetic):
        def batch(self, step):
            time.sleep(float(os.environ.get("SLOW", "0")))
            if str(step) == os.environ.get("HANG") and jax.process_index() == 1:
                time.sleep(1000)
            return super().batch(step)

    def serve(source, start, share, shares):
        rows = lambda step, rows: jax.tree.map(lambda x: x[rows], source.batch(step))
        return Served(rows, source.batch_size, start, share, shares)

    mesh = args.mesh or f"data=-1,fsdp={2 if jax.device_count() > 1 else 1}"
    sizes = dict(item.split("=") for item in mesh.split(","))
    config, state = setup(CE, make_mesh(**{axis: int(size) for axis, size in sizes.items()}), total=20)
    run = Run(folder=args.folder, steps=args.steps, log_every=1, save_every=args.save_every)
    fit(config, state, Slow(), run, serve=serve)


if __name__ == "__main__":
    main()
