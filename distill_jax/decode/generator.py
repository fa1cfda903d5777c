"""`Generator`: many prompts of many lengths through the decode loop, in few shapes."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from distill_jax.decode.loop import Decoded, decode
from distill_jax.decode.sampling import Sampling
from distill_jax.sharding import batch_spec


@dataclass(frozen=True, kw_only=True)
class Completion:
    """What one prompt was answered with.

    ids        int32 [n], the stop token included
    logprobs   float32 [n] under the model itself (temperature 1, all tokens allowed): the trainer's numbers
    behaviour  float32 [n] under the rules the tokens were drawn with; 0 when greedy
    finish     "stop": ended by a stop id; "length": cut at max_new_tokens
    """

    ids: np.ndarray
    logprobs: np.ndarray
    behaviour: np.ndarray
    finish: Literal["stop", "length"]


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


@cache
def _compiled(mesh: Mesh | None) -> Any:
    """The jitted loop. Under a mesh its results are replicated, so that every process can read them."""
    outs: dict[str, Any] = {} if mesh is None else {"out_shardings": NamedSharding(mesh, PartitionSpec())}
    return jax.jit(decode, static_argnames=("model", "sampling"), **outs)


class Generator:
    """Completes prompts in batches. `params` may be replaced between calls; nothing is compiled again.

    batch_size  rows of a batch; fewer where there are fewer prompts (powers of two)
    buckets     prompt lengths to pad to; default: see `bucket`
    mesh        where the parameters lie; rows are spread over its `data` and `fsdp` axes
    One compile per (bucket, rows, sampling). Generators of equal models share them.
    """

    def __init__(self, model: Any, params: Any, *, batch_size: int = 256, buckets: Sequence[int] = (),
                 mesh: Mesh | None = None) -> None:
        self.model, self.params, self.mesh = model, params, mesh
        self.buckets = tuple(buckets)
        self.row_multiple = 1 if mesh is None else int(np.prod([mesh.shape[a] for a in batch_spec()[0]]))
        if batch_size < 1 or batch_size % self.row_multiple:
            raise ValueError(f"batch_size {batch_size} must be a positive multiple of {self.row_multiple}, the "
                             "number of row shards of the mesh")
        self.batch_size = batch_size

    def generate(self, prompts: Sequence[np.ndarray], sampling: Sampling, seeds: Sequence[int], *,
                 progress: Callable[[int], None] | None = None) -> list[Completion]:
        """One completion per prompt (i32 [P] each), in order. seeds: one a prompt, any integers; equal seeds and
        prompts give equal completions. progress is called with the number of prompts done, after each batch.

        Raises ValueError when a prompt is empty or, with max_new_tokens, longer than the model's context.
        """
        self._check(prompts, sampling, seeds)
        out: list[Completion | None] = [None] * len(prompts)
        waiting: tuple[np.ndarray, Decoded] | None = None
        done = 0
        for job in [*self._batches([len(p) for p in prompts]), None]:
            running = None if job is None else (job, self._run(prompts, sampling, seeds, job))
            if waiting is not None:  # read the batch before last while the next one runs
                self._collect(out, *waiting)
                done += len(waiting[0])
                if progress:
                    progress(done)
            waiting = running
        return [c for c in out if c is not None]

    def _check(self, prompts: Sequence[np.ndarray], sampling: Sampling, seeds: Sequence[int]) -> None:
        if len(seeds) != len(prompts):
            raise ValueError(f"{len(prompts)} prompts need as many seeds, got {len(seeds)}")
        limit = getattr(getattr(self.model, "config", None), "context_length", None)
        for i, prompt in enumerate(prompts):
            if len(prompt) == 0:
                raise ValueError(f"prompt {i} is empty; give at least one token")
            if limit is not None and len(prompt) + sampling.max_new_tokens > limit:
                raise ValueError(
                    f"prompt {i} has {len(prompt)} tokens; with max_new_tokens {sampling.max_new_tokens} that is "
                    f"more than the model's context of {limit}: ask for fewer new tokens or shorten the prompt")

    def _batches(self, lengths: Sequence[int]) -> Iterator[np.ndarray]:
        """Indices of the prompts of each batch, longest first: neighbours in length share a batch."""
        order = np.argsort(-np.asarray(lengths, np.int64), kind="stable")
        for start in range(0, len(order), self.batch_size):
            yield order[start:start + self.batch_size]

    def _run(self, prompts: Sequence[np.ndarray], sampling: Sampling, seeds: Sequence[int],
             index: np.ndarray) -> Decoded:
        rows = min(self.batch_size, max(power_of_two(len(index)), self.row_multiple))
        width = bucket(max(len(prompts[i]) for i in index), self.buckets)
        tokens, lengths = np.zeros((rows, width), np.int32), np.zeros(rows, np.int32)
        row_seeds = np.zeros(rows, np.uint32)
        for row, i in enumerate(index):
            tokens[row, :len(prompts[i])] = prompts[i]
            lengths[row] = len(prompts[i])
            row_seeds[row] = int(seeds[i]) & 0xFFFFFFFF
        with contextlib.nullcontext() if self.mesh is None else jax.set_mesh(self.mesh):
            place = self._place
            return _compiled(self.mesh)(model=self.model, params=self.params, prompts=place(tokens),
                                        lengths=place(lengths), seeds=place(row_seeds), sampling=sampling)

    def _place(self, rows: np.ndarray) -> Any:
        """Rows spread over the mesh; every process holds all of them and hands its devices their part."""
        if self.mesh is None:
            return rows
        return jax.make_array_from_callback(rows.shape, NamedSharding(self.mesh, batch_spec()), lambda i: rows[i])

    @staticmethod
    def _collect(out: list[Completion | None], index: np.ndarray, decoded: Decoded) -> None:
        host: Decoded = jax.device_get(decoded)
        for row, i in enumerate(index):
            n = int(host.lengths[row])
            cut = lambda x, row=row, n=n: np.array(x[row, :n])
            out[i] = Completion(ids=cut(host.tokens), logprobs=cut(host.logprobs), behaviour=cut(host.behaviour),
                                finish="stop" if host.stopped[row] else "length")
