"""safetensors files, read and written one tensor at a time.

The format is eight bytes of length, a JSON header {name: {dtype, shape, data_offsets}}, and the bytes. The library
writes whole dictionaries and has no slices of bfloat16 in NumPy; here a file of any size costs one tensor of memory.
"""

import contextlib
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

DTYPES: dict[str, np.dtype] = {
    "F64": np.dtype(np.float64), "F32": np.dtype(np.float32), "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16), "I64": np.dtype(np.int64), "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16), "I8": np.dtype(np.int8), "U8": np.dtype(np.uint8), "BOOL": np.dtype(np.bool_),
}
CODES = {dtype: code for code, dtype in DTYPES.items()}

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies: file, offset of its first byte, dtype, shape."""

    file: Path
    offset: int
    dtype: np.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def rows(self, entry: int, start: int, stop: int) -> "TensorInfo":
        """Of a stack of matrices [E, rows, columns]: rows `start` to `stop` of matrix `entry`."""
        _, height, width = self.shape
        skip = (entry * height + start) * width * self.dtype.itemsize
        return TensorInfo(self.file, self.offset + skip, self.dtype, (stop - start, width))

    def read(self, index: tuple[slice, ...] = ()) -> np.ndarray:
        """The part `index` of the tensor, as memory of its own (the mapping of the file is dropped at once)."""
        if not math.prod(self.shape):
            return np.zeros(self.shape, self.dtype)[index]
        flat = np.memmap(self.file, np.uint8, "r", offset=self.offset, shape=(self.nbytes,))
        return np.array(flat.view(self.dtype).reshape(self.shape)[index], copy=True)


def read_header(file: Path) -> dict[str, TensorInfo]:
    """The tensors of one file. Raises ValueError naming the file where it is cut or no safetensors file."""
    size = file.stat().st_size
    with file.open("rb") as f:
        length = int.from_bytes(f.read(8), "little")
        if size < 8 or length > size - 8:
            raise ValueError(f"{file} is not a whole safetensors file: {size} bytes, header of {length}")
        try:
            header: dict[str, Any] = json.loads(f.read(length))
        except ValueError:
            raise ValueError(f"{file} is not a safetensors file: its header is no JSON") from None
    header.pop("__metadata__", None)
    out: dict[str, TensorInfo] = {}
    for name, entry in header.items():
        if entry["dtype"] not in DTYPES:
            raise ValueError(f"{file}: {name} has dtype {entry['dtype']}; known: {', '.join(DTYPES)}")
        info = TensorInfo(file, 8 + length + entry["data_offsets"][0], DTYPES[entry["dtype"]], tuple(entry["shape"]))
        if info.offset + info.nbytes > size:
            raise ValueError(f"{file} is cut: {name} ends at byte {info.offset + info.nbytes}, the file at {size}")
        out[name] = info
    return out


def open_tensors(folder: Path) -> dict[str, TensorInfo]:
    """All tensors of a checkpoint folder: one file, or the shards that its index names."""
    if (folder / INDEX).is_file():
        weight_map: dict[str, str] = json.loads((folder / INDEX).read_text())["weight_map"]
        files = sorted(set(weight_map.values()))
        absent = [f for f in files if not (folder / f).is_file()]
        if absent:
            raise ValueError(f"{folder}: {INDEX} names {len(absent)} files that are not there: {', '.join(absent)}")
        found = {name: info for f in files for name, info in read_header(folder / f).items()}
        lost = sorted(set(weight_map) - set(found))
        if lost:
            raise ValueError(f"{folder}: {INDEX} names tensors that no file holds: {', '.join(lost)}")
        return found
    if (folder / SINGLE).is_file():
        return read_header(folder / SINGLE)
    others = sorted(p.name for p in folder.glob("*") if p.suffix in (".bin", ".pt", ".safetensors", ".gguf"))
    hint = f"; it has {', '.join(others)}" if others else ""
    raise ValueError(f"{folder} has neither {SINGLE} nor {INDEX}{hint}: only safetensors weights are read")


@dataclass(frozen=True)
class Entry:
    """A tensor to write; `fetch` makes its value when its turn comes."""

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]
    fetch: Callable[[], np.ndarray | None]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def plan_shards(entries: Sequence[Entry], max_bytes: int) -> list[list[Entry]]:
    """Consecutive entries in files of at most `max_bytes` (a larger tensor has a file of its own)."""
    shards: list[list[Entry]] = [[]]
    used = 0
    for e in entries:
        if shards[-1] and used + e.nbytes > max_bytes:
            shards.append([])
            used = 0
        shards[-1].append(e)
        used += e.nbytes
    return shards


def write_tensors(folder: Path, entries: Sequence[Entry], max_bytes: int, *, writes: bool = True) -> None:
    """One `model.safetensors`, or shards and their index. `writes=False`: fetch everything, write nothing (the other
    processes of a multi-host run take part in the transfers)."""
    shards = plan_shards(entries, max_bytes)
    names = [SINGLE] if len(shards) == 1 else [
        f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    for name, shard in zip(names, shards):
        with _file(folder / name, shard, writes) as write:
            for e in shard:
                write(e.fetch())
    if writes and len(shards) > 1:
        weight_map = {e.name: name for name, shard in zip(names, shards) for e in shard}
        index = {"metadata": {"total_size": sum(e.nbytes for e in entries)}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


@contextlib.contextmanager
def _file(path: Path, shard: Sequence[Entry], writes: bool) -> Iterator[Callable[[np.ndarray | None], None]]:
    if not writes:
        yield lambda value: None
        return
    header: dict[str, Mapping[str, Any]] = {"__metadata__": {"format": "pt"}}
    at = 0
    for e in shard:
        header[e.name] = {"dtype": CODES[e.dtype], "shape": list(e.shape), "data_offsets": [at, at + e.nbytes]}
        at += e.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as f:
        f.write(len(text).to_bytes(8, "little") + text)

        def write(value: np.ndarray | None) -> None:
            assert value is not None
            f.write(np.ascontiguousarray(value).reshape(-1).view(np.uint8).data)

        yield write
        f.flush()
        os.fsync(f.fileno())
