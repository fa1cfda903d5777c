"""The lifted loss as a loop over the vocabulary: many tokens, one block of ids at a time, for memory.

A row loss that reads its target's outcomes, the token that stands there and everything else as one tail is the same
function of a short row of logits: those of these C ids, and in one more column the log-sum-exp of all others. So there
are two loops over blocks of ids: the first makes the short rows (an online log-sum-exp), the losses and their gradient
are taken on these, and the second makes the logits again and spreads the gradient over them: as it is on the C ids, by
softmax over the others. A block's head is cast (and gathered over `fsdp`) when its turn comes, its gradient is
finished (and scattered) in its turn: nothing of the head's size exists but the float32 gradient of a device's share.

Shapes: n tokens, V vocabulary (this device's share), b ids of a block, K kept outcomes, C ids of all targets, D width.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from distill_jax.core.batch import TopK
from distill_jax.core.head import NEG, Head, wide
from distill_jax.losses.rows.outcomes import ABSENT
from distill_jax.losses.rows.vocabulary import Part, first_id, greatest, summed
from distill_jax.losses.targets import Labels, SampledTarget, Target, TopKTarget
from distill_jax.objective.memory import block_size
from distill_jax.objective.rows import Fields, Grads, Result, RowTerm, Wanted, through_head

Array = Any


class _Columns(NamedTuple):
    """ids int32 [n,C]: those that targets name, each once, the token first; -1 nothing. at: {signal: where its outcomes
    are among them [n,K], -1 nothing}."""

    ids: Array
    at: dict[str, Array]


class _Block(NamedTuple):
    """Rows start to start + b of a device's head. The last block begins early, so that it is whole: its rows below
    `fresh` have had their turn."""

    start: Array
    fresh: Array
    first: Array  # id of row `start`
    head: Head


@dataclass(frozen=True)
class Blocks:
    """One turn of the loop over tokens. `gather` and `scatter`: (source, rows of a kernel) -> what a product needs and
    back, over the mesh."""

    wanted: Mapping[str, Wanted]
    part: Part | None
    chunk: int
    gather: Callable[[str, Array], Array]
    scatter: Callable[[str, Array], Array]

    def __call__(self, terms: Mapping[str, RowTerm], hiddens: dict[str, Array], heads: dict[str, Head], fields: Fields,
                 dynamic: dict[str, dict[str, Array]], so_far: dict[str, Grads]) -> Result:
        """All terms on n tokens. Gradients of kernels and biases are added to those `so_far`."""
        sources = sorted({t.source for t in terms.values()})
        columns = {s: _columns([t.target for t in terms.values() if t.source == s], fields, self._vocab(heads[s]))
                   for s in sources}
        short = {s: self._short(s, hiddens[s], heads[s], columns[s].ids) for s in sources}

        def weighted(short: dict[str, Array]) -> tuple[Array, dict[str, Array]]:
            total, values = jnp.zeros((), wide(*hiddens.values())), {}
            for name, term in terms.items():
                target = _target(term.target, columns[term.source], fields)
                values[name] = term.loss(short[term.source], target, **term.kwargs, **dynamic[name])
                total += jnp.sum(fields.weights[name].astype(total.dtype) * values[name].astype(total.dtype))
            return total, values

        if not any(self.wanted.get(s) for s in sources):
            return Result(*weighted(short), so_far)
        total, back, values = jax.vjp(weighted, short, has_aux=True)
        d_short, = back(jnp.ones_like(total))
        grads = {s: self._spread(s, hiddens[s], heads[s], columns[s].ids, short[s], d_short[s], so_far[s])
                 for s in sources if self.wanted.get(s)}
        return Result(total, values, grads)

    def _vocab(self, head: Head) -> int:
        return head.vocab * (self.part.parts if self.part else 1)

    def _blocks(self, head: Head, tokens: int) -> tuple[int, int]:
        """(number, ids of each)."""
        size = block_size(head.vocab, tokens, self.chunk)
        return -(-head.vocab // size), size

    def _block(self, source: str, head: Head, dtype: Any, j: Array, size: int) -> _Block:
        start = jnp.minimum(j * size, head.vocab - size)
        rows = lambda x: jax.lax.dynamic_slice_in_dim(x, start, size)
        kernel = self.gather(source, rows(head.kernel).astype(dtype))
        return _Block(start, j * size - start, first_id(head.vocab, self.part) + start,
                      replace(head, kernel=kernel, bias=None if head.bias is None else rows(head.bias)))

    def _short(self, source: str, hidden: Array, head: Head, ids: Array) -> Array:
        """[n,C+1]: the logits of `ids`, and the log-sum-exp of all others; NEG where there is none."""
        count, size = self._blocks(head, ids.shape[0])
        dtype = wide(hidden)

        def turn(j: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            top, mass, found = carry
            block = self._block(source, head, hidden.dtype, j, size)
            logits = block.head.finish(block.head.project(hidden), block.first)
            slots = _slots(ids, block, size)
            z = jnp.take_along_axis(logits, jnp.where(slots < size, slots, 0), axis=-1)
            found = jnp.where((slots < size) & (z > ABSENT), z, found)
            apart = _apart(slots, block, size)
            higher = jnp.maximum(top, jnp.max(jnp.where(apart, NEG, logits), axis=-1))
            above = jnp.where(higher > ABSENT, higher, -NEG)[:, None]
            rest = jnp.sum(jnp.where(apart, 0.0, jnp.exp(logits - above)), axis=-1)
            return higher, mass * jnp.exp(top - higher) + rest, found

        none = jnp.full(ids.shape[:1], NEG, dtype), jnp.zeros(ids.shape[:1], dtype), jnp.full(ids.shape, NEG, dtype)
        top, mass, found = jax.lax.fori_loop(jnp.int32(0), jnp.int32(count), turn, none)
        if self.part:
            highest = greatest(top, self.part)
            top, mass = highest, summed(mass * jnp.exp(top - highest), self.part)
            found = greatest(found, self.part)
        rest = jnp.where(mass > 0, top + jnp.log(jnp.where(mass > 0, mass, 1.0)), NEG)
        return jnp.concatenate([found, rest[:, None]], axis=-1)

    def _spread(self, source: str, hidden: Array, head: Head, ids: Array, short: Array, d_short: Array, so_far: Grads
                ) -> Grads:
        """Gradients, from that of the short rows."""
        count, size = self._blocks(head, ids.shape[0])
        wanted = self.wanted[source]
        rest = jnp.where(short[:, -1] > ABSENT, short[:, -1], -NEG)[:, None]  # exp(logits - rest) = 0 without others
        d_ids, d_rest = jnp.where(short[:, :-1] > ABSENT, d_short[:, :-1], 0.0), d_short[:, -1:]
        row = jnp.arange(ids.shape[0])[:, None]

        def turn(j: Array, carry: Grads) -> Grads:
            block = self._block(source, head, hidden.dtype, j, size)
            raw = block.head.project(hidden)
            logits, back = jax.vjp(lambda r, b: replace(block.head, bias=b).finish(r, block.first), raw,
                                   block.head.bias)
            slots = _slots(ids, block, size)
            others = jnp.where(_apart(slots, block, size), 0.0, d_rest * jnp.exp(logits - rest))
            # Rounded as it will be anyway, before the scatter: that saves a pass over [n,b] in float32.
            d_logits = others.astype(hidden.dtype).at[row, slots].set(d_ids.astype(hidden.dtype), mode="drop")
            d_raw, d_bias = back(d_logits.astype(logits.dtype))
            part = through_head(d_raw, d_bias, hidden, block.head, wanted, None)
            add = lambda acc, x: None if acc is None else jax.lax.dynamic_update_slice_in_dim(
                acc, jax.lax.dynamic_slice_in_dim(acc, block.start, size) + x, block.start, 0)
            kernel = None if carry.kernel is None else add(carry.kernel, self.scatter(source, part.kernel))
            return Grads(None if carry.hidden is None else carry.hidden + part.hidden, kernel,
                         add(carry.bias, part.bias))

        none = jnp.zeros(hidden.shape, wide(hidden)) if wanted.hidden else None
        out = jax.lax.fori_loop(jnp.int32(0), jnp.int32(count), turn, so_far._replace(hidden=none))
        return out._replace(hidden=summed(out.hidden, self.part) if wanted.hidden else None)


def _slots(ids: Array, block: _Block, size: int) -> Array:
    """Where `ids` [n,C] are in the block; `size`, beyond it, for those that are not or have had their turn."""
    at = ids - block.first
    return jnp.where((ids >= 0) & (at >= block.fresh) & (at < size), at, size)


def _apart(slots: Array, block: _Block, size: int) -> Array:
    """bool [n,b]: named by a target, or had its turn."""
    named = jnp.zeros((slots.shape[0], size), bool).at[jnp.arange(slots.shape[0])[:, None], slots].set(
        True, mode="drop")
    return named | (jnp.arange(size, dtype=slots.dtype) < block.fresh)[None, :]


def _columns(targets: list[str], fields: Fields, vocab: int) -> _Columns:
    ids, at = jnp.clip(fields.tokens, 0, vocab - 1)[:, None], {}
    for name in targets:
        signal = fields.signals.get(name.removeprefix("signals/"))
        new = getattr(signal, "ids", None)
        if new is None or name in at:
            continue
        same = (new[:, :, None] == ids[:, None, :]) & (new >= 0)[:, :, None]
        there = jnp.any(same, axis=-1)
        own = ids.shape[1] + jnp.arange(new.shape[1], dtype=ids.dtype)
        at[name] = jnp.where(there, jnp.argmax(same, axis=-1).astype(ids.dtype), jnp.where(new >= 0, own, -1))
        ids = jnp.concatenate([ids, jnp.where(there, -1, new)], axis=-1)
    return _Columns(ids, at)


def _target(name: str, columns: _Columns, fields: Fields) -> Target:
    """What `rows.target_of` gives, in the numbering of short rows."""
    token = jnp.zeros_like(fields.tokens)
    if name == "tokens":
        return Labels(token)
    signal: Any = fields.signals[name.removeprefix("signals/")]
    if name not in columns.at:  # a token signal
        return TopKTarget(token[:, None], signal.logprobs[:, None], None, token)
    if isinstance(signal, TopK):
        return TopKTarget(columns.at[name], signal.logprobs, None, token)
    return SampledTarget(columns.at[name], signal.weights, None)
