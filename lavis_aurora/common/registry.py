"""Tables that anyone may add to: what a key of a YAML may name, from this package or another."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Callable, TypeVar

from lavis_aurora.common.errors import AuroraError, did_you_mean

Entry = TypeVar("Entry")


class Registry(Mapping[str, Entry]):
    """Entries by name, in the order in which they came.

    Args:
        key: which key of a YAML names them, for messages.

    Examples:
        >>> FORMS: Registry[Callable] = Registry("gate.form")
        >>> @FORMS.register("residual")
        ... def residual(): ...
    """

    def __init__(self, key: str) -> None:
        self.key = key
        self._entries: dict[str, Entry] = {}

    def register(self, name: str) -> Callable[[Entry], Entry]:
        """Decorator that adds what it stands over.

        Raises:
            AuroraError: the name is taken.
        """

        def add(entry: Entry) -> Entry:
            if name in self._entries:
                raise AuroraError(f"{self.key}: {name!r} is registered already; choose another name")
            self._entries[name] = entry
            return entry

        return add

    def __getitem__(self, name: str) -> Entry:
        """The entry; an AuroraError with the nearest names if there is none."""
        if name not in self._entries:
            raise AuroraError(f"{self.key}: unknown value {name!r}{did_you_mean(str(name), self._entries)}")
        return self._entries[name]

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)
