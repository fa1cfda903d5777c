"""`StoreHeader`: which tokenizer and template made a store, and whether that fits something else."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True)
class StoreHeader:
    """What every row of a store has in common; immutable once written.

    tokenizer  `Tokenizer.info()`: at least `hash` and `real` (number of real ids)
    template   identity of the rendering (`data.render.template_id`)
    extra      JSON of the writer's own (sources, operators, command)
    """

    tokenizer: Mapping[str, Any] = field(default_factory=dict)
    template: str = ""
    extra: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "StoreHeader":
        return cls(**value)


def differences(a: StoreHeader, b: StoreHeader) -> list[str]:
    """What keeps rows of one from standing beside rows of the other, one line each; empty when they fit.

    Tokenizers are compared over real ids: names, folders and the padding of a head do not count.
    """
    x, y = a.tokenizer, b.tokenizer
    out = []
    if x.get("hash") != y.get("hash"):
        out.append(f"tokenizer {x.get('name', '?')} (hash {x.get('hash')}) against {y.get('name', '?')} "
                   f"(hash {y.get('hash')})")
        if x.get("real") != y.get("real"):
            out.append(f"number of real ids: {x.get('real')} against {y.get('real')}")
        if x.get("base_hash") != y.get("base_hash"):
            out.append("the learned vocabularies differ")
        added = [{i: s for s, i in t.get("added", {}).items()} for t in (x, y)]
        changed = [i for i in sorted({*added[0], *added[1]}) if added[0].get(i) != added[1].get(i)]
        out += [f"id {i}: {added[0].get(i)!r} against {added[1].get(i)!r}" for i in changed[:8]]
        out += [f"... and {len(changed) - 8} more added tokens"] if len(changed) > 8 else []
    if a.template != b.template:
        out.append(f"template {a.template!r} against {b.template!r}")
    return out


def compatible(a: StoreHeader, b: StoreHeader) -> bool:
    """True; raises ValueError that says what differs when the two headers do not fit (see `differences`)."""
    found = differences(a, b)
    if found:
        raise ValueError("the two do not fit: " + "; ".join(found)
                         + ". Render the traces again for this student, or attach the signal by byte offsets")
    return True
