"""Frozen dataclasses to plain YAML values and back, typed overrides by path, and differences between two of them.

A spec holds primitives, tuples, dicts with string keys, other frozen dataclasses, enums, and module-level functions.
A dataclass is written as `{"type": "module:qualname", field: value, ...}`, a function as `"module:qualname"`, an enum
by its name. Closures and lambdas are refused: a run must be launchable from its YAML.
"""

import dataclasses
import difflib
import enum
import importlib
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, Union, get_args, get_origin

import yaml


def name_of(obj: Any) -> str:
    """`module:qualname` of a module-level class or function. Raises ValueError for closures and lambdas."""
    name = f"{obj.__module__}:{obj.__qualname__}"
    if "<" in name:
        raise ValueError(f"{name} is not a module-level function: a recipe must be writable to YAML; "
                         "move it to the top of a module")
    return name


def by_name(name: str) -> Any:
    """Inverse of `name_of`. Raises ValueError saying which half is missing."""
    module, _, qual = name.partition(":")
    try:
        obj: Any = importlib.import_module(module)
    except ImportError as e:
        raise ValueError(f"cannot import {module!r} of {name!r}: {e}") from None
    for part in qual.split("."):
        if not hasattr(obj, part):
            raise ValueError(f"{module} has no {qual!r}{_hint(part, dir(obj))}")
        obj = getattr(obj, part)
    return obj


def _hint(word: str, known: list[str]) -> str:
    close = difflib.get_close_matches(word, known, n=3, cutoff=0.5)
    return f"; did you mean {' or '.join(close)}?" if close else ""


def to_plain(value: Any) -> Any:
    """A spec as primitives, lists and dicts. Fields at their defaults are left out."""
    if isinstance(value, enum.Enum):
        return value.name.lower()
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        out: dict[str, Any] = {"type": name_of(type(value))}
        for f in dataclasses.fields(value):
            v = getattr(value, f.name)
            if f.default is not dataclasses.MISSING and v == f.default:
                continue
            if f.default_factory is not dataclasses.MISSING and v == f.default_factory():
                continue
            whole = isinstance(v, int) and not isinstance(v, bool) and f.type in (float, "float")
            out[f.name] = float(v) if whole else to_plain(v)  # 1 and 1.0 are one spec: a run is told by its text
        return out
    if isinstance(value, Mapping):
        return {str(k): to_plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [to_plain(v) for v in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if callable(value):
        return name_of(value)
    raise ValueError(f"{value!r} cannot stand in a recipe; use primitives, frozen dataclasses, or functions")


def from_plain(value: Any, hint: Any = Any, where: str = "") -> Any:
    """Inverse of `to_plain`, checking types on the way. `where` names the place in errors."""
    if isinstance(value, Mapping) and "type" in value:
        cls = by_name(value["type"])
        return build(cls, {k: v for k, v in value.items() if k != "type"}, where)
    return _coerce(value, hint, where)


def build(cls: Any, fields: Mapping[str, Any], where: str = "") -> Any:
    """`cls(**fields)` with every field converted by its annotation; unknown fields are refused with a suggestion."""
    hints = typing.get_type_hints(cls)
    known = [f.name for f in dataclasses.fields(cls)]
    for k in fields:
        if k not in known:
            raise ValueError(f"{_at(where)}{cls.__name__} has no field {k!r}{_hint(k, known)} "
                             f"(fields: {', '.join(known)})")
    try:
        return cls(**{k: from_plain(v, hints[k], f"{where}.{k}" if where else k) for k, v in fields.items()})
    except TypeError as e:
        raise ValueError(f"{_at(where)}{e}") from None


def _at(where: str) -> str:
    return f"{where}: " if where else ""


def _coerce(value: Any, hint: Any, where: str) -> Any:
    origin, args = get_origin(hint), get_args(hint)
    if origin is typing.Annotated:
        return from_plain(value, args[0], where)
    if origin in (Union, types.UnionType):
        return _coerce_union(value, args, where)
    if origin is Literal:
        if value in args:
            return value
        raise ValueError(f"{_at(where)}got {value!r}, expected one of {list(args)}"
                         f"{_hint(str(value), [str(a) for a in args])}")
    if isinstance(value, list | tuple):
        return _coerce_sequence(value, origin, args, hint, where)
    if isinstance(value, Mapping):
        item = args[1] if origin in (dict, Mapping) and len(args) == 2 else Any
        if dataclasses.is_dataclass(hint):
            return build(hint, value, where)
        return {str(k): from_plain(v, item, f"{where}.{k}") for k, v in value.items()}
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return _coerce_enum(value, hint, where)
    return _coerce_scalar(value, hint, origin, where)


def _coerce_union(value: Any, args: tuple[Any, ...], where: str) -> Any:
    if value is None and type(None) in args:
        return None
    errors = []
    # exact types first, so that 1 stays int in int | float and "a" stays str in float | str
    for arg in sorted((a for a in args if a is not type(None)), key=lambda a: type(value) is not a):
        try:
            return from_plain(value, arg, where)
        except ValueError as e:
            errors.append(str(e))
    if len(errors) == 1:
        raise ValueError(errors[0])
    raise ValueError(f"{_at(where)}got {value!r}; none of these fits: " + " | ".join(errors))


def _coerce_sequence(value: Any, origin: Any, args: tuple[Any, ...], hint: Any, where: str) -> tuple[Any, ...]:
    if hint in (str, int, float, bool):
        raise ValueError(f"{_at(where)}got a list, expected {hint.__name__}")
    if origin is tuple and args and args[-1] is not Ellipsis:
        if len(args) != len(value):
            raise ValueError(f"{_at(where)}got {len(value)} values, expected {len(args)}")
        return tuple(from_plain(v, a, f"{where}.{i}") for i, (v, a) in enumerate(zip(value, args, strict=True)))
    item = args[0] if args else Any
    return tuple(from_plain(v, item, f"{where}.{i}") for i, v in enumerate(value))


def _coerce_enum(value: Any, hint: type[enum.Enum], where: str) -> Any:
    if isinstance(value, hint):
        return value
    if isinstance(value, str) and value.upper() in hint.__members__:
        return hint[value.upper()]
    known = [m.lower() for m in hint.__members__]
    raise ValueError(f"{_at(where)}got {value!r}, expected one of {known}{_hint(str(value).lower(), known)}")


def _coerce_scalar(value: Any, hint: Any, origin: Any, where: str) -> Any:
    if hint is Any or isinstance(hint, typing.TypeVar):
        return value
    if hint is float:
        if isinstance(value, str):  # YAML reads 1e-5 as a string
            try:
                return float(value)
            except ValueError:
                pass
        elif isinstance(value, int | float) and not isinstance(value, bool):
            return float(value)
    elif hint is int:
        if isinstance(value, str) and value.lstrip("-").isdigit():
            return int(value)
        if isinstance(value, int | float) and not isinstance(value, bool) and int(value) == value:
            return int(value)
    elif hint is bool:
        if isinstance(value, bool):
            return value
    elif hint is str:
        if isinstance(value, str | int | float) and not isinstance(value, bool):
            return str(value)
    elif hint is type(None):
        if value is None:
            return None
    elif origin is Callable or hint is Callable or getattr(hint, "_is_protocol", False) or origin is type:
        return by_name(value) if isinstance(value, str) else value
    elif isinstance(hint, type) and isinstance(value, hint):
        return value
    name = f"a list, e.g. [{value}]" if origin in (tuple, list) else getattr(hint, "__name__", str(hint))
    raise ValueError(f"{_at(where)}got {value!r} ({type(value).__name__}), expected {name}")


def dump(value: Any) -> str:
    """YAML text of a spec."""
    return yaml.safe_dump(to_plain(value), sort_keys=False, allow_unicode=True, width=110)


def load(text: str, where: str = "") -> Any:
    """Spec from YAML text; `where` names it in errors."""
    return from_plain(parse(text, where))


def parse(text: str, where: str = "") -> Any:
    """Plain value of YAML text. Raises ValueError, in one line, where it is none."""
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as e:
        raise ValueError(f"{_at(where)}not YAML: {' '.join(str(e).split())}") from None


def leaves(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """`(dotted path, value)` of everything inside a spec, containers included."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        items: list[tuple[str, Any]] = [(f.name, getattr(value, f.name)) for f in dataclasses.fields(value)]
    elif isinstance(value, Mapping):
        items = list(value.items())
    elif isinstance(value, list | tuple):
        items = [(str(i), v) for i, v in enumerate(value)]
    else:
        return
    for k, v in items:
        path = f"{prefix}.{k}" if prefix else str(k)
        yield path, v
        yield from leaves(v, path)


def set_path(value: Any, path: str, new: Any, where: str = "") -> Any:
    """A copy of `value` with the field at dotted `path` replaced, the new value converted by the field's annotation.
    `*` stands for every element of a list or mapping: what must agree in all of them is set at once.

    Raises KeyError where the path does not exist and ValueError where the value does not fit.
    """
    head, _, rest = path.partition(".")
    here = f"{where}.{head}" if where else head
    if head == "*" and isinstance(value, Mapping) and value:
        return {k: _replaced(x, rest, new, Any, f"{here}[{k}]") for k, x in value.items()}
    if head == "*" and isinstance(value, list | tuple) and value:
        return tuple(_replaced(x, rest, new, Any, f"{here}[{i}]") for i, x in enumerate(value))
    if isinstance(value, Mapping):
        if head not in value:
            raise KeyError(here)
        return {**value, head: _replaced(value[head], rest, new, Any, here)}
    if isinstance(value, list | tuple):
        if not head.isdigit() or int(head) >= len(value):
            raise KeyError(here)
        i = int(head)
        return (*value[:i], _replaced(value[i], rest, new, Any, here), *value[i + 1:])
    if not dataclasses.is_dataclass(value) or head not in (f.name for f in dataclasses.fields(value)):
        raise KeyError(here)
    hint = typing.get_type_hints(type(value))[head]
    return dataclasses.replace(value, **{head: _replaced(getattr(value, head), rest, new, hint, here)})  # type: ignore


def _replaced(old: Any, rest: str, new: Any, hint: Any, where: str) -> Any:
    return set_path(old, rest, new, where) if rest else _assign(old, new, hint, where)


def _assign(old: Any, new: Any, hint: Any, where: str) -> Any:
    """The new value of a field. A spec with `with_string` says what a bare string in its place means."""
    if isinstance(new, str) and hasattr(old, "with_string"):
        return old.with_string(new)
    if hint is Any and old is not None and not isinstance(new, Mapping) and not dataclasses.is_dataclass(old):
        hint = type(old) if isinstance(old, bool | int | float | str) else Any
        if hint is int and isinstance(new, float):
            hint = float
    return from_plain(new, hint, where)


def diff(a: Any, b: Any, prefix: str = "") -> list[str]:
    """`path: a -> b` lines where two plain values (from `to_plain`) differ."""
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        out = []
        for k in [*a, *(k for k in b if k not in a)]:
            path = f"{prefix}.{k}" if prefix else str(k)
            if k not in a:
                out.append(f"{path}: (default) -> {b[k]!r}")
            elif k not in b:
                out.append(f"{path}: {a[k]!r} -> (default)")
            else:
                out += diff(a[k], b[k], path)
        return out
    if isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        return [line for i, (x, y) in enumerate(zip(a, b, strict=True)) for line in diff(x, y, f"{prefix}.{i}")]
    return [] if a == b else [f"{prefix}: {a!r} -> {b!r}"]
