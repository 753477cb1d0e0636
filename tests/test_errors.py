"""What error messages are made of."""

from __future__ import annotations

import pytest

from lavis_aurora.errors import near_names, some


@pytest.mark.parametrize(
    ("names", "options", "expected"),
    [
        ([], {}, ""),
        (["a"], {}, "a"),
        ("abcd", {}, "a, b, c, d"),
        ("abcde", {}, "a, b, c, d and 1 more"),
        (map(str, range(9)), {"limit": 2}, "0, 1 and 7 more"),
        ("abc", {"limit": 2, "separator": "; "}, "a; b and 1 more"),
    ],
)
def test_some_names_the_first_and_counts_the_rest(names, options, expected):
    assert some(names, **options) == expected


def test_near_names_or_else_all_are_named():
    assert near_names("rnak", ["seed", "rank"]) == "; did you mean 'rank'?"
    assert near_names("xyz", ["seed", "rank"]) == "; known: rank, seed"
