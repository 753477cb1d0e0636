"""docs/configuration.md: its tables are those of the dataclasses."""

from __future__ import annotations

from dataclasses import dataclass, fields

import config_keys
import pytest

from lavis_aurora import config


def test_the_page_is_up_to_date() -> None:
    page = config_keys.PAGE.read_text(encoding="utf-8")
    assert config_keys.with_tables(page) == page, "run python scripts/config_keys.py"


def test_the_page_has_the_keys_of_every_task() -> None:
    page = config_keys.PAGE.read_text(encoding="utf-8")
    for cls in config.RUN_KEYS.values():
        assert f"<!-- keys: {cls.__name__} -->" in page or not cls.__module__.startswith("lavis_aurora")


@pytest.mark.parametrize("name", [name for name in config.__all__ if name.endswith("Config")])
def test_a_docstring_names_no_key_that_is_none(name: str) -> None:
    cls = getattr(config, name)
    assert set(config_keys.meanings(cls)) <= {field.name for field in fields(cls)}


@dataclass
class _Above:
    """Above.

    Attributes:
        size, depth: of a thing, ``a | b``, over
            two lines.
    """

    size: int = 1
    depth: int = 2


@dataclass
class _Below(_Above):
    """Below.

    Attributes:
        name: said: here.
    """

    depth: int = 3
    name: str = ""


def test_a_table_has_what_is_new_or_has_another_default() -> None:
    assert list(config_keys.rows(_Below, "x.")) == [
        "| `x.depth` | `3` | of a thing, `a \\| b`, over two lines. |",
        '| `x.name` | `""` | said: here. |',
    ]
