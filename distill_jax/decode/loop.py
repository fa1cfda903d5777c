"""The decode loop: one jitted function of static shapes, from prompts to completions.

B rows, P prompt tokens (right-padded), N new tokens at most, V vocabulary. Rows never see each other, and a row's
randomness comes from its own seed: another batch around it changes its logits by rounding at most.
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from distill_jax.core.tree import map_with_path
from distill_jax.decode.sampling import Sampling, choose, logprob, row_keys
from distill_jax.sharding import constrain

Array = Any

FIRST_STAGE = 256


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Decoded:
    """tokens i32 [B,N]: the new tokens, 0 beyond a row's length. lengths i32 [B], the stop token included.
    stopped bool [B]: ended by a stop id (else by the limit).
    logprobs float32 [B,N]: of the tokens under the model itself (temperature 1, whole vocabulary), what the trainer
    computes for them. behaviour float32 [B,N]: under the rules they were drawn with (0 when greedy)."""

    tokens: Array
    lengths: Array
    stopped: Array
    logprobs: Array
    behaviour: Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class _State:
    """What the loop carries. step: tokens chosen so far; last i32 [B]: the newest; done: takes no more tokens."""

    step: Array
    last: Array
    done: Array
    cache: Any
    out: Decoded


def decode(model: Any, params: Any, prompts: Array, lengths: Array, seeds: Array, sampling: Sampling) -> Decoded:
    """Complete a batch of prompts; pure, to be jitted with `model` and `sampling` static.

    prompts i32 [B,P] right-padded; lengths i32 [B] (0: an empty row that takes no part); seeds uint32 [B].
    The loop ends as soon as every row has stopped.
    """
    rows, width = prompts.shape
    params = compute_params(params, model.dtype)
    keys = row_keys(seeds)
    real = (jnp.arange(width, dtype=jnp.int32)[None] < lengths[:, None]).astype(jnp.int32)
    first = _forward(model, params, prompts, real, model.init_cache(rows, width))
    ends = jnp.maximum(lengths - 1, 0)[:, None, None]
    hidden = jnp.take_along_axis(first.hidden, ends, axis=1)[:, 0]
    state = _State(step=jnp.int32(0), last=jnp.zeros(rows, jnp.int32), done=lengths == 0, cache=first.cache,
                   out=_empty(rows, sampling.max_new_tokens))
    state = _take(state, model.head(params).logits(hidden), keys, sampling)

    def body(state: _State) -> _State:
        out = _forward(model, params, state.last[:, None], (~state.done).astype(jnp.int32)[:, None], state.cache)
        return _take(replace(state, cache=out.cache), model.head(params).logits(out.hidden[:, 0]), keys, sampling)

    for limit in stages(sampling.max_new_tokens):
        # The token chosen last is not fed back, so it needs no slot.
        state = replace(state, cache=state.cache.grow(width + limit - 1))
        going = lambda state, limit=limit: (state.step < limit) & ~jnp.all(state.done)
        state = jax.lax.while_loop(going, body, state)
    return state.out


def stages(new: int) -> list[int]:
    """Numbers of tokens after which the cache grows: 256, 1024, 4096, ... and `new`.

    A step reads the whole cache, so short completions should not pay for room that only long ones need; each stage
    compiles the loop's body once more.
    """
    out = [new]
    limit = FIRST_STAGE
    while limit < new:
        out.insert(-1, limit)
        limit *= 4
    return out


def _forward(model: Any, params: Any, tokens: Array, segment_ids: Array, cache: Any) -> Any:
    out = model.apply({"params": params}, tokens, segment_ids=segment_ids, cache=cache, method="hidden")
    pin = lambda x: constrain(x, "cache") if x.ndim == 5 else x
    return type(out)(hidden=out.hidden, taps=out.taps, cache=jax.tree.map(pin, out.cache))


def _empty(rows: int, new: int) -> Decoded:
    return Decoded(tokens=jnp.zeros((rows, new), jnp.int32), lengths=jnp.zeros(rows, jnp.int32),
                   stopped=jnp.zeros(rows, bool), logprobs=jnp.zeros((rows, new), jnp.float32),
                   behaviour=jnp.zeros((rows, new), jnp.float32))


def _take(state: _State, logits: Array, keys: Array, sampling: Sampling) -> _State:
    """Choose a token for every row that is not done, from float32 logits [B,V], and write it down."""
    step_keys = jax.vmap(partial(jax.random.fold_in, data=state.step))(keys)
    token, behaviour = choose(logits, step_keys, sampling)
    live = ~state.done
    token = jnp.where(live, token, 0)
    put = lambda all_steps, new: jax.lax.dynamic_update_index_in_dim(
        all_steps, jnp.where(live, new, jnp.zeros_like(new)), state.step, axis=1)
    hit = live & jnp.any(token[:, None] == jnp.asarray(sampling.stop_ids, jnp.int32)[None], axis=-1)
    old = state.out
    out = Decoded(tokens=put(old.tokens, token), lengths=old.lengths + live.astype(jnp.int32),
                  stopped=old.stopped | hit, logprobs=put(old.logprobs, logprob(logits, token)),
                  behaviour=put(old.behaviour, behaviour))
    return _State(step=state.step + 1, last=token, done=state.done | hit, cache=state.cache, out=out)


def compute_params(params: Any, dtype: Any) -> Any:
    """Parameters in the dtype they are used in, so that a step does not read and cast the float32 masters.

    Norm scales stay as they are: the model uses them in float32.
    """
    used = lambda path, x: x if path.endswith("scale") else x.astype(dtype)
    return map_with_path(used, params)
