"""The one exception that users are meant to see as a single line, how it shows values, and checks that raise it."""

from __future__ import annotations

import difflib
import re
import reprlib
from collections.abc import Collection, Iterable
from typing import Any

# Of a value that a message names.
MAX_SHOWN = 100
_REPR = reprlib.Repr()
_REPR.maxlevel = 2
_REPR.maxstring = _REPR.maxother = MAX_SHOWN


class AuroraError(ValueError):
    """Input that cannot be used. The message names the file or key, the problem and the remedy.

    Names in it may come from a stranger's file; they cannot act on the terminal, see :func:`printable`.

    Attributes:
        exit_status: of a program that ends by it.
    """

    exit_status = 1

    def __init__(self, message: object = "") -> None:
        super().__init__(printable(str(message), keep="\n\t"))


class Diverged(AuroraError):
    """A model gives NaN or infinite numbers, or the same features for everything, as too high a rate leaves it.

    The same run again would end so too, unlike one that was killed or had no room on the disk; hence a status of its
    own.
    """

    exit_status = 3


def printable(text: str, keep: str = "") -> str:
    r"""The text with whatever does not show as it is escaped: control characters, ANSI escapes, direction marks.

    Examples:
        >>> printable("a\x1b[2Jb")
        'a\\x1b[2Jb'

    Args:
        text: of any origin.
        keep: characters that stay as they are, e.g. line breaks.
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in keep else c.encode("unicode_escape").decode() for c in text)


def shown(value: object) -> str:
    """A value as a message names it: on one line and short, whatever a file holds.

    Examples:
        >>> shown("x" * 1000 + "y")[-10:]
        "xxxxxxxxy'"
    """
    text = _REPR.repr(value)
    return text if len(text) <= 2 * MAX_SHOWN else f"{text[: 2 * MAX_SHOWN]}..."


def did_you_mean(name: str, known: Iterable[str], limit: int = 3) -> str:
    """'; did you mean 'rank'?' for the known names closest to ``name``, or '; known: ...' if none is near."""
    known = sorted(map(printable, known))
    near = difflib.get_close_matches(name, known, n=limit, cutoff=0.6)
    if near:
        return f"; did you mean {' or '.join(repr(n) for n in near)}?"
    return f"; known: {', '.join(known)}"


def abbreviated(names: Iterable[str], limit: int = 4, separator: str = ", ") -> str:
    """The first ``limit`` of the names, and how many more there are.

    Examples:
        >>> abbreviated("abcdef")
        'a, b, c, d and 2 more'
    """
    names = list(map(printable, names))
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return separator.join(names[:limit]) + more


def require(ok: bool, key: str, value: object, need: str) -> None:
    """Refuse the value of a key unless it is ``ok``, with an AuroraError that says what it must be."""
    if not ok:
        raise AuroraError(f"{key}: {shown(value)} cannot be used; it must be {need}")


def one_of(key: str, value: str, known: Collection[str]) -> None:
    """Refuse a value that is not one of those known, with an AuroraError that names the nearest of them."""
    if value not in known:
        raise AuroraError(f"{key}: unknown value {shown(value)}{did_you_mean(str(value), known)}")


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
