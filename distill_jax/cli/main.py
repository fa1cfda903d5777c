"""`distill-jax`: one command, one file of this folder per subcommand.

A command module has `app: typer.Typer` or a function registered here. Errors a user can cause (`ValueError`,
`FileNotFoundError`, wrong options, ...) end as one line on stderr and exit code 2; `--debug` (or DISTILL_JAX_DEBUG=1)
shows the traceback.
"""

import difflib
import errno
import importlib
import os
import sys
from typing import Annotated

import typer

os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # torch is not missing: nothing here needs it

UsageError: type[typer.BadParameter] = typer.BadParameter.__base__  # type: ignore[assignment]
"""Every complaint of the parser. typer brings its own click or uses the installed one; this is the right one's."""

COMMANDS: dict[str, str] = {
    "import": "distill_jax.cli.import_cmd:import_",
    "generate": "distill_jax.cli.generate_cmd:generate",
    "ops": "distill_jax.cli.ops_cmd:ops",
    "score": "distill_jax.cli.score_cmd:score",
    "batch": "distill_jax.cli.batch_cmd:batch",
    "doctor": "distill_jax.cli.doctor_cmd:doctor",
    "train": "distill_jax.cli.train_cmd:train",
    "rollouts": "distill_jax.cli.rollouts_cmd:app",
    "eval": "distill_jax.cli.eval_cmd:evaluate",
    "plan": "distill_jax.cli.plan_cmd:plan",
    "profile": "distill_jax.cli.profile_cmd:profile",
    "bench": "distill_jax.cli.bench_cmd:bench",
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
    def root(debug: Annotated[bool, typer.Option("--debug", help="show the traceback of an error")] = False) -> None:
        ...

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
    try:
        code = build_app(_wanted(args))(args=args, prog_name="distill-jax", standalone_mode=False)
    except UsageError as e:
        if debug:
            raise
        print(usage(e), file=sys.stderr)
        sys.exit(2)
    except typer.Abort:  # the end of what is typed
        sys.exit(130)
    except (ValueError, OSError, ImportError) as e:
        if debug:
            raise
        print(f"error: {said(e)}", file=sys.stderr)
        sys.exit(2)
    sys.exit(code or 0)


def _wanted(args: list[str]) -> list[str] | None:
    """The one command to import, None for all of them. Raises ValueError for an unknown command."""
    if not args or args[0].startswith("-"):
        return None
    if args[0] not in COMMANDS:
        near = difflib.get_close_matches(args[0], COMMANDS, n=2)
        raise ValueError(f"no command {args[0]!r}" + (f"; did you mean {' or '.join(near)}?" if near else
                                                      f"; commands: {', '.join(COMMANDS)}"))
    return [args[0]]


def said(error: Exception) -> str:
    """An error in one line; what the operating system says gets the file in front, and a full disk what to do."""
    if not isinstance(error, OSError) or not error.strerror:
        return str(error)
    where = f"{error.filename}: " if error.filename else ""
    full = error.errno == errno.ENOSPC and "free some" not in error.strerror
    return f"{where}{error.strerror}{'; free some space and run the same command again' if full else ''}"


def usage(error: typer.BadParameter) -> str:
    """What the parser says of wrong options, in one line; where there are none at all it is the help."""
    text = error.format_message()
    if "\n" in text or error.ctx is None:
        return text
    return (f"error: {text.rstrip('.')}; {' '.join(error.ctx.get_usage().split())} "
            f"(`{error.ctx.command_path} --help` explains each)")
