"""What `doctor` looks at: a store as a student would be fed from it, and what a check may say about it."""

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np

from distill_jax.data.choosing import choose
from distill_jax.data.render import render
from distill_jax.data.rowset import matches
from distill_jax.data.source_specs import Store
from distill_jax.data.tokenizer import Tokenizer, load_tokenizer
from distill_jax.traces.store import RowArrays, RowIndex, SignalReader, TraceStore
from distill_jax.traces.trace import Trace

SAMPLE = 256
Severity = Literal["error", "warning", "note"]


@dataclass(frozen=True, kw_only=True)
class Finding:
    """error: the run would be wrong; warning: probably not what was meant; note: handled, worth knowing."""

    check: str
    severity: Severity
    message: str
    mend: str

    def to_json(self) -> dict[str, Any]:
        return dict(vars(self))


class Patient:
    """One store as a student would be fed from it, and a sample of its rows.

    chosen    numbers of the rows the source's filters keep; sample: up to SAMPLE of them, spread over the store
    stored    the sample as it is stored; rows: as the student sees it (rendered again where the store's does not fit)
    """

    def __init__(self, spec: Store, tok: Tokenizer, *, teachers: Mapping[str, Tokenizer] | None = None,
                 vocabularies: Mapping[str, int] | None = None, against: Sequence[str] = ()) -> None:
        self.spec, self.tok = spec, tok
        self.vocabularies = dict(vocabularies or {})
        self.against = tuple(against)
        self.store = TraceStore.open(spec.path)
        self.index: RowIndex = self.store.index()
        self.chosen, self.left_out = choose(self.index, spec)
        last = max(len(self.chosen) - 1, 0)
        self.sample = self.chosen[np.unique(np.linspace(0, last, min(SAMPLE, len(self.chosen))).astype(int))]
        self.fits = matches(self.store, tok, spec.style)
        self.teachers = {**self._scorers(), **(teachers or {})}

    def _scorers(self) -> dict[str, Tokenizer]:
        """Tokenizers of the teachers that scored the signals, where they still are where they were."""
        out: dict[str, Tokenizer] = {}
        for name, reader in self.signals.items():
            teacher = reader.header.teacher
            if not isinstance(teacher, Mapping) or teacher.get("tokenizer") == self.tok.hash:
                continue
            with contextlib.suppress(ValueError, OSError):
                out[f"of signal {name}"] = load_tokenizer(str(teacher.get("model", "")))
        return out

    @cached_property
    def stored(self) -> list[RowArrays]:
        return self.store.read(self.sample) if len(self.sample) else []

    @cached_property
    def traces(self) -> list[Trace]:
        return list(self.store.traces(self.sample))

    @cached_property
    def rows(self) -> list[RowArrays]:
        if self.fits:
            return self.stored
        return [render(t, self.tok, style=self.spec.style) for t in self.traces]

    @cached_property
    def signals(self) -> dict[str, SignalReader]:
        return {name: self.store.signal(name) for name in self.store.signals()}
