"""Rows of different lengths in one zarr v3 array per shard.

A row is a table of n entries with unsigned integer columns. Columns are cut into byte planes (`token.0` is the low
byte of `token`), planes that are zero in the whole shard are left out, and the array of a shard is

    uint8 [chunks, planes, C]      row r holds the chunks first[r] .. first[r] + ceil(n_r / C)

as one file by the sharding codec with inner chunks [1, 1, C] (bytes, zstd level 1, crc32c). A row starts on a chunk,
so that reading it touches no neighbour and damage belongs to one row; the zeros that fill its last chunk cost a few
bytes after zstd. Planes compress apart because each has its own statistics.
"""

import hashlib
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import tensorstore as ts

ARRAY = "c.0.0.0"  # the one outer chunk: the shard file
FILES = ("zarr.json", ARRAY)


def to_planes(columns: Mapping[str, tuple[np.ndarray, int]]) -> np.ndarray:
    """Columns {name: (unsigned integers [n], bytes each)} as uint8 [planes, n], low byte first."""
    out = []
    for values, width in columns.values():
        wide = np.ascontiguousarray(values, dtype="<u4" if width > 2 else "<u2" if width == 2 else "u1")
        out.append(wide.view(np.uint8).reshape(len(wide), wide.itemsize)[:, :width].T)
    return np.concatenate(out)


def plane_names(widths: Mapping[str, int]) -> list[str]:
    """`["token.0", "token.1", ...]`: what `to_planes` makes of columns of these widths."""
    return [f"{name}.{i}" for name, width in widths.items() for i in range(width)]


@dataclass(frozen=True, kw_only=True)
class ArrayMeta:
    """How one array of a shard is stored; kept in the shard's commit.

    path    folder below the store's root
    planes  names of the stored planes; absent planes are zero
    chunk   entries an inner chunk (C)
    sums    checksum of each row's planes, seeded with the identity of the row they belong to: bytes that are valid
            but of another row or shard are noticed
    files   {file name: [bytes, sha256]}
    """

    path: str
    planes: tuple[str, ...]
    chunk: int
    sums: Sequence[int] | np.ndarray
    files: Mapping[str, tuple[int, str]]

    def to_json(self) -> dict[str, Any]:
        return {"path": self.path, "planes": self.planes, "chunk": self.chunk, "sums": [int(s) for s in self.sums],
                "files": self.files}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "ArrayMeta":
        files = {k: (int(v[0]), str(v[1])) for k, v in value["files"].items()}
        return cls(path=value["path"], planes=tuple(value["planes"]), chunk=value["chunk"],
                   sums=np.array(value["sums"], np.uint32), files=files)


def chunk_length(sizes: np.ndarray, least: int, most: int) -> int:
    """Entries an inner chunk for rows of these sizes: the power of two at or above the median, between the two."""
    middle = int(np.median(sizes)) if len(sizes) else 0
    return min(most, max(least, 1 << max(0, middle - 1).bit_length()))


def first_chunks(sizes: np.ndarray, chunk: int) -> np.ndarray:
    """int64 [rows + 1]: first chunk of each row, and the number of chunks."""
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(-(-np.asarray(sizes, np.int64) // chunk))])


@dataclass(frozen=True, kw_only=True)
class Table:
    """What goes into one array of a shard.

    rows   byte planes uint8 [P, n_r] of each row
    names  of the P planes
    seeds  what the rows' checksums begin with
    least, most   limits of the chunk length
    """

    rows: list[np.ndarray]
    names: list[str]
    seeds: np.ndarray
    least: int
    most: int


@dataclass(frozen=True, kw_only=True)
class Encoded:
    """An array ready to be written: `ArrayMeta` but for its path, and the content of its files."""

    planes: tuple[str, ...]
    chunk: int
    sums: tuple[int, ...]
    files: Mapping[str, bytes]

    def meta(self, path: str) -> ArrayMeta:
        files = {k: (len(v), checksum(v)) for k, v in sorted(self.files.items())}
        return ArrayMeta(path=path, planes=self.planes, chunk=self.chunk, sums=self.sums, files=files)


def encode(table: Table) -> Encoded:
    """Lay the rows of a shard out and compress them.

    The array is written to memory first: the files' checksums go into the commit, and the only thing that touches the
    medium is a write of whole files.
    """
    rows = table.rows
    sizes = np.array([r.shape[1] for r in rows], np.int64)
    chunk = chunk_length(sizes, table.least, table.most)
    highest = [r.max(axis=1, initial=0) for r in rows]
    keep = np.flatnonzero(np.max(highest, axis=0)) if rows else np.zeros(0, np.int64)
    sums = tuple(row_sum((row[i] for i in keep), int(seed)) for row, seed in zip(rows, table.seeds, strict=True))
    first = first_chunks(sizes, chunk)
    shape = (int(first[-1]), len(keep), chunk)
    if 0 in shape:
        return Encoded(planes=(), chunk=chunk, sums=sums, files={})
    array = np.zeros(shape, np.uint8)
    for row, start, stop in zip(rows, first[:-1], first[1:]):
        full = row.shape[1] // chunk
        body = row[keep, : full * chunk].reshape(len(keep), full, chunk)
        array[start : start + full] = body.transpose(1, 0, 2)
        if start + full < stop:
            array[stop - 1, :, : row.shape[1] - full * chunk] = row[keep, full * chunk :]
    context = ts.Context({"cache_pool": {"total_bytes_limit": 0}})
    target = {"driver": "memory", "path": ""}
    ts.open(_spec(target, shape), create=True, context=context).result().write(array).result()
    memory = ts.KvStore.open(target, context=context).result()
    files = {k.decode(): memory.read(k).result().value for k in memory.list().result()}
    assert set(files) == set(FILES), sorted(files)
    return Encoded(planes=tuple(table.names[i] for i in keep), chunk=chunk, sums=sums, files=files)


def row_sum(planes: Iterable[np.ndarray], seed: int) -> int:
    """CRC-32 over the planes of a row, begun at `seed`. The stored chunks have their own crc32c."""
    for plane in planes:
        seed = zlib.crc32(np.ascontiguousarray(plane).data, seed)
    return seed


def checksum(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _spec(kvstore: dict[str, Any], shape: tuple[int, int, int]) -> dict[str, Any]:
    inner = [{"name": "bytes"}, {"name": "zstd", "configuration": {"level": 1}}, {"name": "crc32c"}]
    index = [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}]
    sharding = {"chunk_shape": [1, 1, shape[2]], "codecs": inner, "index_codecs": index, "index_location": "end"}
    return {"driver": "zarr3", "kvstore": kvstore, "metadata": {
        "shape": list(shape), "data_type": "uint8", "fill_value": 0,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": list(shape)}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "."}},
        "codecs": [{"name": "sharding_indexed", "configuration": sharding}]}}


class RaggedArray:
    """Random access to the rows of one shard's array. Thread-safe; keeps no data.

    `sizes` are the entries of each row, `seeds` what their checksums begin with. Shape and codecs come from the
    commit, not from `zarr.json`, which is there for other readers: nothing unverified decides how bytes are read.
    """

    def __init__(self, kvstore: dict[str, Any], meta: ArrayMeta, sizes: np.ndarray, seeds: np.ndarray,
                 context: Any) -> None:
        self.meta = meta
        self.sizes = sizes
        self._seeds = seeds
        self._first = first_chunks(sizes, meta.chunk)
        self._array: Any = None
        if meta.planes:
            shape = (int(self._first[-1]), len(meta.planes), meta.chunk)
            self._array = ts.open(_spec(kvstore, shape), open=True, assume_metadata=True, context=context,
                                  recheck_cached_data="open").result()

    def start(self, row: int, batch: Any = None) -> Any:
        """Begin reading a row; the future goes to `finish`. None when the row holds nothing."""
        a, b = int(self._first[row]), int(self._first[row + 1])
        return None if self._array is None or a == b else self._array[a:b].read(batch=batch)

    def finish(self, row: int, future: Any) -> dict[str, np.ndarray]:
        """{plane: uint8 [n]} of the row. Raises ValueError (tensorstore's or ours) when the bytes do not check."""
        n = int(self.sizes[row])
        planes: dict[str, np.ndarray] = {}
        if future is not None:
            data = future.result()
            planes = {name: data[:, i, :].reshape(-1)[:n] for i, name in enumerate(self.meta.planes)}
        if row_sum(planes.values(), int(self._seeds[row])) != int(self.meta.sums[row]):
            raise ValueError("the row's checksum does not match: its bytes are missing or those of another row")
        return planes


def column(planes: Mapping[str, np.ndarray], name: str, n: int, dtype: Any = np.int32) -> np.ndarray:
    """A column of `n` values from its byte planes; absent planes are zero."""
    return narrow(planes, name, n).astype(dtype)  # a copy: a plane would keep all that was read with it


def narrow(planes: Mapping[str, np.ndarray], name: str, n: int) -> np.ndarray:
    """As `column`, in the smallest unsigned type that holds the planes there are. Of one byte, it may be the plane."""
    there = [i for i in range(4) if f"{name}.{i}" in planes]
    if not there:
        return np.zeros(n, np.uint8)
    high = there.pop()
    out = planes[f"{name}.{high}"]
    if high:
        out = out.astype(np.uint16 if high == 1 else np.uint32)
        out <<= 8 * high
    for i in there:
        low = planes[f"{name}.{i}"]
        out |= low if not i else np.left_shift(low, 8 * i, dtype=out.dtype)
    return out
