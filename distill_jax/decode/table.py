"""`Table`: which answer each slot is writing, and what it has of it. The host's part; no device is touched."""

from collections.abc import Sequence

import numpy as np

from distill_jax.decode.loop import Report, Rows
from distill_jax.decode.request import Completion, Pending, Request
from distill_jax.decode.sampling import Sampling
from distill_jax.decode.stops import StopStrings


class Table:
    """B slots, each free or with one request. N: most tokens an answer may have, F: most given tokens in a row.

    request i32 [B]: its index, -1 where the slot is free. prompt i32 [B]: tokens of the prompt. ids i32, logprobs and
    behaviour float32 [B,N]: the answers, `count` i32 [B] tokens of each. The others: see `loop.Rows`.
    """

    def __init__(self, slots: int, requests: Sequence[Request], sampling: Sampling, stops: StopStrings | None) -> None:
        self._requests, self._sampling, self._stops = requests, sampling, stops
        longest = max(r.limit(sampling) for r in requests)
        given = max(len(ids) for r in requests for ids in (r.forced, *(i.ids for i in r.injections)))
        column = lambda: np.zeros(slots, np.int32)
        self.request = np.full(slots, -1, np.int32)
        self.prompt, self.count, self.limit, self.seeds = column(), column(), column(), np.zeros(slots, np.uint32)
        self.ids = np.zeros((slots, longest), np.int32)
        self.logprobs, self.behaviour = (np.zeros((slots, longest), np.float32) for _ in range(2))
        width = 1 << (given - 1).bit_length() if given else 0  # few widths, few compiles
        self.given, self.start, self.length = np.zeros((slots, width), np.int32), column(), column()
        self._pending: list[Pending | None] = [None] * slots
        self._spans: list[list[tuple[int, np.ndarray, bool]]] = [[] for _ in range(slots)]
        self._before = [b""] * slots  # what was written before, as far as a stop string may have begun in it

    @property
    def live(self) -> np.ndarray:
        """bool [B]: slots that write. Between two calls, no other slot is taken."""
        return self.request >= 0

    @property
    def stored(self) -> np.ndarray:
        """i32 [B]: tokens in the cache: all but the newest of the answer."""
        return self.prompt + np.maximum(self.count - 1, 0)

    def passes(self) -> int:
        """Forward passes after which every slot has reached its limit."""
        return int(np.max((self.limit - np.maximum(self.count, 1))[self.live], initial=0))

    def room(self, passes: int) -> tuple[int, int]:
        """Tokens a slot has to hold for the next `passes`, and until the longest answer is written."""
        live = self.live
        longest = np.array([0 if p is None else p.limit for p in self._pending], np.int32)
        whole = (self.prompt + longest - 1)[live]
        return int(np.minimum(self.stored[live] + passes, whole).max(initial=1)), int(whole.max(initial=1))

    def select(self, slots: np.ndarray) -> None:
        """These slots and no others, in this order."""
        for name, value in vars(self).items():
            if isinstance(value, np.ndarray):
                setattr(self, name, value[slots])
        self._pending, self._spans, self._before = ([x[i] for i in slots] for x in (
            self._pending, self._spans, self._before))

    def begin(self, slot: int, index: int) -> None:
        """A free slot takes a request, whose prompt is in the cache."""
        request = self._requests[index]
        self.request[slot], self.prompt[slot], self.count[slot] = index, len(request.prompt), 0
        self.seeds[slot] = request.seed & 0xFFFFFFFF
        self._pending[slot], self._spans[slot] = Pending(request, self._sampling), []
        logprobs = np.asarray(request.forced_logprobs or [0.0] * len(request.forced), np.float32)
        self._give(slot, request.forced, logprobs, injected=False)

    def rows(self) -> Rows:
        newest = self.ids[np.arange(len(self.ids)), np.maximum(self.count - 1, 0)]
        return Rows(live=self.live, stored=self.stored, newest=newest, count=self.count, limit=self.limit,
                    seeds=self.seeds, given=self.given, start=self.start, length=self.length)

    def settle(self, report: Report) -> list[tuple[int, Completion]]:
        """Take over what a call wrote; slots whose answers have ended are free again. -> request and completion of
        each."""
        before, live = self.count, self.live
        self._write(report)
        self.count = np.array(report.count)
        done = []
        for slot in map(int, np.flatnonzero(live if self._stops else live & ~report.live)):
            cut = self._completed(slot, int(before[slot]))
            if cut is not None:  # what was written behind it never happened
                self.count[slot] = cut
            if cut is not None or not report.live[slot]:
                done += self._end(slot, stopped=cut is not None or bool(report.stopped[slot]))
        return done

    def _write(self, report: Report) -> None:
        """Columns of a report to their places in the answers."""
        first = (self.count > 0).astype(np.int32)[:, None]  # an answer that went on has nothing in column 0
        column = np.arange(report.tokens.shape[1], dtype=np.int32)[None]
        slot, column = np.nonzero((column >= first) & (column < first + (report.count - self.count)[:, None]))
        place = self.count[slot] + column - first[slot, 0]
        for mine, new in ((self.ids, report.tokens), (self.logprobs, report.logprobs),
                          (self.behaviour, report.behaviour)):
            mine[slot, place] = new[slot, column]

    def _completed(self, slot: int, before: int) -> int | None:
        """Tokens of the answer up to the one that completes a stop string, of those written since `before`."""
        if self._stops is None:
            return None
        first = max(before, int(self.start[slot] + self.length[slot]))
        new = self.ids[slot, first:self.count[slot]].tolist()
        found, self._before[slot] = self._stops.find(new, self._before[slot])
        return None if found is None else first + found + 1

    def _end(self, slot: int, *, stopped: bool) -> list[tuple[int, Completion]]:
        """The completion of a slot, unless an injection is due: then it goes on."""
        pending, n = self._pending[slot], int(self.count[slot])
        assert pending is not None
        injection = pending.take(n, stopped)
        if injection is not None:
            self._give(slot, injection.ids, np.zeros(len(injection.ids), np.float32), injected=True)
            return []
        injected, behaviour = np.zeros(n, bool), self.behaviour[slot, :n].copy()
        for start, logprobs, put_in in self._spans[slot]:
            end = min(n, start + len(logprobs))
            behaviour[start:end], injected[start:end] = logprobs[:end - start], put_in
        index, self.request[slot] = int(self.request[slot]), -1
        return [(index, Completion(
            ids=self.ids[slot, :n].copy(), logprobs=self.logprobs[slot, :n].copy(), behaviour=behaviour,
            injected=injected, finish="stop" if stopped else "length"))]

    def _give(self, slot: int, ids: Sequence[int], logprobs: np.ndarray, *, injected: bool) -> None:
        """The next tokens of a slot are these; behind them it runs up to its next pause."""
        n, pending = len(ids), self._pending[slot]
        assert pending is not None
        self.given[slot, :n] = ids
        self.start[slot], self.length[slot] = self.count[slot], n
        self.limit[slot] = pending.pause(int(self.count[slot]) + n)
        self._before[slot] = b""
        if n:
            self._spans[slot].append((int(self.count[slot]), logprobs, injected))
