"""The one exception that users are meant to see as a single line."""

from __future__ import annotations

import difflib
import reprlib
from collections.abc import Iterable

# Of a value that a message names.
MOST_SHOWN = 100
_REPR = reprlib.Repr()
_REPR.maxlevel = 2
_REPR.maxstring = _REPR.maxother = MOST_SHOWN


class AuroraError(ValueError):
    """Input that cannot be used. The message names the file or key, the problem and the remedy."""


def shown(value: object) -> str:
    """A value as a message names it: on one line and short, whatever a file holds.

    >>> shown("x" * 1000 + "y")[-10:]
    "xxxxxxxxy'"
    """
    text = _REPR.repr(value)
    return text if len(text) <= 2 * MOST_SHOWN else f"{text[: 2 * MOST_SHOWN]}..."


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
