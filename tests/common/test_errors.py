"""What error messages are made of."""

from __future__ import annotations

import pickle

import pytest

from lavis_aurora.common.errors import AuroraError, abbreviated, did_you_mean, printable, shown


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
    assert abbreviated(names, **options) == expected


@pytest.mark.parametrize(
    "value",
    ["x" * 10_000_000, ["x" * 10_000_000] * 9, {"a": ["b" * 999] * 9}, 10**900, "a\nb\x1b[31m", {"x" * 999: 1}],
)
def test_a_value_is_shown_on_one_short_line(value):
    text = shown(value)
    assert len(text) < 210 and text.isprintable()
    assert shown("short") == "'short'" and shown([1, {"a": None}]) == "[1, {'a': None}]"


def test_near_names_or_else_all_are_named():
    assert did_you_mean("rnak", ["seed", "rank"]) == "; did you mean 'rank'?"
    assert did_you_mean("xyz", ["seed", "rank"]) == "; known: rank, seed"


HOSTILE = "a\x1b[2Jb\x07\x9b\u202ec\ud800"
SHOWN = r"a\x1b[2Jb\x07\x9b\u202ec\ud800"


def test_what_does_not_show_as_it_is_is_escaped():
    assert printable(HOSTILE) == SHOWN == printable(SHOWN)
    assert printable("a\nb") == r"a\nb" and printable("a\nb", keep="\n") == "a\nb"
    assert printable("猫 é 🐈") == "猫 é 🐈"


def test_names_in_errors_cannot_act_on_the_terminal():
    assert str(AuroraError(f"no such file: {HOSTILE}")) == f"no such file: {SHOWN}"
    assert str(AuroraError("two\nlines")) == "two\nlines"
    assert abbreviated([HOSTILE, "x\ny"]) == SHOWN + r", x\ny"
    assert did_you_mean("q", [HOSTILE]) == f"; known: {SHOWN}"


def test_errors_travel_between_processes():
    assert str(pickle.loads(pickle.dumps(AuroraError("told")))) == "told"
