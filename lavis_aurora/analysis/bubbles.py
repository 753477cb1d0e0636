"""The paper's methods by two metrics and their size, and results of ours among them: figure 8."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from typing import Any, Optional

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lavis_aurora.analysis.ablation import TITLES, metric_title
from lavis_aurora.analysis.compare import benchmark_of, comparison, read_measured
from lavis_aurora.analysis.drawing import FULL, OTHER, OWN, PALE, apart, canvas, tidy
from lavis_aurora.analysis.paper import label, paper_rows, paper_tables

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


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the figure."""
    parser.add_argument("results", nargs="*", metavar="RESULT", help="runs or result files, drawn as stars")
    parser.add_argument("--benchmarks", nargs="+", choices=AXES, default=list(AXES), help="panels")


def numbers(args: argparse.Namespace) -> dict[str, Any]:
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
            _place(panels, one)
    return {"panels": panels}


def _place(panels: dict[str, dict[str, Any]], measured) -> None:
    """Add a result to its panel."""
    found = comparison(measured)
    name = benchmark_of(measured)
    if name is None:
        name = ", ".join(measured.config.get("datasets", {}))
        pair = [f"{way}_r1" for way in TITLES if f"{way}_r1" in found["values"]]
        axes = pair if len(pair) == 2 else ["", "agg_metrics"]
        panels.setdefault(name, {"axes": axes, "paper": [], "measured": []})
    if name not in panels:
        return
    x, y = panels[name]["axes"]
    values = found["values"]
    if y in values:
        point = {"label": found["method"], "path": found["path"], "x": values.get(x), "y": values[y]}
        panels[name]["measured"].append(point)


def draw(numbers: dict[str, Any]) -> Figure:
    """A panel for each benchmark; the area of a bubble grows with the parameters that a method trains."""
    panels = numbers["panels"]
    columns = min(3, len(panels))
    figure, axes = canvas(math.ceil(len(panels) / columns), columns, 5.2, 4.0)
    for axis in axes[len(panels) :]:
        axis.set_visible(False)
    for axis, (name, panel) in zip(axes, panels.items()):
        x, y = panel["axes"]
        names: list[tuple[str, float, float, str]] = []
        for point in panel["paper"]:
            color = OWN if point["group"] == "Aurora" else COLORS.get(point["group"], PALE)
            axis.scatter(point["x"], point["y"], s=_area(point["tunable"]), color=color, alpha=0.55, linewidths=0)
            names.append((f"{point['label']}, {point['tunable'] / 1e6:g}M", point["x"], point["y"], color))
        for i, point in enumerate(panel["measured"]):
            place = point["x"] if point["x"] is not None else i
            axis.scatter(place, point["y"], marker="*", s=170, color="black", zorder=4)
            names.append((f"measured: {point['label']}", place, point["y"], "black"))
        if x == "tunable":
            axis.set_xscale("log")
        axis.margins(0.12)
        name_points(axis, names)
        axis.set_xlabel(_axis_title(x))
        axis.set_ylabel(_axis_title(y))
        known = paper_tables()["benchmarks"].get(name)
        axis.set_title(f"{known['name']} (paper)" if known else f"{name} (measured here)")
        tidy(axis, "both")
    for text, color in (("full fine-tuning", FULL), ("frozen backbone", OTHER), ("Aurora", OWN)):
        axes[0].scatter([], [], color=color, alpha=0.55, label=text)
    if any(panel["measured"] for panel in panels.values()):
        axes[0].scatter([], [], color="black", marker="*", s=90, label="measured here")
    figure.legend(frameon=False, loc="outside lower center", ncols=4)
    figure.suptitle("Up and right is better; small bubbles train little")
    return figure


def name_points(axis: Axes, names: Sequence[tuple[str, float, float, str]], gap: float = 0.062) -> None:
    """Write names in a column right of a panel, from low to high, with a line from each to its point.

    Args:
        axis: with its final limits.
        names: text, x, y and colour of each point.
        gap: least distance of two names, in heights of the panel.
    """
    to_panel = axis.transData + axis.transAxes.inverted()
    order = sorted(names, key=lambda one: (one[2], one[1]))
    heights = apart([float(to_panel.transform((one[1], one[2]))[1]) for one in order], gap)
    for (text, x, y, color), height in zip(order, heights):
        axis.annotate(
            text,
            (x, y),
            (1.03, height),
            "data",
            "axes fraction",
            fontsize=7,
            va="center",
            color="black",
            arrowprops={"arrowstyle": "-", "color": color, "linewidth": 0.6, "alpha": 0.8},
        )


def _axis_title(metric: str) -> str:
    words = {"tunable": "trained parameters", "test_dev": "accuracy, test-dev", "test_std": "accuracy, test-std"}
    return metric and (words.get(metric) or metric_title(f".{metric}").rstrip(", "))


def _area(parameters: float) -> float:
    """Area of a bubble, by the logarithm: the paper ranks sizes, and in proportion most would vanish."""
    return 25 + 90 * max(math.log10(parameters) - 5, 0) ** 1.6
