"""The answer checker against recorded judgements of real completions, and against strings made to break it.

    python -m benchmarks.verifier --data DIR                    # all of it; half an hour and more of one core
    python -m benchmarks.verifier --data DIR --fuzz 0           # the recorded judgements alone, a minute
    python -m benchmarks.verifier --data DIR --first 5000       # go on with string 5,000 of the 10,000

DIR is the folder of the public data. Written to `benchmarks/results/verifier.json` (or --out); what is printed are the
shares of agreement, every disagreement, and what the fuzzing met. The disagreements are judged, one by one, in
`benchmarks/results/verifier.md`. The strings are a function of --seed.
"""

import argparse
import csv
import json
import math
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.world_cells import machine
from distill_jax.rewards.check import Verdict
from distill_jax.rewards.checker import Checker, Query
from distill_jax.traces.formats import read_rows
from distill_jax.traces.formats.text import TAGS

ROLLOUTS = "2_traces/student_rollouts_math"
VECTORS = ("exact_match", "expr_gold_metric", "avg_at_k", "avg_at_k_math", "pass_at_k", "pass_at_k_math",
           "pass_at_k_letters", "maj_at_k", "gpqa_instruct_metric", "gpqa_instruct_pass_at_k")
TIMEOUT = 5.0  # seconds of CPU time for one comparison
SLACK = 2.0  # a check may take this times TIMEOUT of wall time and not count as slow: the machine is shared


@dataclass(frozen=True, kw_only=True)
class Case:
    """One judgement somebody else made. `said`: theirs; `text`: the whole completion or the answer they extracted."""

    source: str
    row: int
    text: str
    gold: str
    said: bool

    @property
    def unterminated(self) -> bool:
        body = self.text.lstrip()
        return any(body.startswith(t.open) and t.close not in body for t in TAGS)


def rollouts(data: Path, answers: bool) -> Iterator[Case]:
    """Completions of a student before and after RL with their recorded score; `answers`: what they extracted."""
    for path in sorted((data / ROLLOUTS).glob("*.jsonl*")):
        for row in read_rows(path):
            text = row["pred"][0] if answers else row["code"][0]
            yield Case(source=path.name.split(".")[0], row=row["idx"], text=str(text), gold=str(row["gt"]),
                       said=bool(row["score"][0]))


def pairs(data: Path) -> Iterator[Case]:
    """Outputs and golds that are equal in the eyes of math-verify's authors."""
    with open(data / "6_verifier/math_verify_examples/model_outputs.csv", newline="") as f:
        for i, row in enumerate(csv.DictReader(f)):
            yield Case(source="math_verify_examples", row=i, text=row["answer"], gold=row["gold"], said=True)


def vectors(data: Path, checker: Checker) -> list[dict[str, Any]]:
    """Metric cases of an evaluation suite: the metric from our verdicts, next to the expected one."""
    out = []
    for name in VECTORS:
        suite = json.loads((data / f"6_verifier/lighteval_cases/{name}.json").read_text())
        for i, case in enumerate(suite["test_cases"]):
            index = case["doc"]["gold_index"]
            golds = [case["doc"]["choices"][j] for j in (index if isinstance(index, list) else [index])]
            texts = case["model_response"]["text"]
            right = [checker.check(t, golds).correct is True for t in texts]
            ours = metric(name, case["metric_params"], right, texts)
            expected = float(next(iter(case["expected_output"].values())))
            out.append({"source": name, "row": i, "name": case["name"], "golds": golds, "texts": texts, "ours": ours,
                        "expected": expected, "same": abs(ours - expected) <= case.get("tolerance", 0.01)})
    return out


def metric(name: str, params: dict[str, Any], right: list[bool], texts: list[str]) -> float:
    """avg@k: mean of the first k. pass@k: 1 - C(n-c, k) / C(n, k). maj@k: the most frequent of the first k."""
    k = int(params.get("k") or 1)
    if name.startswith("avg"):
        return sum(right[:k]) / k
    if name.startswith("maj"):
        first = texts[:k]
        most = Counter(t.strip() for t in first).most_common(1)[0][0]
        return float(right[[t.strip() for t in first].index(most)])
    if "pass_at_k" in name:
        n = min(int(params.get("n") or len(right)), len(right))
        c = sum(right[:n])
        return 1 - math.comb(n - c, k) / math.comb(n, k)
    return float(right[0])


def compare(cases: list[Case], checker: Checker) -> dict[str, Any]:
    """Agreement on the cases, and every case that differs."""
    verdicts = checker.map([Query(completion=c.text, golds=[c.gold]) for c in cases])
    differ = [{"source": c.source, "row": c.row, "gold": c.gold, "said": c.said, "ours": v.correct, "method": v.method,
               "extracted": v.extracted, "tail": c.text[-160:]}
              for c, v in zip(cases, verdicts) if (v.correct is True) != c.said]
    kept = [(c, v) for c, v in zip(cases, verdicts) if not c.unterminated]
    same = sum((v.correct is True) == c.said for c, v in kept)
    return {"cases": len(cases), "unterminated": len(cases) - len(kept), "compared": len(kept), "same": same,
            "agreement": same / len(kept), "methods": dict(Counter(v.method for v in verdicts)), "differ": differ}


# Strings that are made to break a checker.
_WORDS = (
    "18", "x", "\\pi", "\\frac{1}{2}", "\\sqrt{2}", "e", "10^{6}", "\\infty", "yes", "A", "\\text{cm}", "\\%",
    "0.333", "i", "\\theta", "n", "\\binom{5}{2}", "\\emptyset", "\\mathbb{R}", "\\ldots", "3!", "-1", "1,000", "½",
    "−2", "π")
_JOINS = (
    "+", "-", "*", "/", "^", "=", " ", ",", "\\cdot ", "\\cup ", "<", "\\le ", " or ", "&", "\\\\", ";", ":", "!",
    "_", "\n")
_WRAPS = (
    "\\frac{%s}{%s}", "\\sqrt{%s}", "(%s)", "[%s,%s)", "{%s}", "\\{%s\\}", "\\left(%s\\right)", "%s^{%s}", "|%s|",
    "-%s", "\\begin{pmatrix}%s&%s\\end{pmatrix}", "\\text{%s}", "\\boxed{%s}", "\\sin(%s)", "\\log_{%s}%s", "%s!",
    "\\int_{%s}^{%s}", "\\sum_{%s}^{%s}", "\\overline{%s}", "\\lim_{x\\to %s}%s", "%s \\pmod{%s}", "\\sqrt[%s]{%s}",
    "\\mathbf{%s}")
_ODD = (
    "\u200b", "\u202e", "\x00", "\ud800", "é", "１", "Ａ", "А", "Ⅲ", "①", "𝟙", "𝑥", "٣", "\u0301", "🙂", "答案是",
    "\r", "\t", "\f", "\b", "\x1b")
_SHELLS = (
    "%s", "\\boxed{%s}", "The answer is %s.", "<think>a</think>%s", "$%s$", "\\[%s\\]", "<answer>%s</answer>",
    "#### %s", "Answer: %s", "答案是%s", "\\(%s\\)", "%s</think>", "<think>%s", "so \\boxed{%s", '{"answer": "%s"}',
    "**%s**")
_GOLDS = (
    "18", "x^2+1", "\\frac{\\sqrt{2}}{3}", "A", "yes", "(2,5)", "\\{1,2,3\\}", "x > 2", "\\text{Evelyn}", "0.5",
    "2+3i", "[2,5)", "\\begin{pmatrix}1&2\\end{pmatrix}", "10^{10}", "\\frac{1}{2}, \\frac{3}{4}", "e^{\\pi i}",
    "y=2x+1", "5!")
_PAIRS = (
    ("(", ")"), ("{", "}"), ("\\frac{1}{", "}"), ("\\sqrt{", "}"), ("2^{", "}"), ("\\left[", "\\right]"), ("-", ""),
    ("|", "|"), ("\\text{", "}"), ("\\boxed{", "}"), ("\\sin(", ")"))


def strings(seed: int, count: int) -> Iterator[tuple[str, str]]:
    """(completion, gold) pairs: nested LaTeX, odd signs, huge numbers, towers of powers, unbalanced braces, noise."""
    draw = random.Random(seed)
    makers: tuple[Callable[[random.Random], str], ...] = (
        _nested, _nested, _deep, _huge, _broken, _broken, _noise, _long)
    for _ in range(count):
        text = draw.choice(makers)(draw)
        shell = draw.choice(_SHELLS)
        gold = text if draw.random() < 0.05 else draw.choice(_GOLDS) if draw.random() < 0.8 else _nested(draw)
        yield shell.replace("%s", text, 1), gold


def _nested(draw: random.Random, depth: int = 0) -> str:
    if depth > 4 or draw.random() < 0.25:
        return draw.choice(_WORDS)
    if draw.random() < 0.5:
        parts = [_nested(draw, depth + 1) for _ in range(draw.randint(1, 3))]
        return draw.choice(_JOINS).join(parts)
    wrap = draw.choice(_WRAPS)
    for _ in range(wrap.count("%s")):
        wrap = wrap.replace("%s", _nested(draw, depth + 1), 1)
    return wrap


def _deep(draw: random.Random) -> str:
    left, right = draw.choice(_PAIRS)
    n = draw.choice((3, 12, 25, 29, 40, 200, 3000))
    return left * n + draw.choice(_WORDS) + right * draw.choice((n, n, n - 1, n + 1, 0))


def _huge(draw: random.Random) -> str:
    digits = lambda n: "".join(draw.choice("0123456789") for _ in range(n))
    return draw.choice((
        digits(draw.choice((20, 119, 400, 5000))), f"9^{{9^{{{digits(3)}}}}}", f"{digits(6)}!", f"1e{digits(3)}",
        f"1e-{digits(3)}",
        f"{digits(40)}/{digits(40)}", f"0.{digits(80)}", f"{digits(3)}^{{{digits(6)}}}", f"2^{{{digits(9)}}}",
        f"\\binom{{{digits(9)}}}{{{digits(8)}}}", f"\\frac{{{digits(100)}}}{{{digits(90)}}}", f"x^{{{digits(5)}}}+1",
        f"(x+1)^{{{digits(4)}}}", f"\\sqrt[{digits(5)}]{{{digits(30)}}}"))


def _broken(draw: random.Random) -> str:
    text = list(_nested(draw))
    for _ in range(draw.randint(1, 6)):
        at = draw.randrange(len(text) + 1)
        if text and draw.random() < 0.4:
            del text[min(at, len(text) - 1)]
        else:
            text.insert(at, draw.choice((*"{}()[]\\$^_&%#|~", *_ODD)))
    return "".join(text)


def _noise(draw: random.Random) -> str:
    return "".join(draw.choice((chr(draw.randrange(32, 127)), draw.choice(_ODD), chr(draw.randrange(1, 0xD7FF))))
                   for _ in range(draw.randrange(60)))


def _long(draw: random.Random) -> str:
    if draw.random() < 0.8:
        return _nested(draw)
    return draw.choice((_nested, _broken, _noise))(draw) * draw.choice((50, 500, 5000))


def fuzz(seed: int, count: int, checker: Checker, first: int = 0) -> Iterator[dict[str, Any]]:
    """Check the strings from `first` to `count`: exceptions (there should be none), time-outs, crashes, and how long
    the slowest took. A report every 500 strings, the last one of all of them."""
    methods: Counter[str] = Counter()
    raised, slow, undecided, longest = [], [], [], 0.0
    start = time.monotonic()

    def report(end: int) -> dict[str, Any]:
        return {"strings": [first, end], "seed": seed, "seconds": round(time.monotonic() - start, 1),
                "longest": round(longest, 2), "methods": dict(methods), "exceptions": raised, "over_time": slow,
                "undecided": undecided}

    for i, (text, gold) in enumerate(strings(seed, count)):
        if i < first:
            continue
        if i > first and i % 500 == 0:
            yield report(i)
        began = time.monotonic()
        try:
            verdict: Verdict = checker.check(text, gold)
        except Exception as e:
            raised.append({"text": text[:300], "gold": gold[:300], "error": f"{type(e).__name__}: {e}"[:300]})
            continue
        seconds = time.monotonic() - began
        longest = max(longest, seconds)
        methods[verdict.method] += 1
        if verdict.method in ("timeout", "crash"):
            undecided.append({"text": text[:300], "gold": gold[:300], "method": verdict.method,
                              "seconds": round(seconds, 2)})
        if seconds > SLACK * TIMEOUT + 2:
            slow.append({"text": text[:300], "gold": gold[:300], "seconds": round(seconds, 2)})
    yield report(count)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of the public data")
    parser.add_argument("--fuzz", type=int, default=10_000, help="strings made to break the checker")
    parser.add_argument("--first", type=int, default=0, help="go on at this string")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=1, help="processes for algebra")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "verifier.json")
    args = parser.parse_args(argv)
    if not (args.data / ROLLOUTS).is_dir():
        parser.error(f"no {ROLLOUTS} in {args.data}: --data is the folder of the public data")
    with Checker(workers=args.workers, timeout=TIMEOUT) as checker:
        report: dict[str, Any] = {"machine": machine()}
        for name, cases in (("completions", rollouts(args.data, answers=False)),
                            ("recorded answers", rollouts(args.data, answers=True)), ("pairs", pairs(args.data))):
            found = report[name] = compare(list(cases), checker)
            print(f"{name}: {found['same']} of {found['compared']} agree ({100 * found['agreement']:.2f}%); "
                  f"{found['unterminated']} more never end their thinking and are wrong by our rule")
            for d in found["differ"]:
                print("  ", json.dumps(d, ensure_ascii=False)[:400])
        rows = vectors(args.data, checker)
        report["vectors"] = {"cases": len(rows), "same": sum(r["same"] for r in rows),
                             "differ": [r for r in rows if not r["same"]]}
        print(f"vectors: {report['vectors']['same']} of {len(rows)} agree")
        for d in report["vectors"]["differ"]:
            print("  ", json.dumps(d, ensure_ascii=False)[:400])
        if args.fuzz:
            for found in fuzz(args.seed, args.fuzz, checker, args.first):
                report["fuzz"] = found
                counts = {k: len(v) if k in ("exceptions", "over_time", "undecided") else v for k, v in found.items()}
                print("fuzz:", counts, flush=True)
                write(args.out, report)
    write(args.out, report)
    return report


def write(path: Path, report: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1, ensure_ascii=True) + "\n")


if __name__ == "__main__":
    main()
