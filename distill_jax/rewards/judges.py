"""Judges: samples in, the same samples out, each with its verdict. What a trainer runs before any reward.

A judge is a function `(samples, what it needs) -> samples`. Verdicts that took a process to find, time-outs included,
are in the journal before they are returned, so that a restarted run decides as the first one did.
"""

import json
import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from distill_jax.rewards import knights
from distill_jax.rewards.check import Verdict
from distill_jax.rewards.checker import Checker
from distill_jax.rewards.code import extract_code, run_tests
from distill_jax.rewards.journal import Journal, verdict_key
from distill_jax.rewards.sample import Sample
from distill_jax.rewards.sandbox import Sandbox
from distill_jax.rewards.verify import verify

_log = logging.getLogger(__name__)
UNTERMINATED = Verdict(correct=False, extracted=None, method="unterminated")
NO_GOLD = Verdict(correct=None, extracted=None, method="no_gold")


def judge_answers(samples: Sequence[Sample], checker: Checker, journal: Journal | None = None) -> list[Sample]:
    """Numbers, letters, yes/no, formulas, texts: `rewards.check` on the text after the thinking."""
    ended = [s for s in samples if s.terminated]
    verdicts = iter([v for _, v in verify([s.trace for s in ended], checker, journal)])
    return [s.replace(verdict=next(verdicts) if s.terminated else UNTERMINATED) for s in samples]


def judge_knights(samples: Sequence[Sample]) -> list[Sample]:
    """Knights and Knaves, person by person. A gold that states no roles gives no verdict."""
    return [s.replace(verdict=_knights(s)) for s in samples]


def _knights(sample: Sample) -> Verdict:
    try:
        return knights.judge(sample)
    except ValueError:
        return NO_GOLD


def judge_code(samples: Sequence[Sample], sandbox: Sandbox, journal: Journal | None = None) -> list[Sample]:
    """Programs against `trace.meta["tests"]` (see `rewards.code`): right if all pass. Without tests, no verdict.

    `extracted` is "7/10", tests passed; method `tests`, or what the first failure was: wrong, error, timeout, ... Tests
    that say nothing (`bad_tests`) and a sandbox that failed (`crash`) decide nothing.
    A text that was run before, in this batch or by the journal, is not run again.
    """
    keys = [verdict_key(s.trace.id, [json.dumps(t, sort_keys=True)], "code")
            if s.terminated and (t := s.trace.meta.get("tests")) else "" for s in samples]
    known = {k: v for k in keys if k and journal is not None and (v := journal.get(k)) is not None}
    fresh = {k: s for k, s in zip(keys, samples) if k and k not in known}
    with ThreadPoolExecutor(sandbox.workers) as threads:
        found = dict(zip(fresh, threads.map(lambda s: _code(s, sandbox), fresh.values())))
    if journal is not None:
        journal.add(found.items())
    known |= found
    return [s.replace(verdict=known[k] if k else NO_GOLD if s.terminated else UNTERMINATED)
            for k, s in zip(keys, samples)]


def _code(sample: Sample, sandbox: Sandbox) -> Verdict:
    try:
        result = run_tests(extract_code(sample.answer), sample.trace.meta["tests"], sandbox)
    except (ValueError, RuntimeError, OSError) as e:
        _log.warning("tests of %s gave no verdict: %s", sample.trace.id, str(e)[:300])
        return Verdict(correct=None, extracted=None, method="bad_tests" if isinstance(e, ValueError) else "crash")
    return Verdict(correct=result.passed == result.total, extracted=f"{result.passed}/{result.total}",
                   method=result.why or "tests", timed_out=result.why == "timeout")


def passed_share(sample: Sample) -> float:
    """Share of the unit tests that a program passed, read from the verdict of `judge_code`; 0 without an answer."""
    if sample.verdict is None or sample.verdict.extracted is None:
        return 0.0
    passed, _, total = sample.verdict.extracted.partition("/")
    return int(passed) / int(total)
