"""The device's part of decoding: pure functions of static shapes that `programs` compiles once each.

B slots, U prompts prefilled together, P prompt tokens (right-padded), S capacity of the cache, C tokens a slot may
write in one call, F given tokens, V vocabulary. Between calls the device keeps `Slots`; everything small about a slot
comes from the host with every call (`Rows`), and what was written goes back (`Report`). Rows never see each other, and
a row's randomness comes from its own seed and token count: another batch around it, another slot or another division
into calls changes its logits by rounding at most.
"""

from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from distill_jax.core.tree import map_with_path, paths
from distill_jax.decode.sampling import Sampling, choose, logprob, row_keys
from distill_jax.models.cache import Cache
from distill_jax.sharding import constrain

Array = Any


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Slots:
    """k, v [L,B,K,S,head_dim]: keys and values as in `models.cache`; hidden [B,1,D]: final state of each prompt's last
    token, from which the first token of the answer is chosen."""

    k: Array
    v: Array
    hidden: Array

    @property
    def capacity(self) -> int:
        return self.k.shape[3]


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Rows:
    """What the host says of each slot. live bool [B]: takes tokens. stored i32 [B]: tokens in the cache, which are the
    prompt and the answer but for its newest token. newest i32 [B]: that token. count i32 [B]: tokens of the answer;
    limit i32 [B]: it takes no more than so many. seeds uint32 [B].
    given i32 [B,F]: tokens `start` to `start + length` (i32 [B] each) of the answer are these; they never end it."""

    live: Array
    stored: Array
    newest: Array
    count: Array
    limit: Array
    seeds: Array
    given: Array
    start: Array
    length: Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Report:
    """What a call wrote. tokens i32 [B,C], logprobs float32 [B,C] under the model itself (temperature 1, whole
    vocabulary), behaviour float32 [B,C] under the rules: column 0 is the first token of an answer that begins with
    this call, other answers go on in column 1; what lies behind a row's last token means nothing.
    count i32 [B], live, stopped bool [B]: afterwards; stopped: the last token is a stop id. steps i32: passes made."""

    tokens: Array
    logprobs: Array
    behaviour: Array
    count: Array
    live: Array
    stopped: Array
    steps: Array


Written = tuple[Array, Report]
"""The newest token of every slot, and what was written."""


def prefill(model: Any, params: Any, prompts: Array, lengths: Array) -> Slots:
    """prompts i32 [U,P] right-padded, lengths i32 [U] (0: no prompt) -> their keys, values and last states."""
    rows, width = prompts.shape
    real = jnp.arange(width, dtype=jnp.int32)[None] < lengths[:, None]
    hidden, cache = _forward(model, params, prompts, real, model.init_cache(rows, width))
    last = jnp.take_along_axis(hidden, jnp.maximum(lengths - 1, 0)[:, None, None], axis=1)
    return Slots(k=cache.k, v=cache.v, hidden=constrain(last, "hidden"))


def empty(model: Any, rows: int, capacity: int) -> Slots:
    cache, width = model.init_cache(rows, capacity), model.config.hidden_size
    return _pinned(Slots(k=cache.k, v=cache.v, hidden=jnp.zeros((rows, 1, width), model.dtype)))


def resize(slots: Slots, capacity: int) -> Slots:
    """With room for `capacity` tokens a slot: more, or less where no slot holds more."""
    def fit(x: Array) -> Array:
        if capacity <= x.shape[3]:
            return x[:, :, :, :capacity]
        return jnp.pad(x, [(0, 0)] * 3 + [(0, capacity - x.shape[3]), (0, 0)])
    return _pinned(replace(slots, k=fit(slots.k), v=fit(slots.v)))


def select(slots: Slots, index: Array) -> Slots:
    """The slots `index` i32 [N], in this order."""
    return _pinned(Slots(k=slots.k[:, index], v=slots.v[:, index], hidden=slots.hidden[index]))


def insert(slots: Slots, prefilled: Slots, source: Array) -> Slots:
    """Slot b takes over prompt source[b] of `prefilled` (i32 [B]; -1: stays as it is); a prompt may go to many."""
    taken = source >= 0
    index = jnp.maximum(source, 0)
    width = min(slots.capacity, prefilled.capacity)

    def put(mine: Array, new: Array) -> Array:  # a selection and no scatter: slots stay on their devices
        new = constrain(new[:, :, :, :width][:, index], "cache")
        new = jnp.where(taken[None, :, None, None, None], new, mine[:, :, :, :width])
        return jax.lax.dynamic_update_slice_in_dim(mine, new, 0, axis=3)

    hidden = jnp.where(taken[:, None, None], prefilled.hidden[index], slots.hidden)
    return _pinned(Slots(k=put(slots.k, prefilled.k), v=put(slots.v, prefilled.v), hidden=hidden))


def advance(model: Any, params: Any, slots: Slots, rows: Rows, steps: Array, enough: Array, *, rules: Sampling,
            columns: int) -> tuple[Slots, Report]:
    """Write on in every live slot until `enough` slots are not live (any more), or for `steps` < C forward passes.

    Answers of no tokens so far begin with a token chosen from `slots.hidden`, without a pass.
    """
    keys, head = row_keys(rows.seeds), model.head(params)
    take = partial(_take, rows=rows, keys=keys, rules=rules)
    zeros = lambda dtype: jnp.zeros((len(rows.live), columns), dtype)
    report = Report(
        tokens=zeros(jnp.int32), logprobs=zeros(jnp.float32), behaviour=zeros(jnp.float32), count=rows.count,
        live=rows.live, stopped=jnp.zeros(len(rows.live), bool), steps=jnp.int32(0))
    fresh = rows.live & (rows.count == 0)
    first = lambda written: take(written, head.logits(slots.hidden[:, 0]), fresh)
    written = jax.lax.cond(jnp.any(fresh), first, lambda written: written, (rows.newest, report))

    def going(state: tuple[Cache, Written]) -> Array:
        _, (_, report) = state
        return (report.steps < steps) & (jnp.sum(~report.live) < enough)

    def body(state: tuple[Cache, Written]) -> tuple[Cache, Written]:
        cache, (newest, report) = state
        hidden, cache = _forward(model, params, newest[:, None], report.live[:, None], cache)
        written = newest, replace(report, steps=report.steps + 1)
        return cache, take(written, head.logits(hidden[:, 0]), report.live)

    cache = Cache(k=slots.k, v=slots.v, lengths=rows.stored)
    cache, (_, report) = jax.lax.while_loop(going, body, (cache, written))
    return _pinned(Slots(k=cache.k, v=cache.v, hidden=slots.hidden)), report


def _forward(model: Any, params: Any, tokens: Array, real: Array, cache: Cache) -> tuple[Array, Cache]:
    out = model.apply({"params": params}, tokens, segment_ids=real.astype(jnp.int32), cache=cache, method="hidden")
    kv = out.cache
    return out.hidden, replace(kv, k=constrain(kv.k, "cache"), v=constrain(kv.v, "cache"))


def _pinned(slots: Slots) -> Slots:
    return Slots(k=constrain(slots.k, "cache"), v=constrain(slots.v, "cache"), hidden=constrain(slots.hidden, "hidden"))


def _take(written: Written, logits: Array, live: Array, *, rows: Rows, keys: Array, rules: Sampling) -> Written:
    """A token for every row in `live`, from float32 logits [B,V], written down in the column of this step."""
    newest, old = written
    token, behaviour = choose(logits, jax.vmap(jax.random.fold_in)(keys, old.count), rules)
    drawn = live
    if rows.given.shape[1]:
        place = old.count - rows.start
        drawn = live & ~((place >= 0) & (place < rows.length))
        place = jnp.clip(place, 0, rows.given.shape[1] - 1)[:, None]
        token = jnp.where(drawn, token, jnp.take_along_axis(rows.given, place, axis=1)[:, 0])
    put = lambda table, new: jax.lax.dynamic_update_index_in_dim(table, new, old.steps, axis=1)
    hit = drawn & jnp.any(token[:, None] == jnp.asarray(rules.stop_ids, jnp.int32)[None], axis=-1)
    count = old.count + live.astype(jnp.int32)
    report = Report(
        tokens=put(old.tokens, token), logprobs=put(old.logprobs, logprob(logits, token)),
        behaviour=put(old.behaviour, behaviour), count=count, stopped=old.stopped | hit,
        live=old.live & ~hit & (count < rows.limit), steps=old.steps)
    return jnp.where(live, token, newest), report


def compute_params(params: Any, dtype: Any) -> Any:
    """Parameters in the dtype they are used in, so that a step does not read and cast the float32 masters.

    Norm scales stay as they are: the model uses them in float32.
    """
    used = lambda path, x: x if path.endswith("scale") else x.astype(dtype)
    return map_with_path(used, params)


def computes_in(params: Any, dtype: Any) -> bool:
    """Whether `compute_params` would change nothing."""
    return all(x.dtype == dtype for path, x in paths(params) if not path.endswith("scale"))


class Programs(NamedTuple):
    prefill: Any
    empty: Any
    resize: Any
    select: Any
    insert: Any
    advance: Any
    compute_params: Any


@cache
def programs(mesh: Mesh | None) -> Programs:
    """The functions above, jitted; slots are updated in place. Under a mesh reports are replicated, so that every
    process can read them."""
    outs: dict[str, Any] = {} if mesh is None else {"out_shardings": (None, NamedSharding(mesh, PartitionSpec()))}
    return Programs(
        prefill=jax.jit(prefill, static_argnames="model"),
        empty=jax.jit(empty, static_argnames=("model", "rows", "capacity")),
        resize=jax.jit(resize, static_argnames="capacity"),
        select=jax.jit(select),
        insert=jax.jit(insert, donate_argnames="slots"),
        advance=jax.jit(advance, static_argnames=("model", "rules", "columns"), donate_argnames="slots", **outs),
        compute_params=jax.jit(compute_params, static_argnames="dtype"))
