"""What all figures have in common."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lavis_aurora.analysis.drawing import spread_labels


@given(st.lists(st.floats(0, 1), max_size=12).map(sorted))
def test_names_do_not_overlap_and_stay_in_the_panel(heights):
    moved = spread_labels(heights, 0.06)
    assert len(moved) == len(heights)
    assert all(high - low > 0.06 - 1e-9 for low, high in zip(moved, moved[1:]))
    assert all(height < 0.98 + 1e-9 for height in moved)


def test_names_that_are_apart_stay():
    assert spread_labels([0.1, 0.5, 0.9], 0.1) == [0.1, 0.5, 0.9]
    assert spread_labels([0.5, 0.5], 0.1) == [0.5, 0.6]
    assert spread_labels([0.95, 1.2], 0.1) == pytest.approx([0.88, 0.98])
