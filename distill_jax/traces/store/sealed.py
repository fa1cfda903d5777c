"""JSON files that notice a changed byte, and the error of a store whose bytes are not what was written."""

import hashlib
import json
from typing import Any

_HEAD = b'{"checksum":"'
_DIGITS = 64
MEND = "put a whole copy in its place, or delete the store (or only the folder of the signal) and make it again"


class CorruptShard(ValueError):
    """Stored bytes that are not what was written. `shard` and `row` (of the whole store) are None where the damage
    is not inside one (the manifest, a signal's header) or cannot be pinned to one row."""

    def __init__(self, what: str, *, shard: int | None = None, row: int | None = None) -> None:
        self.what, self.shard, self.row = what, shard, row
        place = [f"{name} {n}" for name, n in (("shard", shard), ("row", row)) if n is not None]
        super().__init__(f"corrupt store: {', '.join(place) + ': ' if place else ''}{what}; {MEND}")

    def __reduce__(self) -> Any:
        return _rebuild, (self.what, self.shard, self.row)


def _rebuild(what: str, shard: int | None, row: int | None) -> CorruptShard:
    return CorruptShard(what, shard=shard, row=row)


def canonical(value: Any, what: str = "value") -> str:
    """Deterministic JSON: sorted keys, no spaces. Raises ValueError when something is not JSON."""
    try:
        return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    except TypeError as e:
        raise ValueError(f"{what} must be plain JSON values: {e}") from None


def seal(body: dict[str, Any], what: str = "value") -> bytes:
    """The object as JSON whose first key, `checksum`, is the SHA-256 of every byte after it."""
    assert body and "checksum" not in body
    rest = ('",' + canonical(body, what)[1:] + "\n").encode("utf-8", "surrogatepass")
    return _HEAD + hashlib.sha256(rest).hexdigest().encode() + rest


def seal_id(data: bytes) -> str:
    """What others name a sealed file by: the first 64 bits of its checksum."""
    return data[len(_HEAD) : len(_HEAD) + 16].decode()


def unseal(data: bytes, what: str, shard: int | None = None) -> dict[str, Any]:
    """Inverse of `seal`. Raises CorruptShard when any byte differs."""
    at = len(_HEAD) + _DIGITS
    if data[: len(_HEAD)] != _HEAD or hashlib.sha256(data[at:]).hexdigest().encode() != data[len(_HEAD) : at]:
        raise CorruptShard(f"{what}: its checksum does not match its content", shard=shard)
    body = json.loads(data.decode("utf-8", "surrogatepass"))
    del body["checksum"]
    return body
