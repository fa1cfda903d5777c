"""A teacher's output head, stored once beside its hidden states: with it a state becomes exact logits.

    signals/<name>/head/kernel-000.bin, ..., bias-000.bin     blocks of rows, bfloat16 or float32, little-endian

What the files are and their checksums stand in the signal's header, which is written after them.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

from distill_jax.traces.store.kv import Kv
from distill_jax.traces.store.sealed import CorruptShard

BLOCK_BYTES = 1 << 26
_DTYPES: dict[str, Any] = {"bfloat16": np.dtype(ml_dtypes.bfloat16), "float32": np.dtype("<f4")}


@dataclass(frozen=True, kw_only=True, eq=False)
class StoredHead:
    """logits = soft_cap * tanh((states @ kernel.T + bias) * scale / soft_cap), see `core.head.Head`.

    kernel  bfloat16 or float32 [V,D]; bias the same [V], or None
    real    ids from here on are padding and have no mass
    """

    kernel: np.ndarray
    bias: np.ndarray | None = None
    scale: float = 1.0
    soft_cap: float | None = None
    real: int


def write_head(kv: Kv, name: str, head: StoredHead) -> dict[str, Any]:
    """Store the head of signal `name`. Returns what goes into the `head` of its `SignalHeader`."""
    out: dict[str, Any] = {"scale": float(head.scale), "real": int(head.real),
                           "soft_cap": None if head.soft_cap is None else float(head.soft_cap)}
    if head.kernel.ndim != 2 or not 0 < head.real <= len(head.kernel):
        raise ValueError(f"a head needs a kernel [V,D] and 1 to V real ids, got {head.kernel.shape}, {head.real}")
    for part, array in (("kernel", head.kernel), ("bias", head.bias)):
        if array is None:
            continue
        if not np.all(np.isfinite(array.astype(np.float32))):
            raise ValueError(f"the {part} of the teacher's head is not finite")
        files = {}
        for i, block in enumerate(_blocks(array)):
            key, data = f"{part}-{i:03d}.bin", np.ascontiguousarray(block).tobytes()
            kv.write_many({_key(name, key): data})
            files[key] = [len(data), hashlib.sha256(data).hexdigest()]
        out[part] = {"shape": list(array.shape), "dtype": array.dtype.name, "files": files}
    return out


def read_head(kv: Kv, name: str, about: Mapping[str, Any]) -> StoredHead:
    """The head that `about`, the `head` of the signal's header, describes. Raises CorruptShard."""
    parts = {part: _read(kv, name, about[part]) for part in ("kernel", "bias") if part in about}
    return StoredHead(kernel=parts["kernel"], bias=parts.get("bias"), scale=about["scale"],
                      soft_cap=about["soft_cap"], real=about["real"])


def _read(kv: Kv, name: str, about: Mapping[str, Any]) -> np.ndarray:
    keys = [_key(name, key) for key in about["files"]]
    blocks = []
    for key, (size, expected), data in zip(keys, about["files"].values(), kv.read_many(keys)):
        if data is None or len(data) != size or hashlib.sha256(data).hexdigest() != expected:
            raise CorruptShard(f"{kv.url}: {key} is missing or does not match its checksum")
        blocks.append(np.frombuffer(data, _DTYPES[about["dtype"]]))
    return np.concatenate(blocks).reshape(about["shape"])


def _blocks(array: np.ndarray) -> list[np.ndarray]:
    if array.dtype.name not in _DTYPES:
        raise ValueError(f"a head is stored as {' or '.join(_DTYPES)}, got {array.dtype}")
    rows = max(1, BLOCK_BYTES // (array[0].nbytes or 1))
    return [array[i:i + rows] for i in range(0, len(array), rows)]


def _key(name: str, file: str) -> str:
    return f"signals/{name}/head/{file}"
