"""Round trip, typed overrides, and errors of recipe values."""

import enum
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from distill_jax.core import spec
from distill_jax.core.roles import Role
from distill_jax.train.optim import AdamW


def half(x):
    return x / 2


@dataclass(frozen=True, kw_only=True)
class Inner:
    rate: float = 1e-3
    roles: tuple[Role, ...] = (Role.THINK,)
    kind: Literal["a", "b"] = "a"


@dataclass(frozen=True, kw_only=True)
class Outer:
    inner: Inner = Inner()
    fn: Callable[..., float] = half
    table: Mapping[str, Inner] = field(default_factory=dict)
    items: tuple[Inner | None, ...] = ()
    n: int | None = None
    on: bool = True


@given(rate=st.floats(allow_nan=False, allow_infinity=False), n=st.none() | st.integers(-9, 9), on=st.booleans(),
       keys=st.lists(st.text("abc", min_size=1), max_size=3))
def test_yaml_round_trip(rate, n, on, keys):
    a = Outer(inner=Inner(rate=rate, kind="b"), table={k: Inner(rate=1.5) for k in keys}, n=n, on=on,
              items=(None, Inner(roles=(Role.ANSWER, Role.TOOL))))
    assert spec.load(spec.dump(a)) == a


def test_defaults_are_not_written():
    assert spec.to_plain(Outer()) == {"type": f"{__name__}:Outer"}


def test_set_path_converts_and_refuses():
    a = Outer(table={"x": Inner()})
    assert spec.set_path(a, "inner.rate", "1e-5").inner.rate == 1e-5
    assert spec.set_path(a, "table.x.roles", ["answer"]).table["x"].roles == (Role.ANSWER,)
    assert spec.set_path(a, "table.*.roles", ["answer"]).table["x"].roles == (Role.ANSWER,)
    assert spec.set_path(a, "n", 3).n == 3 and spec.set_path(a, "n", None).n is None
    with pytest.raises(ValueError, match=r"inner\.rate: got 'fast' .*expected float"):
        spec.set_path(a, "inner.rate", "fast")
    with pytest.raises(ValueError, match="expected one of"):
        spec.set_path(a, "inner.kind", "c")
    with pytest.raises(KeyError):
        spec.set_path(a, "inner.lr", 1)


def test_closures_and_unknown_fields_are_refused():
    with pytest.raises(ValueError, match="module-level"):
        spec.dump(Outer(fn=lambda x: x))
    with pytest.raises(ValueError, match="did you mean rate"):
        spec.from_plain(yaml.safe_load(f"{{type: '{__name__}:Inner', rat: 1}}"))
    with pytest.raises(ValueError, match="cannot import"):
        spec.by_name("no.such.module:f")


def test_diff_names_paths():
    a, b = spec.to_plain(Outer(n=1)), spec.to_plain(Outer(n=2, inner=Inner(rate=2.0)))
    assert spec.diff(a, b) == ["n: 1 -> 2", f"inner: (default) -> {b['inner']!r}"]


def test_enum_by_number_is_not_silently_a_name():
    class E(enum.Enum):
        A = 1
    with pytest.raises(ValueError, match="expected one of"):
        spec.from_plain("b", E)


def test_whole_numbers_of_float_fields_have_one_text():
    """A recipe in Python may say warmup=1; read back from its YAML it is 1.0, and the same run."""
    one = AdamW(peak_lr=1, warmup=1)
    assert spec.dump(spec.load(spec.dump(one))) == spec.dump(one) == spec.dump(AdamW(peak_lr=1.0, warmup=1.0))
