"""Write the tables of docs/configuration.md from the dataclasses of lavis_aurora.config and their docstrings.

python scripts/config_keys.py      # after a key, its default or its meaning has changed
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path

from lavis_aurora import config

PAGE = Path(__file__).resolve().parents[1] / "docs" / "configuration.md"
TABLE = re.compile(r"(<!-- keys: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def meanings(cls: type) -> dict[str, str]:
    """What the section Attributes of a docstring says of each name, those of the base classes included."""
    found = {}
    for base in reversed(cls.__mro__):
        section = (inspect.getdoc(base) or "").partition("Attributes:\n")[2]
        for entry in re.split(r"\n(?=    \w)", section.strip("\n")):
            names, _, text = " ".join(entry.split()).partition(": ")
            found |= dict.fromkeys(names.split(", "), text.replace("``", "`").replace("|", r"\|")) if text else {}
    return found


def rows(cls: type, prefix: str = "") -> Iterator[str]:
    """A row for each key of a dataclass that its base classes do not have alike; sections follow theirs."""
    above = {f.name: f.default for base in cls.__bases__ if is_dataclass(base) for f in fields(base)}
    said = meanings(cls)
    for field in fields(cls):
        if field.name in above and above[field.name] == field.default:
            continue
        value = field.default_factory() if callable(field.default_factory) else field.default
        if is_dataclass(value):
            yield from rows(type(value), f"{prefix}{field.name}.")
            continue
        shown = value if isinstance(value, str) and value else json.dumps(value)
        yield f"| `{prefix}{field.name}` | `{shown}` | {said.get(field.name, 'as in LAVIS.')} |"


def with_tables(page: str) -> str:
    """The page with its tables as the dataclasses are now."""

    def table(match: re.Match) -> str:
        head, name, end = match.groups()
        lines = ["| key | default | meaning |", "| --- | --- | --- |", *rows(getattr(config, name))]
        return f"{head}\n" + "\n".join(lines) + f"\n\n{end}"

    return TABLE.sub(table, page)


if __name__ == "__main__":
    PAGE.write_text(with_tables(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
