"""The one exception that users are meant to see as a single line."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class AuroraError(ValueError):
    """Input that cannot be used. The message names the file or key, the problem and the remedy."""


def near_names(name: str, known: Iterable[str], limit: int = 3) -> str:
    """'; did you mean 'rank'?' for the known names closest to ``name``, or '; known: ...' if none is near."""
    known = sorted(known)
    near = difflib.get_close_matches(name, known, n=limit, cutoff=0.6)
    if near:
        return f"; did you mean {' or '.join(repr(n) for n in near)}?"
    return f"; known: {', '.join(known)}"


def some(names: Iterable[str], limit: int = 4, separator: str = ", ") -> str:
    """The first ``limit`` of the names, and how many more there are.

    >>> some("abcdef")
    'a, b, c, d and 2 more'
    """
    names = list(names)
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return separator.join(names[:limit]) + more
