"""Plots of the paper's numbers and measured ones: methods by size (figure 8), and cost of training (table 5)."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from typing import Any, Optional

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lavis_aurora.analysis.compare import Measured, benchmark_of, comparison, read_measured
from lavis_aurora.analysis.drawing import FULL, OTHER, OURS, PALE, Plot, despine, label_points, subplots
from lavis_aurora.analysis.paper import (
    COSTS,
    DIRECTIONS,
    UNITS,
    label,
    method_name,
    metric_title,
    paper_ratios,
    paper_rows,
    paper_tables,
    read_costs,
)

# Both metrics of each panel; with one there is none to compare with, and the other axis shows the parameters.
AXES: dict[str, tuple[Optional[str], str]] = {
    "coco_retrieval": ("image_to_text_r1", "text_to_image_r1"),
    "flickr30k": ("image_to_text_r1", "text_to_image_r1"),
    "msrvtt_retrieval": ("text_to_video_r1", "text_to_video_r10"),
    "didemo_retrieval": ("text_to_video_r1", "text_to_video_r10"),
    "coco_vqa": ("test_dev", "test_std"),
    "msrvtt_qa_aurora": (None, "accuracy"),
}
COLORS = {"full": FULL, "frozen backbone": OTHER}
# The paper's benchmarks of each measured task, with the markers of their figures.
BENCHMARKS = {
    "retrieval": {"coco_retrieval": "o", "flickr30k": "s"},
    "vqa": {"coco_vqa": "o"},
    "video": {"msrvtt_retrieval": "o", "didemo_retrieval": "s"},
}
PAPER_MARKER = {"color": "black", "markerfacecolor": "none", "markersize": 8}


class BubblesPlot(Plot):
    """The paper's methods by two metrics and their size, and results of ours among them."""

    name = "bubbles"
    about = "all methods by two metrics and their size (figure 8)"

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        parser.add_argument("results", nargs="*", metavar="RESULT", help="runs or result files, drawn as stars")
        parser.add_argument("--benchmarks", nargs="+", choices=AXES, default=list(AXES), help="panels")

    def numbers(self, args: argparse.Namespace) -> dict[str, Any]:
        """Points of the paper by benchmark, and measured ones; runs on other data have panels of their own."""
        panels: dict[str, dict[str, Any]] = {}
        for name in args.benchmarks:
            x, y = AXES[name]
            rows = paper_rows(paper_tables()["benchmarks"][name]["table"], name)
            points = [
                {
                    "label": label(row),
                    "group": "Aurora" if row["method"] == "Aurora" else row["group"],
                    "tunable": row["tunable"],
                    "x": row["tunable"] if x is None else row["values"].get(x),
                    "y": row["values"].get(y),
                }
                for row in rows
            ]
            panels[name] = {"axes": [x or "tunable", y], "paper": [p for p in points if None not in (p["x"], p["y"])]}
            panels[name]["measured"] = []
        for path in args.results:
            for one in read_measured(path):
                _add_point(panels, one)
        return {"panels": panels}

    def draw(self, numbers: dict[str, Any]) -> Figure:
        """A panel for each benchmark; the area of a bubble grows with the parameters that a method trains."""
        panels = numbers["panels"]
        columns = min(3, len(panels))
        figure, axes = subplots(math.ceil(len(panels) / columns), columns, 5.2, 4.0)
        for axis in axes[len(panels) :]:
            axis.set_visible(False)
        for axis, (name, panel) in zip(axes, panels.items()):
            x, y = panel["axes"]
            names: list[tuple[str, float, float, str]] = []
            for point in panel["paper"]:
                color = OURS if point["group"] == "Aurora" else COLORS.get(point["group"], PALE)
                axis.scatter(
                    point["x"], point["y"], s=_marker_area(point["tunable"]), color=color, alpha=0.55, linewidths=0
                )
                names.append((f"{point['label']}, {point['tunable'] / 1e6:g}M", point["x"], point["y"], color))
            for i, point in enumerate(panel["measured"]):
                place = point["x"] if point["x"] is not None else i
                axis.scatter(place, point["y"], marker="*", s=170, color="black", zorder=4)
                names.append((f"measured: {point['label']}", place, point["y"], "black"))
            if x == "tunable":
                axis.set_xscale("log")
            axis.margins(0.12)
            label_points(axis, names)
            axis.set_xlabel(_axis_title(x))
            axis.set_ylabel(_axis_title(y))
            known = paper_tables()["benchmarks"].get(name)
            axis.set_title(f"{known['name']} (paper)" if known else f"{name} (measured here)")
            despine(axis, "both")
        for text, color in (("full fine-tuning", FULL), ("frozen backbone", OTHER), ("Aurora", OURS)):
            axes[0].scatter([], [], color=color, alpha=0.55, label=text)
        if any(panel["measured"] for panel in panels.values()):
            axes[0].scatter([], [], color="black", marker="*", s=90, label="measured here")
        figure.legend(frameon=False, loc="outside lower center", ncols=4)
        figure.suptitle("Up and right is better; small bubbles train little")
        return figure


def _add_point(panels: dict[str, dict[str, Any]], measured: Measured) -> None:
    """Add a result to its panel."""
    found = comparison(measured)
    name = benchmark_of(measured)
    if name is None:
        name = ", ".join(measured.config.get("datasets", {}))
        pair = [f"{way}_r1" for way in DIRECTIONS if f"{way}_r1" in found["values"]]
        axes = pair if len(pair) == 2 else ["", "agg_metrics"]
        panels.setdefault(name, {"axes": axes, "paper": [], "measured": []})
    if name not in panels:
        return
    x, y = panels[name]["axes"]
    values = found["values"]
    if y in values:
        point = {"label": found["method"], "path": found["path"], "x": values.get(x), "y": values[y]}
        panels[name]["measured"].append(point)


def _axis_title(metric: str) -> str:
    words = {"tunable": "trained parameters", "test_dev": "accuracy, test-dev", "test_std": "accuracy, test-std"}
    return metric and (words.get(metric) or metric_title(f".{metric}").rstrip(", "))


def _marker_area(parameters: float) -> float:
    """Area of a bubble, by the logarithm: the paper ranks sizes, and in proportion most would vanish."""
    return 25 + 90 * max(math.log10(parameters) - 5, 0) ** 1.6


class CostPlot(Plot):
    """Time and memory of a training step beside the paper's, from scripts/bench_train.py."""

    name = "cost"
    about = "time and memory of training (table 5)"

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        parser.add_argument("bench", metavar="BENCH.JSON", help="of scripts/bench_train.py --out")

    def numbers(self, args: argparse.Namespace) -> dict[str, Any]:
        """Ratios to the unit by task and method, and the paper's of the same methods."""
        return {"bench": str(args.bench), **read_costs(args.bench), "paper": paper_ratios()}

    def draw(self, numbers: dict[str, Any]) -> Figure:
        """Two panels for each task, time and memory; bars are measured, hollow markers the paper's."""
        tasks = numbers["tasks"]
        longest = max(len(task["methods"]) for task in tasks.values())
        figure, axes = subplots(len(tasks), 2, 5.0, 1.1 + 0.36 * longest, sharey="row")
        panels = iter(axes)
        for name, task in tasks.items():
            methods = list(task["methods"])
            paper = {}
            if task["unit"] in UNITS:
                paper = {benchmark: numbers["paper"].get(benchmark, {}) for benchmark in BENCHMARKS.get(name, {})}
            for key, (column, title) in COSTS.items():
                axis = next(panels)
                _bars(axis, methods, [task["methods"][method][key] for method in methods])
                for benchmark, values in paper.items():
                    places = [
                        (values.get(_paper_row_name(m, task["unit"]), {}).get(column), i)
                        for i, m in enumerate(methods)
                    ]
                    for value, i in places:
                        if value is not None:
                            axis.plot(value, i, BENCHMARKS[name][benchmark], **PAPER_MARKER)
                axis.axvline(1, color="black", linewidth=0.8)
                axis.set_xlabel(f"{method_name(task['unit'])} = 1")
                axis.set_title(f"{name}: {title}")
                despine(axis, "x")
            axis.set_yticks(range(len(methods)), [method_name(method) for method in methods])
            axis.invert_yaxis()
            for benchmark in paper:
                text = f"paper, {paper_tables()['benchmarks'][benchmark]['name']}"
                axis.plot([], [], BENCHMARKS[name][benchmark], label=text, **PAPER_MARKER)
            if paper:
                axis.legend(frameon=False, fontsize=8, loc="lower right")
        device = numbers["machine"].get("device", "")
        figure.suptitle(f"Training cost: bars measured{f' on {device}' if device else ''}")
        return figure


def _paper_row_name(method: str, unit: str) -> str:
    """The paper's row that a method is compared with; its UniAdapter of rank 512 is the unit itself."""
    if method in UNITS:
        return method_name(UNITS[1]) if method == unit else ""
    return method_name(method)


def _bars(axis: Axes, methods: Sequence[str], ratios: Sequence[float]) -> None:
    """A bar for each method, its ratio written inside."""
    colors = [OURS if method.startswith("aurora") else PALE for method in methods]
    axis.barh(range(len(methods)), ratios, color=colors, height=0.66)
    for i, ratio in enumerate(ratios):
        axis.text(0.02, i, f"{ratio:.2f}", va="center", fontsize=9, color="white" if ratio > 0.12 else "black")


BUBBLES, COST = BubblesPlot(), CostPlot()
