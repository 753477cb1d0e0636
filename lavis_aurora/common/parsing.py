"""Dataclasses from sections of keys: of a YAML, or of an adapter's json. Every key and type is checked."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import MISSING, fields, is_dataclass
from functools import cache
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from lavis_aurora.common.errors import AuroraError, did_you_mean, shown

T = TypeVar("T")
# Evaluating annotations takes most of the time of a check.
type_hints: Callable[[Any], dict[str, Any]] = cache(get_type_hints)
# Texts of truth values, and numbers that LAVIS's YAMLs have in their place.
TRUTH = {
    **dict.fromkeys(("true", "yes", "on", "y", "1"), True),
    **dict.fromkeys(("false", "no", "off", "n", "0"), False),
}


def parse(
    cls: type[T], section: Any, where: str = "", convert: bool = False, given: Mapping[str, Any] | None = None
) -> T:
    """An instance of a dataclass from a section of keys, sections in it likewise.

    Args and errors as of :func:`check_section`; what ``__post_init__`` raises is raised as it is.

    Args:
        given: fields with their values, which are no keys of the section.
    """
    given = given or {}
    return _build(cls, check_section(cls, section, where, convert, tuple(given)), given)


def check_section(
    cls: type[Any], section: Any, where: str = "", convert: bool = False, given: Collection[str] = ()
) -> dict[str, Any]:
    """What a section holds, once every key and type is checked, but not whether the values can be used.

    Args:
        cls: the dataclass that says which keys there are, of which types.
        section: plain values by key.
        where: its name, for messages; empty for a whole file.
        convert: take a text for the number that it spells, a number for its text, and 0 and 1 for truth values. A
            whole number is a float in any case.
        given: fields that are no keys of the section.

    Raises:
        AuroraError: an unknown key (with the nearest valid names), a missing one, or a value of another type.
    """
    if not isinstance(section, Mapping):
        raise AuroraError(f"{where or 'the file'}: must be a section of keys, not {shown(section)}")
    declared = {field.name: field for field in fields(cls) if field.name not in given}
    for key in section:
        if key not in declared:
            raise AuroraError(f"{_join(where, key)}: unknown key{did_you_mean(str(key), declared)}")
    for key, field in declared.items():
        if key not in section and field.default is MISSING and field.default_factory is MISSING:
            raise AuroraError(f"{_join(where, key)}: missing")
    hints = type_hints(cls)
    return {key: _check(hints[key], value, _join(where, key), convert) for key, value in section.items()}


def section_class(hint: Any) -> type[Any] | None:
    """The dataclass of a section, also of an optional one; None for other types."""
    kinds = (hint, *(get_args(hint) if get_origin(hint) is Union else ()))
    return next((kind for kind in kinds if is_dataclass(kind) and isinstance(kind, type)), None)


def _check(hint: Any, value: Any, key: str, convert: bool) -> Any:
    if hint is Any:
        return value
    kind, parts = get_origin(hint) or hint, get_args(hint)
    if kind is Union:  # Optional[...]: other unions of types no key has
        return None if value is None else _check(parts[0], value, key, convert)
    if section_class(kind) is not None:
        return check_section(kind, value, key, convert)
    if kind is list and isinstance(value, (list, tuple)):
        return [_check(parts[0], part, f"{key}[{i}]", convert) for i, part in enumerate(value)]
    if kind is dict and isinstance(value, Mapping):
        return {name: _check(parts[1], part, _join(key, name), convert) for name, part in value.items()}
    found = _converted(kind, value) if convert else value
    if kind is float and type(found) is int and abs(found) < 2**1023:
        return float(found)
    if type(found) is not kind:
        raise AuroraError(f"{key}: {shown(value)} is not a {kind.__name__}")
    return found


def _converted(kind: type, value: Any) -> Any:
    """A text, a number or a truth value as another of these; anything else as it is."""
    if kind is str and isinstance(value, (bool, int, float)):
        return str(value)
    if kind is bool and isinstance(value, (str, int)):
        return TRUTH.get(str(value).lower(), value)
    try:
        return kind(value) if kind in (int, float) and isinstance(value, str) else value
    except ValueError:
        return value


def _build(cls: type[T], values: Mapping[str, Any], given: Mapping[str, Any] | None = None) -> T:
    hints, built = type_hints(cls), dict(given or {})
    for key, value in values.items():
        inner = section_class(hints[key])
        built[key] = value if value is None or inner is None else _build(inner, value)
    return cls(**built)


def _join(where: str, key: Any) -> str:
    return f"{where}.{key}" if where else str(key)
