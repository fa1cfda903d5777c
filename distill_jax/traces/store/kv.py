"""Where a store lives: a folder or an object store behind one small key-value interface.

`open_kv("traces/")`, `open_kv("gs://bucket/traces")`, `open_kv("s3://bucket/traces")`. Keys are relative paths.
Writes of one key are atomic and durable when they return (tensorstore renames and syncs files).
"""

import errno
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import tensorstore as ts

_TRANSIENT = ("UNAVAILABLE", "PERMISSION_DENIED", "UNAUTHENTICATED", "DEADLINE_EXCEEDED", "RESOURCE_EXHAUSTED",
              "CANCELLED", "ABORTED")
"""Status codes of a medium that does not answer, as against one that answers with wrong bytes."""


RETRIES = {"max_retries": 8, "initial_delay": "250ms", "max_delay": "8s"}
"""About half a minute in all. tensorstore's own default is 32 retries, a quarter of an hour before a wrong endpoint is
reported."""


def kvstore_spec(url: str | os.PathLike[str]) -> dict[str, Any]:
    """tensorstore's kvstore spec of a path or of a `file://`, `gs://` or `s3://` URL, ending in `/`.

    `s3://` honours AWS_ENDPOINT_URL_S3 or AWS_ENDPOINT_URL, and AWS_REGION or AWS_DEFAULT_REGION, of the environment
    (tensorstore reads neither endpoint by itself).
    """
    text = os.fspath(url)
    scheme, sep, rest = text.partition("://")
    if not sep or scheme == "file":
        path = Path(rest if sep else text).expanduser().absolute()
        return {"driver": "file", "path": path.as_posix().rstrip("/") + "/"}
    if scheme not in ("gs", "s3"):
        raise ValueError(f"{text}: unknown scheme {scheme!r}; use a local path, file://, gs:// or s3://")
    bucket, _, path = rest.partition("/")
    if not bucket:
        raise ValueError(f"{text}: no bucket in the URL; expected {scheme}://bucket/path")
    path = path.strip("/") + "/" if path.strip("/") else ""
    if scheme == "gs":
        return {"driver": "gcs", "bucket": bucket, "path": path, "gcs_request_retries": RETRIES}
    spec: dict[str, Any] = {"driver": "s3", "bucket": bucket, "path": path, "s3_request_retries": RETRIES}
    if os.environ.get("AWS_ACCESS_KEY_ID") and os.environ.get("AWS_SECRET_ACCESS_KEY"):
        spec["aws_credentials"] = {"type": "environment"}  # else it looks for profile files first, and complains
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    if endpoint:
        spec |= {"endpoint": endpoint.rstrip("/"), "aws_region": region or "us-east-1"}
    elif region:
        spec["aws_region"] = region
    return spec


class Kv:
    """Keys below one URL. Errors are OSErrors that name the key."""

    def __init__(self, url: str | os.PathLike[str]) -> None:
        self.url = os.fspath(url)
        self.spec = kvstore_spec(url)
        self._kv = _result(ts.KvStore.open(self.spec), self.url)

    def __repr__(self) -> str:
        return f"Kv({self.url})"

    def read(self, key: str) -> bytes | None:
        """The value, or None where there is no such key."""
        return self.read_many([key])[0]

    def read_many(self, keys: Iterable[str]) -> list[bytes | None]:
        """Several values, fetched concurrently."""
        pending = [(k, self._kv.read(k)) for k in keys]
        out: list[bytes | None] = []
        for key, future in pending:
            got = _result(future, f"{self.url}: {key}")
            out.append(got.value if got.state == "value" else None)
        return out

    def write_many(self, values: dict[str, bytes]) -> None:
        """Write several keys concurrently; returns when all are durable. Nothing is said about order."""
        pending = [(k, self._kv.write(k, v)) for k, v in values.items()]
        failed: Exception | None = None
        for key, future in pending:  # wait for all: no write may still run when the error is out
            try:
                _result(future, f"{self.url}: cannot write {key}")
            except OSError as e:
                failed = failed or e
        if failed is not None:
            raise failed

    def write_new(self, key: str, value: bytes) -> bool:
        """Write a key that must not exist yet; False (and nothing written) when another value is there.

        The same value already there counts as written: a retry of a request whose answer was lost.
        """
        where = f"{self.url}: cannot write {key}"
        missing = _result(self._kv.read(key), where)
        if missing.state == "value":
            return missing.value == value
        done = _result(self._kv.write(key, value, if_equal=missing.stamp.generation), where)
        if done.generation:  # a stale condition is reported by an empty generation, not by an exception
            return True
        return self.read(key) == value

    def keys(self, prefix: str) -> list[str]:
        """Sorted keys that start with `prefix`, which is cut off."""
        found = _result(self._kv.list(_range(prefix), strip_prefix_length=len(prefix)), f"{self.url}: {prefix}")
        return sorted(k.decode() for k in found)

    def folders(self, prefix: str) -> list[str]:
        """Names of the folders directly below `prefix`, which ends in `/`. On a file system empty ones too, and those
        that hold only the lock file of a killed write, which is no key."""
        if self.spec["driver"] == "file":
            path = Path(self.spec["path"] + prefix)
            return sorted(p.name for p in path.iterdir() if p.is_dir()) if path.is_dir() else []
        return sorted({k.split("/", 1)[0] for k in self.keys(prefix) if "/" in k})

    def delete(self, folder: str) -> None:
        """Delete a folder, given with its closing `/`, and everything in it."""
        if self.spec["driver"] == "file":
            shutil.rmtree(self.spec["path"] + folder, ignore_errors=True)
        else:
            _result(self._kv.delete_range(_range(folder)), f"{self.url}: cannot delete {folder}")

    def remove(self, key: str) -> None:
        """Delete one key, if it is there."""
        _result(self._kv.delete_range(ts.KvStore.KeyRange(key, key + "\0")), f"{self.url}: cannot delete {key}")

    def below(self, path: str) -> dict[str, Any]:
        """kvstore spec of a sub-path."""
        return {**self.spec, "path": self.spec["path"] + path}


def _range(prefix: str) -> Any:
    return ts.KvStore.KeyRange(prefix, prefix[:-1] + chr(ord(prefix[-1]) + 1)) if prefix else ts.KvStore.KeyRange()


def _result(future: Any, where: str) -> Any:
    try:
        return future.result()
    except ValueError as e:
        raise as_os_error(e, where) from None


def is_transient(error: Exception) -> bool:
    """Whether a tensorstore error says that the medium did not answer (rather than that the bytes are wrong)."""
    return str(error).startswith(_TRANSIENT)


def as_os_error(error: Exception, where: str) -> OSError:
    """An OSError with one clear line in place of tensorstore's ValueError."""
    text = str(error)
    if "os_error_code='28'" in text or "os_error_code='122'" in text:
        return OSError(errno.ENOSPC, f"{where}: no space left on the device; what was committed before is whole, "
                                     "free some space and run the same command again to continue")
    kind = PermissionError if text.startswith(("PERMISSION_DENIED", "UNAUTHENTICATED")) else OSError
    return kind(f"{where}: {text.splitlines()[0][:300]}")
