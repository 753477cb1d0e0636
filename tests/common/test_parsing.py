"""Sections of keys as dataclasses: what is taken, what is refused, and by which name."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Optional

import pytest

from lavis_aurora.common.errors import AuroraError
from lavis_aurora.common.parsing import check_section, parse


@dataclass
class Inner:
    size: int
    share: float = 0.5

    def __post_init__(self) -> None:
        if self.size < 0:
            raise AuroraError("inner.size: below 0")


@dataclass
class Outer:
    name: str = ""
    on: bool = False
    inner: Optional[Inner] = None
    sizes: list[int] = field(default_factory=list)
    parts: dict[str, list[int]] = field(default_factory=dict)
    any: Any = None
    maybe: Optional[int] = None


def test_sections_lists_and_whole_numbers() -> None:
    given = {"inner": {"size": 3, "share": 1}, "sizes": [1, 2], "parts": {"a": [4]}, "any": {"x": [None]}}
    read = parse(Outer, given)
    assert read == Outer("", False, Inner(3, 1.0), [1, 2], {"a": [4]}, {"x": [None]}, None)
    assert type(read.inner.share) is float
    assert parse(Outer, {"inner": None, "maybe": None}) == parse(Outer, {})


WRONG = [
    ([], "the file: must be a section of keys, not []"),
    ({"nam": 1}, "nam: unknown key; did you mean 'name'?"),
    ({3: 1}, "3: unknown key; known: "),
    ({"inner": {}}, "inner.size: missing"),
    ({"inner": {"size": 1, "shar": 1}}, "inner.shar: unknown key; did you mean 'share'?"),
    ({"inner": [1]}, "inner: must be a section of keys, not [1]"),
    ({"inner": {"size": True}}, "inner.size: True is not a int"),
    ({"inner": {"size": 1.0}}, "inner.size: 1.0 is not a int"),
    ({"inner": {"size": 1, "share": 10**400}}, "inner.share: 1000"),
    ({"inner": {"size": 1, "share": None}}, "inner.share: None is not a float"),
    ({"inner": {"size": -1}}, "inner.size: below 0"),
    ({"sizes": {"a": 1}}, "sizes: {'a': 1} is not a list"),
    ({"sizes": [1, "x"]}, "sizes[1]: 'x' is not a int"),
    ({"parts": [1]}, "parts: [1] is not a dict"),
    ({"parts": {"a": 3}}, "parts.a: 3 is not a list"),
    ({"name": ["x"]}, "name: ['x'] is not a str"),
    ({"on": "maybe"}, "on: 'maybe' is not a bool"),
    ({"on": 2}, "on: 2 is not a bool"),
    ({"maybe": "many"}, "maybe: 'many' is not a int"),
]


@pytest.mark.parametrize("convert", [False, True])
@pytest.mark.parametrize(("given", "message"), WRONG)
def test_what_cannot_be_used_is_named(given: Any, message: str, convert: bool) -> None:
    with pytest.raises(AuroraError) as caught:
        parse(Outer, given, convert=convert)
    assert str(caught.value).startswith(message)


def test_names_start_where_the_section_stands() -> None:
    with pytest.raises(AuroraError, match=r"^model\.inner\.size: 'x' is not a int"):
        parse(Outer, {"inner": {"size": "x"}}, "model")


def test_other_spellings_are_taken_where_that_is_asked_for() -> None:
    spelt = {"name": 5, "on": "Yes", "inner": {"size": "3", "share": "1e-3"}, "maybe": "4"}
    assert parse(Outer, spelt, convert=True) == Outer("5", True, Inner(3, 0.001), maybe=4)
    for key, value in spelt.items():
        with pytest.raises(AuroraError, match=f"^{key}"):
            parse(Outer, {key: value})


def test_a_check_builds_nothing() -> None:
    assert check_section(Outer, {"inner": {"size": -1}}) == {"inner": {"size": -1}}
