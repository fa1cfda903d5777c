"""`distill-jax generate`: a teacher answers questions; what is kept becomes a store, as in an import.

Samples are written down unit by unit (`samples/` in the output, removed at the end) before anything is made of them,
so that a run that is killed goes on with the next unit, and the same command with another `--keep` does not ask again
as long as nothing was kept. The randomness of a sample depends on `--seed`, its question and its number alone.
"""

import gzip
import json
import math
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from distill_jax.data.render import prompt_ids
from distill_jax.data.tokenizer import Tokenizer, load_tokenizer
from distill_jax.decode import Generator, Sampling
from distill_jax.jobs.import_rows import KEEP, Candidate, refusal
from distill_jax.jobs.import_traces import Output, Tally, write_candidates
from distill_jax.jobs.parts import ABOUT, Part
from distill_jax.jobs.progress import Ticker
from distill_jax.jobs.questions import Asked, QuestionSet, identity, of_traces
from distill_jax.jobs.score import fingerprint
from distill_jax.jobs.store_parts import place
from distill_jax.jobs.write_store import store_header
from distill_jax.rewards.checker import Checker
from distill_jax.rewards.journal import RULES, Journal
from distill_jax.rewards.verify import verify
from distill_jax.rollout.engine import Engine, engine_traces
from distill_jax.rollout.generation import sample_traces, with_real_ids, with_stops
from distill_jax.traces.formats import Reject
from distill_jax.traces.store.kv import Kv
from distill_jax.traces.store.rows import decode_document, encode_document
from distill_jax.traces.trace import FLAG_EMPTY_ANSWER, FLAG_TRUNCATED, FLAG_UNTERMINATED, Trace

SAMPLES, SETTINGS = "samples", "samples/settings.json"
DEFECTS = (FLAG_UNTERMINATED, FLAG_TRUNCATED, FLAG_EMPTY_ANSWER)
Progress = Callable[[int], None]


class Teacher(Protocol):
    """Who answers. unit: questions asked at a time; n: samples of each; identity: what decides the samples (JSON)."""

    unit: int
    n: int
    identity: dict[str, Any]

    def unfit(self, question: Trace) -> Reject | None:
        """Why a question cannot be asked, None if it can."""
        ...

    def __call__(self, questions: Sequence[Trace], progress: Progress | None = None) -> list[Trace | Reject]:
        """n samples of each question, in order."""
        ...


class ModelTeacher:
    """A model in memory. batch_size: rows of a decoding batch; name: who it is, in the provenance."""

    def __init__(self, model: Any, params: Any, tok: Tokenizer, sampling: Sampling, *, n: int = 1, seed: int = 0,
                 name: str = "", batch_size: int = 256, mesh: Mesh | None = None) -> None:
        self.generator = Generator(with_real_ids(model, tok), params, batch_size=batch_size, mesh=mesh,
                                   token_bytes=tok.token_bytes)
        self.tok, self.sampling, self.n, self.seed, self.name = tok, with_stops(sampling, tok), n, seed, name
        self.unit = max(1, 4 * batch_size // n)
        self.identity = {"teacher": name, "fingerprint": fingerprint(params), "tokenizer": tok.hash,
                         "template": tok.chat.id, "dtype": str(jnp.dtype(model.dtype)), "batch_size": batch_size,
                         "sampling": self.sampling.to_json(),
                         "n": n, "seed": seed}

    def unfit(self, question: Trace) -> Reject | None:
        try:
            length = len(prompt_ids(question, self.tok))
        except ValueError as e:
            return Reject("cannot_render", str(e))
        limit, new = self.generator.model.config.context_length, self.sampling.max_new_tokens
        if length + new <= limit:
            return None
        return Reject("prompt_too_long", f"{length} tokens and {new} new ones do not fit the teacher's context of "
                                         f"{limit}; lower --max-new-tokens")

    def __call__(self, questions: Sequence[Trace], progress: Progress | None = None) -> list[Trace | Reject]:
        return list(sample_traces(self.generator, self.tok, questions, self.sampling, n=self.n, seed=self.seed,
                                  teacher=self.name, progress=progress))


class EngineTeacher:
    """An OpenAI-compatible server."""

    def __init__(self, engine: Engine, sampling: Sampling, *, n: int = 1, seed: int = 0) -> None:
        self.engine, self.sampling, self.n, self.seed = engine, sampling, n, seed
        self.unit = max(1, 16 * engine.parallel // n)
        self.identity = {"engine": engine.url, "teacher": engine.model, "n": n, "seed": seed,
                         "sampling": sampling.to_json()}

    def unfit(self, question: Trace) -> Reject | None:
        return None  # the server knows its own context

    def __call__(self, questions: Sequence[Trace], progress: Progress | None = None) -> list[Trace | Reject]:
        return engine_traces(self.engine, questions, self.sampling, n=self.n, seed=self.seed, progress=progress)


@dataclass(frozen=True, kw_only=True)
class EngineSpec:
    """url: as far as `/v1`. model: empty for the server's first. api_key_env: environment variable with the key."""

    url: str
    model: str = ""
    api_key_env: str = "OPENAI_API_KEY"
    parallel: int = 16

    def connect(self) -> Engine:
        return Engine.connect(self.url, self.model, parallel=self.parallel, report=Complaints(),
                              api_key=os.environ.get(self.api_key_env, ""))


class Complaints:
    """Says what went wrong with a server, a line in `every` seconds at most: a run that waits should not look dead."""

    def __init__(self, every: float = 10.0) -> None:
        self._every, self._last, self._lock = every, -math.inf, threading.Lock()

    def __call__(self, problem: str) -> None:
        with self._lock:
            if time.monotonic() - self._last >= self._every:
                self._last = time.monotonic()
                print(f"{problem}; asking again", file=sys.stderr, flush=True)


@dataclass(frozen=True, kw_only=True)
class Keeping:
    """What becomes of samples. verify: check answers against the gold. keep: all; correct: found right; not-wrong:
    not found wrong, and finished. workers, timeout: of the checker."""

    verify: bool = True
    keep: str = "not-wrong"
    workers: int | None = None
    timeout: float = 5.0
    shard_rows: int = 256

    def __post_init__(self) -> None:
        if self.keep not in KEEP:
            raise ValueError(f"--keep {self.keep}: expected one of {', '.join(KEEP)}")


@dataclass(frozen=True, kw_only=True)
class GenerateJob:
    """teacher: a MODEL, or engine: a server. tokenizer: the one the store is rendered for, the teacher's by default.
    dtype: of the teacher's computation; "auto": bfloat16 on an accelerator, float32 on the CPU.
    part: ask only these questions, into a store of their own; `jobs.store_parts.join_rows` makes the whole one."""

    questions: QuestionSet
    out: str
    teacher: str = ""
    engine: EngineSpec | None = None
    tokenizer: str = ""
    sampling: Sampling = Sampling(temperature=0.6, top_p=0.95, max_new_tokens=2048)
    n: int = 1
    seed: int = 0
    keeping: Keeping = Keeping()
    batch_size: int = 256
    dtype: str = "auto"
    part: Part | None = None

    def __post_init__(self) -> None:
        if bool(self.teacher) == (self.engine is not None):
            raise ValueError("say who answers: either --teacher MODEL or --engine URL")
        if self.engine is not None and not self.tokenizer:
            raise ValueError("with --engine, name the tokenizer the store is for: --tokenizer MODEL")
        if self.n < 1:
            raise ValueError(f"--n must be at least 1, got {self.n}")
        if self.n > 1 and self.sampling.greedy:
            raise ValueError(f"--n {self.n} greedy samples of a question would all be the same: give a --temperature")
        if self.batch_size < 1:
            raise ValueError(f"--batch-size must be at least 1, got {self.batch_size}")
        if self.dtype not in ("auto", "float32", "bfloat16", "float16"):
            raise ValueError(f"--dtype {self.dtype}: expected auto, float32, bfloat16 or float16")


def generate(job: GenerateJob, *, mesh: Mesh | None = None, ticker: Ticker | None = None) -> dict[str, Any]:
    """Ask, verify, write; continues what an earlier start began. Returns the summary. Raises ValueError in one line
    for bad input."""
    asked = job.questions.read()
    if job.engine is not None:
        teacher: Teacher = EngineTeacher(job.engine.connect(), job.sampling, n=job.n, seed=job.seed)
        tok = load_tokenizer(job.tokenizer)
    else:
        teacher, tok = _load_teacher(job, mesh)
    return _generate_store(job.out, asked, teacher, tok, job.keeping, job.questions.source, ticker, job.part)


def _load_teacher(job: GenerateJob, mesh: Mesh | None) -> tuple[ModelTeacher, Tokenizer]:
    from distill_jax.loading import load

    dtype = job.dtype if job.dtype != "auto" else "float32" if jax.default_backend() == "cpu" else "bfloat16"
    model, params = load(job.teacher, mesh=mesh, dtype=jnp.dtype(dtype))
    own = load_tokenizer(job.teacher)
    where = Path(job.teacher)
    teacher = ModelTeacher(model, params, own, job.sampling, n=job.n, seed=job.seed, batch_size=job.batch_size,
                           mesh=mesh, name=str(where.resolve()) if where.exists() else job.teacher)
    return teacher, load_tokenizer(job.tokenizer) if job.tokenizer else own


def generate_store(out: str, questions: Iterable[Trace], teacher: Teacher, tok: Tokenizer,
                   keeping: Keeping = Keeping(), *, ticker: Ticker | None = None) -> dict[str, Any]:
    """Let `teacher` answer questions (traces; what somebody wrote there is not looked at) and write what is kept to
    the store `out`, rendered for `tok`. Returns the summary; the same call continues, or finds it finished.

    The summary is that of an import, with `questions` (asked), `solved` (with a right answer) and `completion_tokens`.
    """
    return _generate_store(out, of_traces(questions), teacher, tok, keeping, "questions", ticker)


def _generate_store(out: str, rows: Sequence[Asked], teacher: Teacher, tok: Tokenizer, keeping: Keeping, source: str,
                    ticker: Ticker | None, part: Part | None = None) -> dict[str, Any]:
    asked = [_fit(a, teacher) for a in rows]
    made_from = {"questions": identity(source, asked), **teacher.identity}
    settings = {**made_from, "verify": keeping.verify, "keep": keeping.keep, "rules": RULES}
    header = store_header(tok, generate=settings)
    url, finished = place(out, part, header, keeping.shard_rows, "generate")
    asked = asked if part is None else part.cut(asked)
    ticker = ticker or Ticker("generate", len(asked))
    output = Output(url, header, keeping.shard_rows, "generate", (SAMPLES, ABOUT))
    finished = output.finished() if finished is None else finished
    if finished is not None:
        ticker.say(f"{url} holds these traces already: {finished['kept']:,}; nothing to do")
        return finished
    with output, ticker, Checker(keeping.workers, keeping.timeout) as checker:
        tally = GenerateTally(settings=settings, formats={source: "questions"})
        journal = Journal(output.journal) if keeping.verify else None
        samples = _Samples(output.kv, made_from, teacher, ticker)
        found = judged(asked, samples, keeping, checker, journal, source)
        write_candidates(output, found, tok, tally, ticker)
        if not tally.kept and part is None:
            raise ValueError(tally.nothing_kept())
        summary = output.publish(tally)
        samples.forget()
        return summary


def _fit(asked: Asked, teacher: Teacher) -> Asked:
    why = teacher.unfit(asked.question) if asked.question is not None else None
    return asked if why is None else Asked(index=asked.index, row=asked.row, reject=why)


class _Samples:
    """Samples of consecutive questions, made once and then read back."""

    def __init__(self, kv: Kv, made_from: dict[str, Any], teacher: Teacher, ticker: Ticker) -> None:
        self.kv, self.teacher, self.ticker = kv, teacher, ticker
        data = json.dumps(made_from, sort_keys=True, indent=1).encode()
        if not kv.write_new(SETTINGS, data):
            there = json.loads(kv.read(SETTINGS) or b"{}")
            changed = [k for k in made_from if there.get(k) != json.loads(data)[k]]
            raise ValueError(f"{kv.url} holds samples made with another {' and '.join(changed)}; name another --out")

    def unit(self, number: int, questions: Sequence[Trace], done: int) -> list[Trace | Reject]:
        """Samples of unit `number`; `done`: rows before it, for the progress."""
        key = f"{SAMPLES}/{number:06d}.jsonl.gz"
        data = self.kv.read(key)
        if data is None:
            total = len(questions) * self.teacher.n
            made = self.teacher(questions, lambda n: self.ticker.at(done, f"{n:,} of the next {total:,} samples"))
            data = gzip.compress(b"\n".join(map(_pack, made)), 1, mtime=0)
            if self.kv.write_new(key, data):
                return made
            data = self.kv.read(key) or b""  # who was given up for lost has written after all: one answer counts
        return [_unpack(line) for line in gzip.decompress(data).splitlines()]

    def forget(self) -> None:
        self.kv.delete(f"{SAMPLES}/")


def _pack(sample: Trace | Reject) -> bytes:
    if isinstance(sample, Reject):
        return json.dumps([sample.reason, sample.detail]).encode()
    return encode_document("", sample)


def _unpack(line: bytes) -> Trace | Reject:
    return Reject(*json.loads(line)) if line.startswith(b"[") else decode_document(line)[1]


def judged(asked: Sequence[Asked], samples: _Samples, keeping: Keeping, checker: Checker, journal: Journal | None,
           source: str) -> Iterator[Candidate]:
    """Candidates in the order of the rows, and of the samples of each; verified, and sorted into kept and rejected."""
    start = 0
    for number, rows in enumerate(_units(asked, samples.teacher.unit)):
        made = iter(samples.unit(number, [a.question for a in rows if a.question is not None], start))
        start += len(rows)
        found: list[Candidate] = []
        for a in rows:
            at = Candidate(file=source, index=a.index, row=a.row)
            if a.question is None:
                assert a.reject is not None
                found.append(_rejected(at, a.reject))
                continue
            for n in range(samples.teacher.n):
                here = Candidate(file=source, index=a.index, row=a.row, sample=n)
                sample = next(made)
                found.append(_rejected(here, sample) if isinstance(sample, Reject) else
                             Candidate(file=source, index=a.index, row=_shown(a.row, sample), sample=n, trace=sample))
        yield from _verified(found, keeping, checker, journal)


def _units(asked: Sequence[Asked], size: int) -> Iterator[list[Asked]]:
    """Consecutive rows with `size` questions each."""
    unit: list[Asked] = []
    for a in asked:
        if sum(x.question is not None for x in unit) == size:
            yield unit
            unit = []
        unit.append(a)
    if unit:
        yield unit


def _rejected(at: Candidate, why: Reject) -> Candidate:
    return Candidate(file=at.file, index=at.index, row=at.row, sample=at.sample, rejected=why.reason,
                     detail=why.detail)


def _shown(row: Any, trace: Trace) -> Any:
    """What `rejects.jsonl` shows of a sample."""
    return {"row": row, "thinking": trace.thinking, "answer": trace.answer, "flags": list(trace.flags)}


def _verified(found: Sequence[Candidate], keeping: Keeping, checker: Checker, journal: Journal | None
              ) -> Iterator[Candidate]:
    traces = [c.trace for c in found if c.trace is not None]
    results = iter(verify(traces, checker, journal) if keeping.verify else [(t, None) for t in traces])
    for c in found:
        if c.trace is None:
            yield c
            continue
        trace, verdict = next(results)
        method = verdict.method if verdict is not None else ""
        why = refusal(trace, method, keeping.keep)  # type: ignore[arg-type]
        detail = "" if why is None or verdict is None else f"found {verdict.extracted!r}, gold {trace.gold!r}"
        if why is None and keeping.keep != "all":
            why = next((flag for flag in DEFECTS if flag in trace.flags), None)
        yield Candidate(file=c.file, index=c.index, row=c.row, sample=c.sample, trace=trace, rejected=why,
                        detail=detail, method=method)


@dataclass
class GenerateTally(Tally):
    """The numbers of `summary.json`."""

    asked: set[int] = field(default_factory=set)
    solved: set[int] = field(default_factory=set)
    completion_tokens: int = 0

    def add(self, c: Candidate) -> None:
        super().add(c)
        if c.trace is None:
            return
        self.asked.add(c.index)
        if c.trace.verdict:
            self.solved.add(c.index)
        if c.trace.encoded is not None:
            self.completion_tokens += len(c.trace.encoded.ids) - c.trace.encoded.prompt_length

    def to_json(self, store: Any) -> dict[str, Any]:
        return {"questions": len(self.asked), "solved": len(self.solved),
                "completion_tokens": self.completion_tokens, **super().to_json(store)}
