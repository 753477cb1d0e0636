"""Figures of the rank."""

from __future__ import annotations

import json

from tiny_figures import arguments, sweep_table

from lavis_aurora.analysis.ranks import NESTED, RANK, RANK_KEY


def test_recalls_and_counts_against_the_rank(tmp_path):
    table = sweep_table(tmp_path / "sweep.csv", RANK_KEY, {"16": [30.0, 32.0], "4": [20.0, 21.0], "64": [35.0, 35.0]})
    numbers = RANK.numbers(arguments(RANK, table))
    assert numbers["ranks"] == [4, 16, 64]
    assert numbers["counts"]["Aurora"][numbers["counts"]["ranks"].index(64)] == 130_560
    figure = RANK.draw(numbers)
    assert len(figure.axes) == 3
    drawn = [list(bars.lines[0].get_ydata()) for bars in figure.axes[0].containers]
    assert drawn == [[20.5, 31.0, 35.0], [30.5, 41.0, 45.0], [40.5, 51.0, 55.0]]
    names = {text.get_text() for text in figure.axes[2].texts}
    assert names == {"LoRA", "UniAdapter", "Aurora"}
    # Formulas of another size say nothing of the paper's model.
    small = RANK.numbers(arguments(RANK, table, "--layers", "3", "--width", "128"))
    assert small["paper"] == [] and small["counts"]["UniAdapter"][0] == 3 * 4 * 128 * 4


def test_one_nested_training_beside_each_rank(tmp_path):
    recall = {
        "growing": {"1": {"4": 70.0, "16": 80.0}, "2": {"4": 72.0, "16": 82.0}},
        "dedicated": {"1": {"16": 83.0, "4": 75.0}, "2": {"16": 83.0, "4": 77.0}},
        "largest": {"1": {"4": 20.0, "16": 50.0}},
    }
    table = tmp_path / "nested.json"
    table.write_text(json.dumps({"recall": recall, "seconds": {}, "auto": {}}))
    [axis] = NESTED.draw(NESTED.numbers(arguments(NESTED, table))).axes
    drawn = {bars.get_label(): list(bars.lines[0].get_ydata()) for bars in axis.containers}
    assert drawn == {
        "one training, nested_steps: growing": [71.0, 81.0],
        "each rank by itself": [76.0, 83.0],
        "the largest rank, its largest components": [20.0, 50.0],
    }
    assert "2 seeds" in axis.get_title()
