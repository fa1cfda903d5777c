"""Traces into a store: render each for a tokenizer, append, resume where an earlier start stopped."""

from collections.abc import Iterable
from typing import Any

from distill_jax.data.render import render, template_id
from distill_jax.data.tokenizer import Tokenizer
from distill_jax.traces.store import StoreHeader, TraceStore
from distill_jax.traces.trace import Trace


def store_header(tok: Tokenizer, **extra: Any) -> StoreHeader:
    """Header of a store whose rows are rendered for `tok`."""
    return StoreHeader(tokenizer=tok.info(), template=template_id(tok), extra=extra)


def write_store(url: str, traces: Iterable[Trace], tok: Tokenizer, **extra: Any) -> TraceStore:
    """Render and write traces, in order; the same traces again continue after the last whole shard.

    `traces` must be the same sequence at every start. Returns the complete store.
    """
    store = TraceStore.open_or_create(url, store_header(tok, **extra))
    if store.complete:
        return store
    with store.writer() as writer:
        done = writer.next_row
        for i, trace in enumerate(traces):
            if i >= done:
                writer.append(render(trace, tok))
    store.refresh()
    return store
