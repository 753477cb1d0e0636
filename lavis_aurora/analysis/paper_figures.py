"""Plots of the paper's numbers and measured ones: methods by size (figure 8), and cost of training (table 5)."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from typing import Any, Optional

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lavis_aurora.analysis.compare import Measured, benchmark_of, comparison, read_measured
from lavis_aurora.analysis.drawing import FULL, OTHER, OURS, PALE, Plot, despine, spread_labels, subplots
from lavis_aurora.analysis.paper import DIRECTIONS, label, metric_title, paper_rows, paper_tables
from lavis_aurora.common.errors import AuroraError
from lavis_aurora.common.files import read_json

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
KEYS = {"seconds": ("time", "time of a step"), "memory": ("memory", "memory above the model")}
# The paper's unit of cost. In LAVIS's own model first: that is how its UniAdapter ran.
UNITS = ("lavis-uniadapter-512", "uniadapter-512")
NAMES = {"uniadapter": "UniAdapter", "aurora": "Aurora", "aurora-all": "Aurora, all linear", "lora": "LoRA"}


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


def label_points(axis: Axes, names: Sequence[tuple[str, float, float, str]], gap: float = 0.062) -> None:
    """Write names in a column right of a panel, from low to high, with a line from each to its point.

    Args:
        axis: with its final limits.
        names: text, x, y and colour of each point.
        gap: least distance of two names, in heights of the panel.
    """
    to_panel = axis.transData + axis.transAxes.inverted()
    order = sorted(names, key=lambda one: (one[2], one[1]))
    heights = spread_labels([float(to_panel.transform((one[1], one[2]))[1]) for one in order], gap)
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
        content = read_json(args.bench)
        results = content.get("results") if isinstance(content, dict) else None
        if not results or not all(isinstance(methods, dict) for methods in results.values()):
            raise AuroraError(
                f"{args.bench}: holds no results; name the file that scripts/bench_train.py --out wrote"
            )
        tasks = {}
        for task, methods in results.items():
            unit = next((one for one in UNITS if one in methods), next(iter(methods)))
            tasks[task] = {
                "unit": unit,
                "methods": {
                    name: {key: one[key] / methods[unit][key] for key in KEYS}
                    | {"measured": {k: one[k] for k in KEYS}}
                    for name, one in methods.items()
                },
            }
        machine = next(iter(next(iter(results.values())).values())).get("machine", {})
        return {"bench": str(args.bench), "tasks": tasks, "machine": machine, "paper": paper_ratios()}

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
            for key, (column, title) in KEYS.items():
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


def paper_ratios() -> dict[str, dict[str, dict[str, float]]]:
    """Table 5: by benchmark and method, time and memory in units of UniAdapter with rank 512."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    for row in paper_tables()["tables"]["5"]["rows"]:
        for benchmark, values in row["results"].items():
            found.setdefault(benchmark, {})[f"{row['method']} (r={row['rank']})"] = values
    return found


def method_name(method: str) -> str:
    """A method of the benchmark program, as the paper writes it.

    Examples:
        >>> method_name("lavis-uniadapter-512")
        "UniAdapter (r=512), LAVIS's own"
        >>> method_name("aurora-64+last6+cached")
        'Aurora (r=64), last 6 layers, features kept'
    """
    method, *settings = method.split("+")
    if settings:
        return ", ".join([method_name(method), *(SETTINGS.get(one, one) for one in settings)])
    if method == "frozen-flow":
        return "frozen, gradients flow"
    if method.startswith("lavis-"):
        return f"{method_name(method[len('lavis-') :])}, LAVIS's own"
    kind, _, rank = method.rpartition("-")
    return f"{NAMES[kind]} (r={rank})" if kind in NAMES else method


# What is behind the + of a method.
SETTINGS = {
    **{"last6": "last 6 layers", "last3": "last 3 layers", "cached": "features kept"},
    **{"merge16": "16 tokens merged a layer", "alone": "no teacher"},
}


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
