"""`Generator`: many requests of many lengths through a fixed number of slots, in few shapes."""

import contextlib
import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from distill_jax.decode.loop import Slots, computes_in, programs
from distill_jax.decode.request import Completion, Request
from distill_jax.decode.sampling import Sampling
from distill_jax.decode.stops import StopStrings
from distill_jax.decode.table import Table
from distill_jax.sharding import batch_spec

PASSES = 127
"""Forward passes between two looks of the host at most."""
PASSES_WITH_STRINGS = 15
"""The same where the host looks for stop strings: what is written behind one is thrown away."""
REFILL_COST = 6.0
"""Four times the passes that a refill costs, see `refill_at`. A guess: 1.5 passes; `benchmarks.rollout` is the place to
measure it."""
SHRINK = 4
"""When nothing waits, and answers may be long (`SHRINK_FROM`), the slots become this many times fewer as soon as the
answers that are still written fit: a step costs what its slots cost."""
SHRINK_FROM = 128
"""Shorter answers end before another program for fewer slots pays."""
PREFILL_TOKENS = 65536
"""Padded prompt tokens that are prefilled together at most, where there are several prompts."""


@dataclass(kw_only=True)
class Usage:
    """What the last call of a `Generator` did. prompts, prompt_tokens: prefilled; tokens: written; passes: decoding
    steps; slot_passes: slots in all passes, idle ones included; refills: of slots that had become free."""

    prompts: int = 0
    prompt_tokens: int = 0
    tokens: int = 0
    passes: int = 0
    slot_passes: int = 0
    refills: int = 0


def bucket(n: int, buckets: Sequence[int] = ()) -> int:
    """The smallest bucket that holds n: of `buckets`, or by default of 8, 12, 16, 24, 32, 48, ... (at most a third
    of such a row is padding). Raises ValueError when none is large enough."""
    if buckets:
        fitting = [b for b in buckets if b >= n]
        if not fitting:
            raise ValueError(f"a row of {n} tokens fits no bucket; the largest of {sorted(buckets)} is too short")
        return min(fitting)
    power = max(8, 1 << max(0, n - 1).bit_length())
    return power * 3 // 4 if power >= 16 and n <= power * 3 // 4 else power


def power_of_two(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()


def refill_at(slots: int, limit: int) -> int:
    """Free slots that are worth a refill, of `slots` with answers of at most `limit` tokens: a power-of-two part.

    Waiting for q of B slots leaves q/2 idle; a refill costs about c passes, every q answers of mean length m. Their sum
    is least at q/B = sqrt(2c/m); answers are taken to be half as long as allowed (so `REFILL_COST` is 4c). Short
    answers wait for all slots: then a batch of prompts is computed at once.
    """
    share = math.sqrt(REFILL_COST / limit)
    return max(1, slots >> max(0, round(-math.log2(share))))


def is_all(lot: Slots, source: np.ndarray) -> bool:
    """Whether `source` gives every slot its own prompt, so that the lot can be the slots."""
    used = int(np.sum(source >= 0))
    return len(source) == lot.hidden.shape[0] and np.array_equal(source[:used], np.arange(used))


class Generator:
    """Completes prompts. `params` may be replaced between calls; nothing is compiled again. A `decode.Completer`.

    batch_size     slots: rows that are decoded together; fewer where there are fewer requests (powers of two)
    buckets        prompt lengths to pad to; default: see `bucket`
    mesh           where the parameters lie; slots are spread over its `data` and `fsdp` axes
    token_bytes    bytes of a token (`Tokenizer.token_bytes`), needed for stop strings
    share_prompts  compute equal prompts once; refill: give a slot its next request while others are still writing.
                   Without them (for comparison) every request is prefilled, and a batch ends before the next begins
    Parameters are used where they lie, cast once a call where the model computes in another dtype. Compiled once per
    prompt bucket, number of slots and capacity of the cache (powers of two), and rules. Equal models share it.
    """

    def __init__(self, model: Any, params: Any, *, batch_size: int = 256, buckets: Sequence[int] = (),
                 mesh: Mesh | None = None, token_bytes: Callable[[int], bytes] | None = None,
                 share_prompts: bool = True, refill: bool = True) -> None:
        self.model, self.params, self.mesh, self.token_bytes = model, params, mesh, token_bytes
        self.buckets, self.share_prompts, self.refill = tuple(buckets), share_prompts, refill
        self.row_multiple = 1 if mesh is None else int(np.prod([mesh.shape[a] for a in batch_spec()[0]]))
        if batch_size < 1 or batch_size % self.row_multiple:
            raise ValueError(f"batch_size {batch_size} must be a positive multiple of {self.row_multiple}, the "
                             "number of row shards of the mesh")
        self.batch_size, self.usage = batch_size, Usage()

    def generate(self, prompts: Sequence[np.ndarray], sampling: Sampling, seeds: Sequence[int], *,
                 progress: Callable[[int], None] | None = None) -> list[Completion]:
        """`complete` for plain prompts (i32 [P] each) with a seed each."""
        if len(seeds) != len(prompts):
            raise ValueError(f"{len(prompts)} prompts need as many seeds, got {len(seeds)}")
        requests = [Request(prompt=p, seed=int(s)) for p, s in zip(prompts, seeds)]
        return self.complete(requests, sampling, progress=progress)

    def complete(self, requests: Sequence[Request], sampling: Sampling, *,
                 progress: Callable[[int], None] | None = None) -> list[Completion]:
        """One completion a request, in order; equal requests give equal ones. progress is called with the number of
        answers done whenever there are more.

        Raises ValueError when a prompt is empty or, with its new tokens, longer than the model's context.
        """
        stops = self._check(requests, sampling)
        self.usage = Usage()
        if not requests:
            return []
        out: list[Completion | None] = [None] * len(requests)
        done = 0
        with contextlib.nullcontext() if self.mesh is None else jax.set_mesh(self.mesh):
            work = _Work(self, requests, sampling, stops)
            while done < len(requests):
                ended = work.round()
                for index, completion in ended:
                    out[index] = completion
                done += len(ended)
                if progress and ended:
                    progress(done)
        return [c for c in out if c is not None]

    def _check(self, requests: Sequence[Request], sampling: Sampling) -> StopStrings | None:
        context = getattr(getattr(self.model, "config", None), "context_length", None)
        for i, request in enumerate(requests):
            length, limit = len(request.prompt), request.limit(sampling)
            if length == 0:
                raise ValueError(f"prompt {i} is empty; give at least one token")
            if context is not None and length + limit > context:
                raise ValueError(
                    f"prompt {i} has {length} tokens; with max_new_tokens {limit} that is more than the model's "
                    f"context of {context}: ask for fewer new tokens or shorten the prompt")
        if not sampling.stop_strings:
            return None
        if self.token_bytes is None:
            raise ValueError(f"stop strings {sampling.stop_strings} need the bytes of tokens: give the Generator "
                             "token_bytes=tokenizer.token_bytes, or stop at ids")
        return StopStrings(sampling.stop_strings, self.token_bytes)


class _Work:
    """One call: the requests that wait, the prompts that are prefilled, and the slots.

    groups  indices of the requests of one prompt, longest prompts first
    ready   (prefilled prompts, place among them, request) of those that wait for a slot only
    """

    def __init__(self, owner: Generator, requests: Sequence[Request], sampling: Sampling,
                 stops: StopStrings | None) -> None:
        self.owner, self.requests, self.rules = owner, requests, sampling.rules
        self.programs, self.usage = programs(owner.mesh), owner.usage
        cast = partial(self.programs.compute_params, dtype=owner.model.dtype)
        self.params = owner.params if computes_in(owner.params, owner.model.dtype) else cast(owner.params)
        self.groups, self.ready = deque(self._grouped()), deque[tuple[Slots, int, int]]()
        slots = min(owner.batch_size, max(power_of_two(len(requests)), owner.row_multiple))
        self.table = Table(slots, requests, sampling, stops)
        self.slots: Slots | None = None
        limit = max(r.limit(sampling) for r in requests)
        self.enough = refill_at(slots, limit) if owner.refill else slots
        per_prompt = len(requests) / len(self.groups)
        self.together = min(slots, power_of_two(min(len(self.groups), math.ceil(self.enough / per_prompt))))
        self.most = PASSES_WITH_STRINGS if stops else PASSES
        self.columns = min(self.most + 1, power_of_two(limit))
        self.shrink = SHRINK if owner.refill and limit >= SHRINK_FROM else 0
        self.pauses = any(r.injections for r in requests)

    def round(self) -> list[tuple[int, Completion]]:
        """Fill the free slots, write on for a while -> the answers that ended."""
        self._shrink()
        held = bool(self.table.live.any())
        lots = self._fill()
        passes = min(self.columns - 1, self.table.passes())
        self._take_over(lots, passes, held)
        rows, live = len(self.table.request), int(self.table.live.sum())
        fewer = max(rows // self.shrink, self.owner.row_multiple) if self.shrink else 0
        enough = rows - (fewer if fewer < live else 0)
        if self.ready or self.groups or self.pauses:
            enough = min(rows, rows - live + self.enough)
        before = int(self.table.count.sum())
        self.slots, report = self.programs.advance(
            self.owner.model, self.params, self.slots, self._place(self.table.rows()), np.int32(passes),
            np.int32(enough), rules=self.rules, columns=self.columns)
        report = jax.device_get(report)
        self.usage.passes += int(report.steps)
        self.usage.slot_passes += int(report.steps) * rows
        self.usage.tokens += int(report.count.sum()) - before
        return self.table.settle(report)

    def _grouped(self) -> list[list[int]]:
        groups: dict[Any, list[int]] = {}
        for i, request in enumerate(self.requests):
            key = np.asarray(request.prompt, np.int32).tobytes() if self.owner.share_prompts else i
            groups.setdefault(key, []).append(i)
        return sorted(groups.values(), key=lambda group: -len(self.requests[group[0]].prompt))

    def _shrink(self) -> None:
        """Fewer slots, where nothing waits for those that are free."""
        live = self.table.live
        rows = max(power_of_two(int(live.sum())), self.owner.row_multiple)
        if self.slots is None or not self.shrink or self.groups or self.ready or rows * self.shrink > len(live):
            return
        slots = np.argsort(~live, kind="stable")[:rows].astype(np.int32)
        self.table.select(slots)
        self.slots = self.programs.select(self.slots, slots)

    def _fill(self) -> list[tuple[Slots, np.ndarray]]:
        """Requests to the free slots -> for each lot of prefilled prompts, which of them goes to which slot."""
        free, out = deque(map(int, np.flatnonzero(~self.table.live))), []
        if self.slots is not None and free and (self.ready or self.groups):
            self.usage.refills += 1
        while free and (self.ready or self.groups):
            if not self.ready:
                self._prefill()
            lot, source = self.ready[0][0], np.full(len(self.table.request), -1, np.int32)
            while free and self.ready and self.ready[0][0] is lot:
                _, place, index = self.ready.popleft()
                slot = free.popleft()
                source[slot] = place
                self.table.begin(slot, index)
            out.append((lot, source))
        return out

    def _prefill(self) -> None:
        width = bucket(len(self.requests[self.groups[0][0]].prompt), self.owner.buckets)
        rows = self.together
        while rows > 1 and rows * width > PREFILL_TOKENS:
            rows //= 2
        rows = -(-rows // self.owner.row_multiple) * self.owner.row_multiple
        groups = [self.groups.popleft() for _ in range(min(rows, len(self.groups)))]
        tokens, lengths = np.zeros((rows, width), np.int32), np.zeros(rows, np.int32)
        for place, group in enumerate(groups):
            prompt = self.requests[group[0]].prompt
            tokens[place, :len(prompt)], lengths[place] = prompt, len(prompt)
        lot = self.programs.prefill(self.owner.model, self.params, self._place(tokens), self._place(lengths))
        self.ready.extend((lot, place, index) for place, group in enumerate(groups) for index in group)
        self.usage.prompts += len(groups)
        self.usage.prompt_tokens += int(lengths.sum())

    def _take_over(self, lots: list[tuple[Slots, np.ndarray]], passes: int, held: bool) -> None:
        """Prefilled prompts into their slots, with room for what the next passes store: a power of two, unless all
        that will be asked for is less. held: some slots were writing already."""
        now, whole = self.table.room(passes)
        capacity = min(power_of_two(now), bucket(whole))
        if not held and len(lots) == 1 and is_all(*lots[0]):
            self.slots = self.programs.resize(lots[0][0], capacity)
            return
        if self.slots is None:
            self.slots = self.programs.empty(self.owner.model, len(self.table.request), capacity)
        elif not capacity <= self.slots.capacity < (4 * capacity if held else capacity + 1):
            self.slots = self.programs.resize(self.slots, capacity)
        for prefilled, source in lots:
            self.slots = self.programs.insert(self.slots, prefilled, self._place(source))

    def _place(self, rows: Any) -> Any:
        """Rows spread over the mesh; every process holds all of them and hands its devices their part."""
        mesh = self.owner.mesh
        if mesh is None:
            return rows
        put = lambda x: jax.make_array_from_callback(x.shape, NamedSharding(mesh, batch_spec()), lambda i: x[i])
        return jax.tree.map(put, rows)
