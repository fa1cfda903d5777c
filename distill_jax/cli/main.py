"""`distill-jax`: one command, one file of this folder per subcommand.

A command module has `app: typer.Typer` or a function registered here. Errors a user can cause (`ValueError`,
`FileNotFoundError`, ...) end as one line on stderr and exit code 2; `--debug` (or DISTILL_JAX_DEBUG=1) shows the
traceback.
"""

import importlib
import os
import sys

import typer

COMMANDS: dict[str, str] = {
    "import": "distill_jax.cli.import_cmd:import_",
    "generate": "distill_jax.cli.generate_cmd:generate",
    "score": "distill_jax.cli.score_cmd:score",
    "batch": "distill_jax.cli.batch_cmd:batch",
    "doctor": "distill_jax.cli.doctor_cmd:doctor",
    "train": "distill_jax.cli.train_cmd:train",
    "eval": "distill_jax.cli.eval_cmd:evaluate",
    "plan": "distill_jax.cli.plan_cmd:plan",
    "store": "distill_jax.cli.store_cmd:app",
    "export": "distill_jax.cli.export_cmd:export",
    "verify-hf": "distill_jax.cli.export_cmd:verify_hf",
    "world": "distill_jax.cli.world_cmd:world",
}
"""name -> `module:function`; modules are imported only when their command runs, so `--help` stays fast."""


def build_app(names: list[str] | None = None) -> typer.Typer:
    app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False,
                      help="Distil reasoning traces into small JAX students.")

    @app.callback()
    def root() -> None: ...

    for name in names or COMMANDS:
        module, attr = COMMANDS[name].split(":")
        target = getattr(importlib.import_module(module), attr)
        if isinstance(target, typer.Typer):
            app.add_typer(target, name=name)
        else:
            app.command(name)(target)
    return app


def main(argv: list[str] | None = None) -> None:
    args = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in args or bool(os.environ.get("DISTILL_JAX_DEBUG"))
    args = [a for a in args if a != "--debug"]
    wanted = [args[0]] if args and args[0] in COMMANDS else None
    try:
        build_app(wanted)(args=args, prog_name="distill-jax")
    except (ValueError, OSError, ImportError) as e:
        if debug:
            raise
        print(f"error: {e}", file=sys.stderr)
        sys.exit(2)
