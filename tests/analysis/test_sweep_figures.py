"""Figures of a sweep: rank, context, gate, sharing; and its table."""

from __future__ import annotations

import csv
import json
import statistics
from pathlib import Path
from typing import Optional

import pytest
from tiny_figures import arguments, sweep_table

from lavis_aurora.analysis.paper import metric_title
from lavis_aurora.analysis.ranks import RANK, RANK_KEY
from lavis_aurora.analysis.results import series, write_table
from lavis_aurora.analysis.sweep_figures import (
    COMPARISON,
    CONTEXT,
    FRONTIER,
    GATE,
    GATE_INIT,
    MIN_AXIS_SPAN,
    SHARING,
    frontier,
)
from lavis_aurora.common.errors import AuroraError

SEEDS = {"none": [40.0, 42.0, 47.0], "attention": [44.0, 44.0, 45.0]}


def points(axis) -> dict[float, float]:
    """Means drawn with error bars, by place."""
    return {x: y for bars in axis.containers for x, y in zip(*bars.lines[0].get_data())}


def test_forms_are_drawn_with_mean_spread_and_seeds(tmp_path):
    table = sweep_table(tmp_path / "sweep.csv", CONTEXT.key, SEEDS)
    numbers = CONTEXT.numbers(arguments(CONTEXT, table))
    one = numbers["values"]["none"]["test.image_to_text_r1"]
    assert one == {"mean": 43.0, "spread": statistics.stdev(SEEDS["none"]), "cells": SEEDS["none"]}
    figure = CONTEXT.draw(numbers)
    assert [axis.get_title() for axis in figure.axes] == [
        "R@1, image to text",
        "R@1, text to image",
        "mean of R@1, 5, 10",
    ]
    assert points(figure.axes[0]) == {0: 43.0, 1: pytest.approx(133 / 3)}
    dots = [list(line.get_ydata()) for line in figure.axes[0].lines if line.get_marker() == "."]
    assert dots == [SEEDS["none"], SEEDS["attention"]]
    assert [text.get_text() for text in figure.axes[0].get_xticklabels()] == ["none", "attention\n(the paper)"]
    assert "3 seeds" in figure.get_suptitle()


def test_small_differences_do_not_fill_a_panel(tmp_path):
    near = sweep_table(tmp_path / "near.csv", CONTEXT.key, {"none": [50.0, 50.2], "mean": [50.1, 50.3]})
    [first, *_] = CONTEXT.draw(CONTEXT.numbers(arguments(CONTEXT, near))).axes
    low, high = first.get_ylim()
    assert high - low == pytest.approx(MIN_AXIS_SPAN) and low < 50.0 and high > 50.3
    far = sweep_table(tmp_path / "far.csv", CONTEXT.key, {"none": [50.0], "mean": [70.0]})
    [first, *_] = CONTEXT.draw(CONTEXT.numbers(arguments(CONTEXT, far))).axes
    assert 20 < first.get_ylim()[1] - first.get_ylim()[0] < 25


def test_both_ways_of_videos_are_drawn(tmp_path):
    metrics = {f"{way}_r1": 50.0 for way in ("video_to_text", "text_to_video")} | {"agg_metrics": 60.0}
    cells = [({CONTEXT.key: form}, {"status": "done", "seconds": 1.0, "metrics": {"test": metrics}}) for form in "ab"]
    write_table(cells, tmp_path / "sweep.csv")
    figure = CONTEXT.draw(CONTEXT.numbers(arguments(CONTEXT, tmp_path / "sweep.csv")))
    assert [axis.get_title() for axis in figure.axes] == [
        "R@1, video to text",
        "R@1, text to video",
        "mean of R@1, 5, 10",
    ]


@pytest.mark.parametrize("figure", [GATE, GATE_INIT, SHARING])
def test_each_part_has_its_figure(tmp_path, figure):
    forms = list(figure.labels)
    table = sweep_table(tmp_path / "sweep.csv", figure.key, {form: [50.0 + i] for i, form in enumerate(forms)})
    drawn = figure.draw(figure.numbers(arguments(figure, table, "--metrics", "test.agg_metrics")))
    [axis] = drawn.axes
    assert points(axis) == {i: 60.0 + i for i in range(len(forms))}
    assert drawn.get_suptitle().endswith("of 1 seed")


def test_what_else_differs_is_refused(tmp_path):
    def cell(rank: str, form: str) -> tuple:
        settings = {RANK_KEY: rank, "model.gate.form": form}
        return settings, {"status": "done", "seconds": 1.0, "metrics": {"test": {"agg_metrics": 1.0}}}

    write_table([cell("4", "none"), cell("8", "residual")], tmp_path / "two.csv")
    with pytest.raises(AuroraError, match="model.gate.form differs too"):
        series(tmp_path / "two.csv", RANK_KEY, ["test.agg_metrics"])
    with pytest.raises(AuroraError, match="no column 'model.context.form'"):
        CONTEXT.numbers(arguments(CONTEXT, tmp_path / "two.csv"))
    with pytest.raises(AuroraError, match="no recalls and no accuracy.*'val'"):
        RANK.numbers(arguments(RANK, tmp_path / "two.csv", "--split", "val"))
    with pytest.raises(AuroraError, match="cannot be read as csv"):
        series(tmp_path / "none.csv", RANK_KEY, ["test.agg_metrics"])


def test_failed_cells_count_for_nothing(tmp_path):
    done = {"status": "done", "seconds": 2.0, "metrics": {"test": {"agg_metrics": 7.0}}}
    failed = {"status": "failed", "seconds": 1.0, "error": "error: x"}
    write_table([({"a.b": "1"}, done), ({"a.b": "2"}, failed)], tmp_path / "sweep.csv")
    assert list(series(tmp_path / "sweep.csv", "a.b", ["test.agg_metrics"])) == ["1"]
    write_table([({"a.b": "2"}, failed)], tmp_path / "sweep.csv")
    with open(tmp_path / "sweep.csv", newline="") as file:
        assert [row["error"] for row in csv.DictReader(file)] == ["error: x"]


def test_titles_of_metrics():
    assert metric_title("test.text_to_video_r10") == "R@10, text to video"
    assert metric_title("test.image_to_text_itc_r5") == "R@5, image to text, ITC only"
    assert metric_title("test.text_to_image_median_rank") == "median_rank, text to image"
    assert metric_title("test.what") == "test.what"


def _records() -> list[dict]:
    """Of two methods at two budgets each, three seeds at the best of two rates, and of the frozen model."""
    found = []

    def add(method: str, budget: str, rate: Optional[float], seed: int, score: Optional[float], count: int) -> None:
        one = {"method": method, "label": method, "budget": budget, "rate": rate, "seed": seed}
        groups = {"own": {"tensors": 1, "parameters": count}, "heads": {"tensors": 1, "parameters": 5}}
        metrics = {"image_to_text_r1": score, "text_to_image_r1": score, "agg_metrics": 1.0}
        done = {"parameters": groups, "validation": score, "metrics": metrics}
        found.append({**one, "error": "no"} if score is None else {**one, **done})

    add("frozen", "", None, 1, 10.0, 0)
    for method, more in (("Aurora", 10.0), ("LoRA", 0.0)):
        for budget, parameters in (("6k", 6000), ("25k", 25000)):
            add(method, budget, 1e-2, 1, None, parameters)
            for seed in (1, 2, 3):
                add(method, budget, 1e-3, seed, 60 + more + seed + parameters / 1000, parameters)
    return found


def test_methods_are_drawn_at_their_best_rates(tmp_path):
    path = tmp_path / "pictures.json"
    path.write_text(json.dumps(_records()))
    numbers = COMPARISON.numbers(arguments(COMPARISON, path))
    best = {(one["label"], one["budget"]): (one["mean"], one["spread"]) for one in numbers["methods"]}
    assert best == {
        ("frozen", ""): (10.0, None),
        ("LoRA", "6k"): (68.0, 1.0),
        ("Aurora", "6k"): (78.0, 1.0),
        ("LoRA", "25k"): (87.0, 1.0),
        ("Aurora", "25k"): (97.0, 1.0),
    }
    figure = COMPARISON.draw(numbers)
    scores, rates = figure.axes
    assert [text.get_text() for text in scores.get_legend().get_texts()] == ["Aurora", "LoRA"]
    assert [text.get_text() for text in scores.texts] == ["frozen"]
    assert [list(line.get_ydata()) for line in rates.lines] == [[96.0, 0.0], [86.0, 0.0]]
    numbers = COMPARISON.numbers(arguments(COMPARISON, path, "--methods", "LoRA"))
    assert {one["label"] for one in numbers["methods"]} == {"LoRA"}


def test_a_comparison_without_a_run_that_ended_well_is_refused(tmp_path):
    path = tmp_path / "pictures.json"
    path.write_text(json.dumps([one for one in _records() if "error" in one]))
    with pytest.raises(AuroraError, match="pictures.json: no run of it has ended well"):
        COMPARISON.numbers(arguments(COMPARISON, path))
    with pytest.raises(AuroraError, match=r"--methods Aurorra: .*pictures.json has no run of it.*Aurora"):
        COMPARISON.numbers(arguments(COMPARISON, path, "--methods", "Aurorra"))


@pytest.fixture
def joined(tmp_path: Path) -> list[Path]:
    """BENCH.JSON, TASK.JSON and the folder of methods: costs of two methods, none of frozen, and two that miss."""
    costs = {
        "Aurora": "aurora-64+alone",
        "LoRA": "lora-32",
        "later": "aurora-64",
        "unmeasured": "full",
        "frozen": None,
    }
    methods = tmp_path / "methods"
    methods.mkdir()
    for name, cost in costs.items():
        (methods / f"{name}.yaml").write_text(f"label: {name}\noptions: []\n" + (f"cost: {cost}\n" if cost else ""))
    steps = {
        "lavis-uniadapter-512": (4.0, 8e9),
        "aurora-64+alone": (1.0, 2e9),
        "lora-32": (2.0, 3e9),
        "heads": (9, 9),
    }
    rows = {name: {"seconds": seconds, "memory": memory} for name, (seconds, memory) in steps.items()}
    bench, records = tmp_path / "bench.json", tmp_path / "pictures.json"
    bench.write_text(json.dumps({"arguments": {"size": "tiny"}, "results": {"retrieval": rows}}))
    more = [{**one, "method": "unmeasured", "label": "unmeasured"} for one in _records() if one["method"] == "LoRA"]
    records.write_text(json.dumps(_records() + more))
    return [bench, records, methods]


def test_the_frontier_joins_scores_with_the_costs_that_yamls_name(joined):
    bench, records, methods = joined
    numbers = FRONTIER.numbers(arguments(FRONTIER, bench, records, "--methods", methods))
    found = {
        one["label"]: (one["row"], one["seconds"], one["memory"], one["mean"], one["spread"])
        for one in numbers["points"]
    }
    assert found == {
        "Aurora": ("aurora-64+alone", 0.25, 0.25, 97.0, 1.0),
        "LoRA": ("lora-32", 0.5, 0.375, 87.0, 1.0),
    }
    # What cannot be drawn is said, whichever half of it is missing.
    assert numbers["left_out"] == (
        "no cost is named of frozen; bench.json lacks full (unmeasured); no run at 25k of later"
    )
    figure = FRONTIER.draw(numbers)
    assert "BLIP tiny" in figure.get_suptitle() and "bench.json lacks full" in figure.get_supxlabel()
    for axis, title, ratios in zip(figure.axes, ("time", "memory"), ((0.25, 0.5), (0.25, 0.375))):
        assert axis.get_xlabel().startswith(title) and "UniAdapter (r=512), LAVIS's own = 1" in axis.get_xlabel()
        assert points(axis) == dict(zip(ratios, (97.0, 87.0)))
        [line] = [line for line in axis.lines if line.get_drawstyle() == "steps-post"]
        assert line.get_xydata().tolist() == [[0.25, 97.0]]
        assert {text.get_text() for text in axis.texts} == {"Aurora", "LoRA"}
        assert axis.get_ylim()[1] - axis.get_ylim()[0] >= MIN_AXIS_SPAN and axis.get_xlim()[0] == 0


def test_a_frontier_of_one_seed_says_so(joined):
    bench, records, methods = joined
    records.write_text(json.dumps([one for one in _records() if one["seed"] == 1]))
    figure = FRONTIER.draw(FRONTIER.numbers(arguments(FRONTIER, bench, records, "--methods", methods)))
    assert {text.get_text() for text in figure.axes[0].texts} == {"Aurora (one seed)", "LoRA (one seed)"}


def test_what_a_frontier_cannot_be_drawn_from_is_refused_with_a_remedy(joined):
    bench, records, methods = joined

    def numbers(*given: object) -> None:
        FRONTIER.numbers(arguments(FRONTIER, *given))

    with pytest.raises(AuroraError, match="nowhere: holds no YAML of a method"):
        numbers(bench, records, "--methods", methods / "nowhere")
    other = records.rename(records.with_name("clips.json"))
    with pytest.raises(
        AuroraError, match="has no steps of video; measure by .*bench_train.py --tasks video --methods"
    ):
        numbers(bench, other, "--methods", methods)
    with pytest.raises(AuroraError, match="other.json: name pictures, clips, questions.json"):
        numbers(bench, other.rename(records.with_name("other.json")), "--methods", methods)
    (methods / "LoRA.yaml").unlink()
    (methods / "Aurora.yaml").write_text("label: Aurora\noptions: []\ncost: aurora-65\n")
    records.write_text(json.dumps(_records()))
    with pytest.raises(
        AuroraError,
        match=r"nothing to draw \(no cost is named of frozen, LoRA; bench.json lacks aurora-65 \(Aurora\); ",
    ):
        numbers(bench, records, "--methods", methods)


def test_the_frontier_is_what_none_reaches_at_less():
    given = [(3.0, 90.0), (1.0, 80.0), (2.0, 79.0), (2.5, 85.0), (1.0, 70.0), (4.0, 90.0)]
    expected = [
        one for one in given if not any(other != one and other[0] <= one[0] and other[1] >= one[1] for other in given)
    ]
    assert frontier(given) == sorted(expected) == [(1.0, 80.0), (2.5, 85.0), (3.0, 90.0)]
