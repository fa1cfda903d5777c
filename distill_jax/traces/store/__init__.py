"""The trace store: see `store.TraceStore`."""

from distill_jax.traces.store.header import StoreHeader, compatible, differences
from distill_jax.traces.store.heads import StoredHead
from distill_jax.traces.store.rows import Row, RowArrays, RowIndex
from distill_jax.traces.store.sealed import CorruptShard
from distill_jax.traces.store.shards import Raced
from distill_jax.traces.store.signal_io import SignalReader, SignalWriter, Undecoded
from distill_jax.traces.store.signals import (
    HiddenRow,
    SampledRow,
    SignalHeader,
    SignalRow,
    TokenRow,
    TopKRow,
    blank,
    lay,
    truncate_mass,
)
from distill_jax.traces.store.store import TraceStore
from distill_jax.traces.store.writers import StoreWriter

__all__ = [
    "CorruptShard", "HiddenRow", "Raced", "Row", "RowArrays", "RowIndex", "SampledRow", "SignalHeader", "SignalReader",
    "SignalRow", "SignalWriter", "StoreHeader", "StoreWriter", "StoredHead", "TokenRow", "TopKRow", "TraceStore",
    "Undecoded", "blank", "compatible", "differences", "lay", "truncate_mass",
]
