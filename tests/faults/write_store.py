"""`write_store.py URL ROWS`: write a store of generated rows and a signal, continuing where a killed run stopped."""

import sys
import time

from distill_jax.traces.store import SignalHeader, TraceStore
from tests.traces.store.store_builders import HEADER, make_row, make_topk


def main(url: str, rows: int) -> None:
    store = TraceStore.open_or_create(url, HEADER)
    if not store.complete:
        with store.writer(shard_rows=7) as writer:
            for i in range(writer.state.get("next", 0), rows):
                time.sleep(0.001)  # stretches the run, so that kills fall everywhere
                writer.append(make_row(i), {"next": i + 1})
    header = SignalHeader(kind="topk", k=8, teacher="generated")
    lengths = store.lengths()
    with store.signal_writer("topk8", header) as writer:
        for i in range(writer.next_row, len(store)):
            writer.append(make_topk(i, int(lengths[i])))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
