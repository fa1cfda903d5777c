"""Programs of a model against unit tests, in the sandbox.

Three ways to state tests; in the first two what is expected never enters the sandbox, so no program can read it there,
print it, or return an object that equals everything:

    {"function": "add", "calls": [[[1, 2], 3], ...]}        arguments and the expected result, as JSON
    {"stdin": [["1 2\\n", "3\\n"], ...]}                    standard input and the expected output, one run each
    {"function": "add", "check": "def check(candidate): assert ...", "prefix": "def add(a, b):\\n"}      HumanEval

The third runs the assertions beside the program, which could therefore tamper with them; a program that merely stops
before they ran, or swallows `SystemExit`, does not pass. `prefix` stands before a completion that is no whole program.
"""

import json
import math
import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from distill_jax.rewards.answers import after_thinking
from distill_jax.rewards.sandbox import Outcome, Sandbox

LONGEST = 200_000  # characters of a program

_FENCE = re.compile(r"^[ \t]*```[ \t]*([\w+-]*)[^\n]*\n(.*?)(?:^[ \t]*```|\Z)", re.MULTILINE | re.DOTALL)


def extract_code(answer: str) -> str | None:
    """The program of an answer: its last fenced block (of those marked as Python, where there are any), or all of an
    answer without fences. None where there is none, it is too long, or the thinking never ends."""
    body = after_thinking(answer)
    if body is None or len(body) > 10 * LONGEST:
        return None
    blocks = _FENCE.findall(body)
    python = [text for mark, text in blocks if mark.casefold() in ("python", "py", "python3")]
    code = (python or [text for _, text in blocks] or [body])[-1]
    return code if code.strip() and len(code) <= LONGEST else None


@dataclass(frozen=True, kw_only=True)
class Result:
    """passed of total tests; `why` the first failure (wrong, error, timeout, output, killed, no_code), detail its text.
    """

    passed: int
    total: int
    why: str = ""
    detail: str = ""


def run_tests(code: str | None, tests: Mapping[str, Any], sandbox: Sandbox) -> Result:
    """How many tests a program passes. Raises ValueError for tests that say none of the three things.

    Calls and assertions run in one process: a time limit is for all of them. Runs on standard input stop at the first
    failure.
    """
    total = 1 if "check" in tests else len(tests.get("calls") or tests.get("stdin") or ())
    if not total or (("calls" in tests or "check" in tests) and not tests.get("function")):
        raise ValueError(f"tests have {sorted(tests)}; expected function and calls, stdin, or function and check")
    if code is None:
        return Result(passed=0, total=total, why="no_code")
    code = str(tests.get("prefix", "")) + code
    if "check" in tests:
        return _check(code, tests["function"], tests["check"], sandbox)
    if "calls" in tests:
        return _calls(code, tests["function"], tests["calls"], sandbox)
    return _stdin(code, tests["stdin"], sandbox)


_CALLS = """\
import json, sys
out = sys.stdout
space = {{"__name__": "solution"}}
exec(compile(open("solution.py", encoding="utf-8").read(), "solution.py", "exec"), space)
for line in open("calls.jsonl", encoding="utf-8"):
    try:
        said = {{"value": space[{function!r}](*json.loads(line))}}
    except Exception as e:
        said = {{"error": type(e).__name__}}
    try:
        text = json.dumps(said)
    except (TypeError, ValueError):
        text = json.dumps({{"error": "no JSON value"}})
    print("\\n" + {token!r} + text, file=out, flush=True)
"""


def _calls(code: str, function: str, calls: Sequence[Any], sandbox: Sandbox) -> Result:
    token = secrets.token_hex(8)
    outcome = sandbox.run(_CALLS.format(function=function, token=token), files={
        "solution.py": code, "calls.jsonl": "".join(json.dumps(args) + "\n" for args, _ in calls)})
    said = [_value(line.removeprefix(token)) for line in outcome.stdout.splitlines() if line.startswith(token)]
    # fewer lines than calls: it ended early. More: it wrote some itself, and then nothing counts.
    rights = [i < len(said) and "value" in said[i] and same_value(said[i]["value"], want)
              for i, (_, want) in enumerate(calls)] if len(said) <= len(calls) else [False] * len(calls)
    passed = sum(rights)
    return Result(passed=passed, total=len(calls), **_failure(outcome, passed == len(calls)))


def _stdin(code: str, cases: Sequence[Any], sandbox: Sandbox) -> Result:
    for i, (given, want) in enumerate(cases):
        outcome = sandbox.run(code, stdin=given)
        if outcome.status != "ok" or not same_output(outcome.stdout, want):
            return Result(passed=i, total=len(cases), **_failure(outcome, False))
    return Result(passed=len(cases), total=len(cases))


_CHECK = """\
space = {{"__name__": "solution"}}
exec(compile(open("solution.py", encoding="utf-8").read(), "solution.py", "exec"), space)
exec(compile(open("check.py", encoding="utf-8").read(), "check.py", "exec"), space)
space["check"](space[{function!r}])
print("\\n" + {token!r})
"""


def _check(code: str, function: str, check: str, sandbox: Sandbox) -> Result:
    token = secrets.token_hex(8)
    outcome = sandbox.run(_CHECK.format(function=function, token=token),
                          files={"solution.py": code, "check.py": check})
    passed = outcome.status == "ok" and outcome.stdout.splitlines()[-1:] == [token]
    return Result(passed=int(passed), total=1, **_failure(outcome, passed))


def _failure(outcome: Outcome, passed: bool) -> dict[str, str]:
    if passed:
        return {}
    return {"why": "wrong" if outcome.status == "ok" else outcome.status, "detail": outcome.stderr[-300:]}


def _value(text: str) -> dict[str, Any]:
    try:
        said = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return said if isinstance(said, dict) else {}


def same_value(a: Any, b: Any) -> bool:
    """JSON values, floats to a relative 1e-6; 1, 1.0 and True are three different things but for 1 and 1.0."""
    if isinstance(a, bool) or isinstance(b, bool):
        return a is b
    if isinstance(a, int | float) and isinstance(b, int | float):
        whole = isinstance(a, int) and isinstance(b, int)
        return a == b if whole else math.isclose(a, b, rel_tol=1e-6, abs_tol=1e-9)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(same_value, a, b))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same_value(a[k], b[k]) for k in a)
    return type(a) is type(b) and a == b


def same_output(said: str, want: str) -> bool:
    """Whether two outputs agree but for white space at line ends and empty lines at the end."""
    lines = lambda text: [line.rstrip() for line in text.rstrip().splitlines()]
    return lines(said) == lines(want)
