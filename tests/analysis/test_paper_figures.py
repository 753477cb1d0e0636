"""Figures with the paper's numbers: bubbles and cost."""

from __future__ import annotations

import json

import pytest
from tiny_figures import arguments
from tiny_summary import leave_summary

from lavis_aurora.analysis.paper_figures import BUBBLES, COST, _marker_area
from lavis_aurora.common.errors import AuroraError

ONE = {"seconds": 2.0, "memory": 4e9, "trained": 1, "machine": {"device": "some machine"}}


def bench(tmp_path, methods: dict[str, tuple[float, float]]):
    results = {
        "retrieval": {
            name: {**ONE, "seconds": seconds, "memory": memory} for name, (seconds, memory) in methods.items()
        }
    }
    path = tmp_path / "bench.json"
    path.write_text(json.dumps({"arguments": {}, "results": results}))
    return path


def test_costs_are_ratios_beside_the_papers(tmp_path):
    path = bench(tmp_path, {"uniadapter-512": (2.0, 4e9), "uniadapter-128": (1.8, 3e9), "aurora-64": (1.0, 2e9)})
    numbers = COST.numbers(arguments(COST, path))
    methods = numbers["tasks"]["retrieval"]["methods"]
    assert methods["aurora-64"] == {"seconds": 0.5, "memory": 0.5, "measured": {"seconds": 1.0, "memory": 2e9}}
    assert numbers["paper"]["flickr30k"]["Aurora (r=64)"] == {"time": 0.92, "memory": 0.94}
    figure = COST.draw(numbers)
    time, memory = figure.axes
    assert [bar.get_width() for bar in time.patches] == [1.0, 0.9, 0.5]
    assert [bar.get_width() for bar in memory.patches] == [1.0, 0.75, 0.5]
    drawn = sorted(
        float(line.get_xdata()[0]) for line in time.lines if line.get_marker() in "os" and len(line.get_xdata())
    )
    # MSCOCO's UniAdapter (r=128) is not legible in the paper's text.
    assert drawn == [0.84, 0.92, 0.93, 1.0, 1.0]
    assert "some machine" in figure.get_suptitle()


def test_the_papers_unit_ran_in_laviss_own_model(tmp_path):
    path = bench(
        tmp_path,
        {
            "lavis-uniadapter-512": (4.0, 8e9),
            "uniadapter-512": (2.0, 4e9),
            "aurora-64": (1.0, 2e9),
            "full": (8.0, 1e9),
        },
    )
    numbers = COST.numbers(arguments(COST, path))
    assert numbers["tasks"]["retrieval"]["unit"] == "lavis-uniadapter-512"
    time, memory = COST.draw(numbers).axes
    assert [bar.get_width() for bar in time.patches] == [1.0, 0.5, 0.25, 2.0]
    # The paper's figures of it stand at the unit, not at this package's UniAdapter.
    marks = {(float(x), float(y)) for line in time.lines if line.get_marker() == "s" for x, y in line.get_xydata()}
    assert marks == {(1.0, 0.0), (0.92, 2.0)}
    # Names from the top down, on the left alone.
    assert [label.get_text() for label in time.get_yticklabels()][0] == "UniAdapter (r=512), LAVIS's own"
    assert time.yaxis_inverted() and memory.yaxis_inverted()


def test_another_unit_is_not_compared_with_the_paper(tmp_path):
    numbers = COST.numbers(arguments(COST, bench(tmp_path, {"full": (2.0, 4e9), "aurora-64": (1.0, 2e9)})))
    assert numbers["tasks"]["retrieval"]["unit"] == "full"
    assert [line for line in COST.draw(numbers).axes[0].lines if line.get_marker() == "o"] == []
    (tmp_path / "bench.json").write_text("[]")
    with pytest.raises(AuroraError, match="holds no results"):
        COST.numbers(arguments(COST, tmp_path / "bench.json"))


def test_bubbles_are_the_papers_and_stars_ours(retrieval_runs):
    numbers = BUBBLES.numbers(arguments(BUBBLES, retrieval_runs["aurora"]))
    panels = numbers["panels"]
    assert len(panels["flickr30k"]["paper"]) == 10 and len(panels["msrvtt_qa_aurora"]["paper"]) == 9
    [own] = panels["coco_retrieval"]["measured"]
    result = json.loads((retrieval_runs["aurora"] / "result" / "test_epoch_best.json").read_text())["metrics"]
    assert (own["x"], own["y"]) == (result["image_to_text_r1"], result["text_to_image_r1"])
    figure = BUBBLES.draw(numbers)
    assert len(figure.axes) == 6
    names = [text.get_text() for text in figure.axes[0].texts]
    assert "measured: Aurora (r=64)" in names and "Aurora (r=64), 0.1M" in names and len(names) == 11
    # Names do not cover each other.
    heights = sorted(text.xyann[1] for text in figure.axes[0].texts)
    assert min(b - a for a, b in zip(heights, heights[1:])) > 0.06


@pytest.mark.parametrize(
    ("metrics", "titles"),
    [
        (
            {"video_to_text_r1": 40.0, "text_to_video_r1": 50.0, "agg_metrics": 70.0},
            ("R@1, video to text", "R@1, text to video"),
        ),
        ({"agg_metrics": 45.0}, ("", "accuracy, or mean of R@1, 5, 10")),
    ],
)
def test_runs_on_other_data_have_panels_of_their_own(tmp_path, metrics, titles):
    config = {"model": {"arch": "x", "tuning": "full"}, "datasets": {"other": {}}, "run": {}}
    (tmp_path / "config.yaml").write_text(json.dumps(config))
    leave_summary(tmp_path, metrics={"test": metrics})
    figure = BUBBLES.draw(BUBBLES.numbers(arguments(BUBBLES, tmp_path)))
    axis = figure.axes[6]
    assert (axis.get_xlabel(), axis.get_ylabel()) == titles and axis.get_title() == "other (measured here)"
    assert [text.get_text() for text in axis.texts] == ["measured: BLIP"]


def test_larger_methods_have_larger_bubbles():
    areas = [_marker_area(count) for count in (1e5, 1e6, 1e7, 1e8)]
    assert areas == sorted(areas) and areas[0] > 0
