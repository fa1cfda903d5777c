"""Write or show questions of the generated reasoning world."""

import json
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from distill_jax.traces.trace import Trace
from distill_jax.traces.world.generate import WorldSpec, traces


def write_world(spec: WorldSpec, n: int, out: Path) -> dict[str, float]:
    """Write `n` traces of the spec as JSON lines (one `Trace` each) and return a summary.

    The file appears whole or not at all. Raises ValueError if it exists: nothing is overwritten.
    """
    if n < 1:
        raise ValueError(f"--n must be at least 1, got {n}")
    if out.exists():
        raise ValueError(f"{out} exists; choose another --out or remove it")
    out.parent.mkdir(parents=True, exist_ok=True)
    part = out.with_name(out.name + ".part")
    seen: Counter[str] = Counter()
    bits = words = thought = 0.0
    try:
        with part.open("w") as f:
            for t in traces(spec, n):
                f.write(json.dumps(t.to_json(), ensure_ascii=False) + "\n")
                seen[t.group] += 1
                bits += t.scores["oracle_bits"]
                words += len(t.question.split())
                thought += len(t.thinking.split())
        os.replace(part, out)
    finally:
        part.unlink(missing_ok=True)
    return {"traces": n, "different_questions": len(seen), "question_words": words / n,
            "thinking_words": thought / n, "oracle_bits": bits / n,
            "oracle_bits_per_word": bits / thought if thought else 0.0}


def show_world(spec: WorldSpec, n: int) -> Iterator[str]:
    """`n` questions in full, for a person to read."""
    return (describe(t) for t in traces(spec, n))


def describe(t: Trace) -> str:
    """Question, thinking and answer with what is known about them."""
    known = ("kind", "k", "gold_position", "hop_positions", "rule", "split")
    about = ", ".join(f"{name}={t.meta[name]}" for name in known if name in t.meta)
    return (f"--- {about}; {t.scores['oracle_bits']:.1f} bits of wording\n{t.question}\n"
            f"<think> {t.thinking} </think>\n{t.answer}")


def print_summary(summary: dict[str, float], file: TextIO) -> None:
    for key, value in summary.items():
        print(f"{key:>22}  {value:g}", file=file)
