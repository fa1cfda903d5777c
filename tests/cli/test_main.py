"""What the command line says when it is called wrongly: one line, exit code 2."""

import errno
from collections.abc import Iterator
from typing import Any

import pytest
import typer

from distill_jax.cli.main import COMMANDS, build_app, main, said


def run(capsys, *args: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as e:
        main(list(args))
    out, err = capsys.readouterr()
    return int(e.value.code or 0), out, err


@pytest.mark.parametrize("args,says", [
    (("score",), "Missing argument 'store'; Usage: distill-jax score [OPTIONS] {store} (`distill-jax score --help`"),
    (("score", "traces"), "Missing option '--teacher'"),
    (("store", "inspect"), "Usage: distill-jax store inspect"),
    (("train", "--nope", "x"), "No such option: --nope"),
    (("import", "x", "--max-rows", "some"), "'--max-rows'"),
    (("trian",), "no command 'trian'; did you mean train"),
    (("zzz",), "no command 'zzz'; commands: import, generate"),
])
def test_a_wrong_call_is_one_line(capsys, args, says):
    code, out, err = run(capsys, *args)
    assert code == 2 and not out and err.count("\n") == 1
    assert err.startswith("error: ") and says.casefold() in err.casefold()


def test_no_command_is_the_help(capsys):
    code, out, err = run(capsys)
    assert code == 2 and all(name in out + err for name in COMMANDS) and "--debug" in out + err
    assert run(capsys, "store")[0] == 2
    assert run(capsys, "--help")[0] == 0
    with pytest.raises(Exception, match="files"):
        main(["import", "--debug"])


@pytest.mark.parametrize("error,text", [
    (ValueError("a"), "a"), (FileNotFoundError("no recipe x"), "no recipe x"),
    (FileNotFoundError(errno.ENOENT, "No such file or directory", "x.py"), "x.py: No such file or directory"),
    (OSError(errno.ENOSPC, "No space left on device"),
     "No space left on device; free some space and run the same command again"),
    (OSError(errno.ENOSPC, "s: no space left; free some space"), "s: no space left; free some space"),
])
def test_errors_of_the_system_are_told_without_numbers(error, text):
    assert said(error) == text


def test_every_option_is_explained():
    def commands(command: Any, name: str) -> Iterator[tuple[str, Any]]:
        if not hasattr(command, "commands"):
            yield name, command
        for sub, inner in getattr(command, "commands", {}).items():
            yield from commands(inner, f"{name} {sub}")

    found = list(commands(typer.main.get_command(build_app()), ""))
    assert len(found) > len(COMMANDS)
    silent = [f"{name} {p.name}" for name, command in found for p in command.params if not getattr(p, "help", "")]
    assert not silent and all(command.help for _, command in found)
