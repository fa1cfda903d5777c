import pytest

from distill_jax.rewards.code import extract_code, run_tests, same_output, same_value
from distill_jax.rewards.journal import Journal
from distill_jax.rewards.judges import judge_answers, judge_code, judge_knights, passed_share
from distill_jax.rewards.sample import Sample
from distill_jax.rewards.sandbox import Limits, Sandbox, SandboxUnavailable
from distill_jax.traces.formats import read_rows
from distill_jax.traces.trace import simple_trace
from tests.rewards.samples import sample

CALLS = {"function": "add", "calls": [[[1, 2], 3], [[-1, 1], 0], [[[1], [2]], [1, 2]]]}
STDIN = {"stdin": [["1 2\n", "3\n"], ["4 5\n", "9"]]}
CHECK = {"function": "add", "check": "def check(add):\n    assert add(1, 2) == 3\n    assert add(2, 2) == 4"}
ADD = "def add(a, b):\n    return a + b\n"


@pytest.fixture(scope="module")
def box():
    try:
        box = Sandbox(workers=1, limits=Limits(cpu=2, wall=5))
    except SandboxUnavailable as e:
        pytest.skip(str(e))
    with box:
        yield box


@pytest.mark.parametrize("answer,code", [
    ("```python\nx = 1\n```", "x = 1\n"), ("a\n```py\nx\n```\nb\n```python3\ny\n```\nc", "y\n"),
    ("```python\nx\n```\n```\noutput\n```", "x\n"), ("```\nx\n```", "x\n"), ("```python\nx = 1\n", "x = 1\n"),
    ("  ```python\n  x\n  ```", "  x\n"), ("x = 1", "x = 1"), ("", None), ("```python\n```", None),
    ("<think>```python\nx\n```", None), ("<think>```python\nx\n```</think>```python\ny\n```", "y\n"),
    ("x" * 300_000, None)])
def test_extract(answer, code):
    assert extract_code(answer) == code


def test_programs_that_pass(box):
    assert run_tests(ADD, CALLS, box).passed == 3
    assert run_tests("print(sum(map(int, input().split())))", STDIN, box).passed == 2
    assert run_tests(ADD, CHECK, box) == run_tests("    return a + b", {**CHECK, "prefix": "def add(a, b):\n"}, box)
    assert run_tests(ADD, CHECK, box).passed == 1


@pytest.mark.parametrize("code,passed,why", [
    ("def add(a, b): return a - b", 0, "wrong"), ("def add(a, b): return 3", 1, "wrong"), ("def add(a", 0, "error"),
    ("def sub(a, b): return 0", 0, "wrong"), ("import os; os._exit(0)", 0, "wrong"), ("exit()", 0, "wrong"),
    ("def add(a, b):\n    if a == -1: exit()\n    return a + b", 1, "wrong"),
    ("def add(a, b):\n    while True: pass", 0, "timeout"), (None, 0, "no_code"),
    ("class All:\n    def __eq__(self, other): return True\ndef add(a, b): return All()", 0, "wrong"),
    ("def add(a, b):\n    print('noise')\n    return a + b", 3, ""),
    ("import sys\nsys.stdout = None\ndef add(a, b): return a + b", 3, "")])
def test_calls(box, code, passed, why):
    result = run_tests(code, CALLS, box)
    assert (result.passed, result.total, result.why) == (passed, 3, why)


def test_lines_that_a_program_forges_count_for_nothing(box):
    forge = """
import sys
frame = sys._getframe()
while frame.f_back: frame = frame.f_back
def add(a, b):
    text = open("main.py").read()
    token = text.split('print("\\\\n" + \\'')[1].split("'")[0]
    print("\\n" + token + '{"value": 3}')
    print(token + '{"value": 0}')
    return 3
"""
    assert run_tests(forge, CALLS, box).passed == 0


@pytest.mark.parametrize("code", ["print(3)", "print(0)", "", "exit(0)", "raise SystemExit",
                                  "print(open('/etc/passwd').read())"])
def test_stdin_hacks(box, code):
    assert run_tests(code, STDIN, box).passed < 2


@pytest.mark.parametrize("code", ["exit()", "import os; os._exit(0)", "raise SystemExit(0)", "add = 3", "",
                                  "def add(a, b): return 3", "import sys\ndef add(a, b): sys.exit(0)",
                                  "print('passed')", "def check(f): pass"])
def test_assertions_that_never_ran_are_not_passed(box, code):
    result = run_tests(code, CHECK, box)
    assert result.passed == 0 and result.why


def test_tests_that_say_nothing(box):
    for tests in ({}, {"calls": []}, {"calls": [[[1], 1]]}, {"check": "x"}):
        with pytest.raises(ValueError, match="expected function and calls"):
            run_tests(ADD, tests, box)


@pytest.mark.parametrize("a,b,same", [
    (1, 1.0, True), (True, 1, False), (False, False, True), (0.1 + 0.2, 0.3, True), (10**20, 10**20 + 1, False),
    ([1, [2]], [1, [2]], True), ({"a": 1}, {"a": 1.0}, True), ({"a": 1}, {"b": 1}, False), ("1", 1, False),
    (None, None, True), (float("nan"), float("nan"), False), ([], {}, False)])
def test_same_value(a, b, same):
    assert same_value(a, b) == same


def test_same_output():
    assert same_output("1 \n2\n\n", "1\n2") and not same_output("1\n\n2", "1\n2") and not same_output("", "1")


def program(answer, tests, **fields):
    return Sample.of(simple_trace("q", "", answer, meta={"tests": tests}), **fields)


def test_judge(box, tmp_path):
    right, part = f"```python\n{ADD}```", "```python\ndef add(a, b): return 3\n```"
    samples = [program(right, CALLS), program(part, CALLS), program(right, None),
               program(right, CALLS, terminated=False), program(right, CALLS)]
    journal = Journal(tmp_path / "verdicts.jsonl")
    judged = judge_code(samples, box, journal)
    assert [s.verdict.correct for s in judged] == [True, False, None, False, True]
    assert [s.verdict.extracted for s in judged] == ["3/3", "1/3", None, None, "3/3"]
    assert [passed_share(s) for s in judged] == pytest.approx([1, 1 / 3, 0, 0, 1])
    assert len(journal) == 2  # the same text against the same tests is one run

    class Closed:
        workers = 1

    assert judge_code(samples, Closed(), Journal(tmp_path / "verdicts.jsonl")) == judged  # nothing runs again


def test_what_decides_nothing_stops_nothing(box):
    class Broken:
        workers = 1

        def run(self, *args, **kwargs):
            raise RuntimeError("the sandbox's runner died twice under one program")

    strange = program(f"```python\n{ADD}\ud800```", CALLS)  # a text that is no UTF-8
    assert judge_code([strange], box)[0].verdict.method == "error"
    assert judge_code([program(ADD, {"calls": []})], box)[0].verdict.method == "bad_tests"
    assert judge_code([program(ADD, CALLS)], Broken())[0].verdict.method == "crash"


def test_other_judges():
    from distill_jax.rewards.checker import Checker

    trace = simple_trace("q", "", "The answer is 18", gold="18")
    with Checker(workers=1) as checker:
        samples = [Sample.of(trace), Sample.of(trace, terminated=False), Sample.of(trace.replace(gold=None))]
        judged = judge_answers(samples, checker)
    assert [s.correct for s in judged] == [True, False, False]
    assert [s.verdict.method for s in judged] == ["exact", "unterminated", "no_gold"]
    puzzle = "A is a knight, B is a knave"
    judged = judge_knights([sample(gold=puzzle, answer="B is a knave, A is a knight"),
                            sample(gold="18", answer=puzzle)])
    assert [s.verdict.correct for s in judged] == [True, None]


def test_real_programs(data_dir, box):
    """HumanEval's own solutions and a model's (those published are the right ones) pass, empty bodies do not."""
    problems = list(read_rows(data_dir / "5_code/humaneval/HumanEval.jsonl.gz"))[:8]
    written = {r["task_id"].split("/")[1]: r["generation"]
               for r in read_rows(data_dir / "5_code/codegeex_generations/humaneval_python_generations.jsonl.gz")}
    for p in problems:
        tests = {"function": p["entry_point"], "check": p["test"], "prefix": p["prompt"]}
        assert run_tests(p["canonical_solution"], tests, box).passed == 1, p["task_id"]
        assert run_tests("    pass\n", tests, box).passed == 0
        assert run_tests(written[p["task_id"].split("/")[1]], tests, box).passed == 1
