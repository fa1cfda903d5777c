"""Tokens/s of laying a teacher's tokens beside a student's of another vocabulary, and how much of them meets.

    python benchmarks/alignment.py --teacher TOKENIZER --student TOKENIZER [--traces FILE] [--rows 200]

Traces: real ones when a file is given that `distill-jax import` reads, word salad otherwise. Encoding is not counted.
`covered`: supervised tokens of the student in groups of the same bytes; `begun`: those that get a distribution;
`same token`: those whose own log-prob is known. The rate is the student's tokens over the time for both sides.
"""

import argparse
import itertools
import time
from pathlib import Path

import numpy as np

from benchmarks.loader import make_traces
from distill_jax.core.batch import FOREIGN
from distill_jax.data.cross import byte_map, cross_align, group_spans
from distill_jax.data.render import render
from distill_jax.data.tokenizer import load_tokenizer
from distill_jax.traces.formats import detect, read_rows
from distill_jax.traces.trace import Trace


def read_traces(path: Path | None, rows: int) -> list[Trace]:
    if path is None:
        return make_traces(rows)
    found = list(itertools.islice(read_rows(path), rows))
    layout = detect(found[:32])
    made = (t for i, row in enumerate(found) for t in layout.records(row, path.name, i))
    return [t for t in made if isinstance(t, Trace)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", required=True)
    parser.add_argument("--student", required=True)
    parser.add_argument("--traces", type=Path)
    parser.add_argument("--rows", type=int, default=200)
    args = parser.parse_args()
    teacher, student = load_tokenizer(args.teacher), load_tokenizer(args.student)
    begin = time.process_time()
    mapping = byte_map(teacher, student)
    print(f"byte_map {time.process_time() - begin:.2f} CPU s: {(mapping < FOREIGN).mean():.1%} of the teacher's "
          f"{teacher.real:,} ids have the same bytes as one of the student's {student.real:,}")
    pairs = [(render(t, teacher), render(t, student)) for t in read_traces(args.traces, args.rows)]
    tokens = sum(len(target.tokens) for _, target in pairs)
    cross_align(*pairs[0], mapping, (teacher, student))  # builds the tables of bytes
    begin = time.process_time()
    for source, target in pairs:
        group_spans(source.spans, target.spans, source.parts, target.parts)
    groups = time.process_time() - begin
    begin = time.process_time()
    found = [cross_align(source, target, mapping, (teacher, student)) for source, target in pairs]
    whole = time.process_time() - begin
    supervised = sum(a.supervised for a in found)
    share = lambda n: f"{n / supervised:.1%}"
    same = sum(int((a.pairs >= 0)[t.parts >= 0].sum()) for a, (_, t) in zip(found, pairs))
    print(f"{len(pairs)} rows, {tokens:,} tokens of the student for {sum(len(s.tokens) for s, _ in pairs):,} of the "
          f"teacher; of {supervised:,} supervised: covered {share(sum(a.covered for a in found))}, begun "
          f"{share(sum(a.begun or 0 for a in found))}, same token {share(same)}; worst row covered "
          f"{np.min([a.covered / max(1, a.supervised) for a in found]):.1%}")
    print(f"groups alone {tokens / groups:,.0f} tokens a CPU second; with bytes compared and the signal's places "
          f"{tokens / whole:,.0f}")


if __name__ == "__main__":
    main()
