"""Verdicts on disk before anybody acts on them, so that a restarted run decides as the first one did."""

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path

from distill_jax.rewards.check import Verdict

RULES = 3
"""Raise it when the checker's rules change: verdicts of older rules are then not used."""


def verdict_key(trace_id: str, golds: Sequence[str], kind: str = "auto") -> str:
    """Identity of a check: which text, against what, by which rules."""
    body = json.dumps([RULES, trace_id, list(golds), kind], ensure_ascii=False)
    return hashlib.blake2b(body.encode("utf-8", "surrogatepass"), digest_size=12).hexdigest()


class Journal:
    """Append-only JSON lines of verdicts. A line that a kill cut short is dropped, and overwritten."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._known: dict[str, Verdict] = {}
        if not self.path.exists():
            return
        whole = 0
        with open(self.path, "rb") as f:
            for line in f:
                if not line.endswith(b"\n"):
                    break
                try:
                    entry = json.loads(line)
                    self._known[entry["key"]] = Verdict(**entry["verdict"])
                except (ValueError, TypeError, KeyError):
                    break
                whole += len(line)
        if whole < self.path.stat().st_size:
            os.truncate(self.path, whole)

    def __len__(self) -> int:
        return len(self._known)

    def get(self, key: str) -> Verdict | None:
        return self._known.get(key)

    def add(self, verdicts: Iterable[tuple[str, Verdict]]) -> None:
        """Write verdicts and wait until they are on the disk."""
        entries = list(verdicts)
        if not entries:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "ab") as f:
            for key, verdict in entries:
                f.write(json.dumps({"key": key, "verdict": asdict(verdict)}).encode() + b"\n")
            f.flush()
            os.fsync(f.fileno())
        self._known.update(entries)
