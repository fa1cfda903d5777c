"""A folder of an object store, brought to this host once: `mirror("gs://bucket/model", keys) -> Path`.

Several processes of a host share one download (a lock file); a changed object gives another folder, so what is cached
is never stale. DISTILL_JAX_CACHE says where, by default ~/.cache/distill_jax.
"""

import contextlib
import fcntl
import hashlib
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import tensorstore as ts

from distill_jax.traces.store.kv import as_os_error, kvstore_spec

PIECE = 64 * 2**20  # bytes of one request: what a download holds in memory


def cache_root() -> Path:
    return Path(os.environ.get("DISTILL_JAX_CACHE") or Path.home() / ".cache" / "distill_jax")


class Remote:
    """The objects below a `gs://`, `s3://` or `file://` URL, for reading."""

    def __init__(self, url: str) -> None:
        self.url = url
        spec = kvstore_spec(url)
        self._kv = self._do(lambda: ts.KvStore.open(spec).result())

    def _do(self, call: Callable[[], Any]) -> Any:
        try:
            return call()
        except ValueError as e:
            raise as_os_error(e, self.url) from None

    def keys(self) -> list[str]:
        """Relative names of all objects. Raises ValueError when there is none."""
        found = sorted(k.decode() for k in self._do(lambda: self._kv.list().result()))
        if not found:
            raise ValueError(f"nothing at {self.url}; expected a run or a Hugging Face model folder")
        return found

    def read(self, key: str) -> bytes:
        return self._do(lambda: self._kv.read(key).result()).value

    def fingerprint(self, keys: Iterable[str]) -> str:
        """Hash of the names and versions of objects."""
        futures = [(k, self._kv.read(k, byte_range=slice(0, 0))) for k in keys]
        text = "\n".join(f"{k} {self._do(f.result).stamp.generation!r}" for k, f in futures)
        return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()

    def download(self, key: str, target: Path) -> None:
        target.parent.mkdir(parents=True, exist_ok=True)
        with target.open("wb") as f:
            for piece in self._pieces(key):
                f.write(piece)

    def _pieces(self, key: str) -> Iterator[bytes]:
        start = 0
        while True:
            try:
                piece = self._kv.read(key, byte_range=slice(start, start + PIECE)).result().value
            except ValueError as e:
                if "OUT_OF_RANGE" not in str(e):
                    raise as_os_error(e, f"{self.url}: {key}") from None
                yield self._rest(key, start)  # the object ends within this piece
                return
            yield piece
            if len(piece) < PIECE:
                return
            start += PIECE

    def _rest(self, key: str, start: int) -> bytes:
        try:
            return self._kv.read(key, byte_range=slice(start, None)).result().value
        except ValueError as e:
            if start and "OUT_OF_RANGE" in str(e):  # it ended exactly at `start`
                return b""
            raise as_os_error(e, f"{self.url}: {key}") from None


def mirror(remote: Remote, keys: Iterable[str]) -> Path:
    """A local folder with these objects under their relative names, downloaded unless an identical copy is cached."""
    keys = sorted(keys)
    slug = re.sub(r"[^A-Za-z0-9.-]+", "_", remote.url.partition("://")[2]).strip("_")[-80:]
    folder = cache_root() / f"{slug}-{remote.fingerprint(keys)}"
    with locked(folder):
        if not folder.is_dir():
            partial = folder.with_name(f".{folder.name}.partial")
            shutil.rmtree(partial, ignore_errors=True)
            try:
                for key in keys:
                    remote.download(key, partial / key)
                os.replace(partial, folder)
            except BaseException:
                shutil.rmtree(partial, ignore_errors=True)
                raise
    return folder


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """One process of this host at a time."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with folder.with_name(f".{folder.name}.lock").open("w") as f:
        fcntl.flock(f, fcntl.LOCK_EX)
        yield
