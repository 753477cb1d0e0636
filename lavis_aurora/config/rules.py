"""Rules that values keep, and what is said of those that do not."""

from __future__ import annotations

import re
from typing import Any

from lavis_aurora.errors import AuroraError, near_names, shown


def require(ok: bool, key: str, value: object, need: str) -> None:
    """Refuse the value of a key unless it is ``ok``, with an AuroraError that says what it must be."""
    if not ok:
        raise AuroraError(f"{key}: {shown(value)} cannot be used; it must be {need}")


def one_of(key: str, value: str, known: tuple[str, ...]) -> None:
    """Refuse a value that is not one of those known, with an AuroraError that names the nearest of them."""
    if value not in known:
        raise AuroraError(f"{key}: unknown value {shown(value)}{near_names(str(value), known)}")


def patterns(key: str, value: Any) -> list[str]:
    """Regular expressions, from one or a list of them; an AuroraError if they are none."""
    regexes = [value] if isinstance(value, str) else value
    if not isinstance(regexes, (list, tuple)) or not regexes or not all(isinstance(p, str) for p in regexes):
        raise AuroraError(
            f"{key}: {shown(value)} cannot be used; it must be a name or regular expression, or a list of them"
        )
    for pattern in regexes:
        try:
            re.compile(pattern)
        except (re.error, RecursionError, OverflowError) as error:
            raise AuroraError(f"{key}: {shown(pattern)} is no regular expression ({error})") from None
    return list(regexes)
