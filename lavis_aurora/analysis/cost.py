"""Time and memory of a training step beside the paper's table 5, from scripts/bench_train.py."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lavis_aurora.analysis.drawing import OWN, PALE, UNITS, canvas, method_name, tidy
from lavis_aurora.analysis.paper import paper_tables
from lavis_aurora.common.errors import AuroraError
from lavis_aurora.common.files import read_json

# The paper's benchmarks of each measured task, with the markers of their figures.
BENCHMARKS = {
    "retrieval": {"coco_retrieval": "o", "flickr30k": "s"},
    "vqa": {"coco_vqa": "o"},
    "video": {"msrvtt_retrieval": "o", "didemo_retrieval": "s"},
}
HOLLOW = {"color": "black", "markerfacecolor": "none", "markersize": 8}
KEYS = {"seconds": ("time", "time of a step"), "memory": ("memory", "memory above the model")}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the figure."""
    parser.add_argument("bench", metavar="BENCH.JSON", help="of scripts/bench_train.py --out")


def numbers(args: argparse.Namespace) -> dict[str, Any]:
    """Ratios to the unit by task and method, and the paper's of the same methods."""
    content = read_json(args.bench)
    results = content.get("results") if isinstance(content, dict) else None
    if not results or not all(isinstance(methods, dict) for methods in results.values()):
        raise AuroraError(f"{args.bench}: holds no results; name the file that scripts/bench_train.py --out wrote")
    tasks = {}
    for task, methods in results.items():
        unit = next((one for one in UNITS if one in methods), next(iter(methods)))
        tasks[task] = {
            "unit": unit,
            "methods": {
                name: {key: one[key] / methods[unit][key] for key in KEYS} | {"measured": {k: one[k] for k in KEYS}}
                for name, one in methods.items()
            },
        }
    machine = next(iter(next(iter(results.values())).values())).get("machine", {})
    return {"bench": str(args.bench), "tasks": tasks, "machine": machine, "paper": paper_ratios()}


def paper_ratios() -> dict[str, dict[str, dict[str, float]]]:
    """Table 5: by benchmark and method, time and memory in units of UniAdapter with rank 512."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    for row in paper_tables()["tables"]["5"]["rows"]:
        for benchmark, values in row["results"].items():
            found.setdefault(benchmark, {})[f"{row['method']} (r={row['rank']})"] = values
    return found


def draw(numbers: dict[str, Any]) -> Figure:
    """Two panels for each task, time and memory; bars are measured, hollow markers the paper's."""
    tasks = numbers["tasks"]
    longest = max(len(task["methods"]) for task in tasks.values())
    figure, axes = canvas(len(tasks), 2, 5.0, 1.1 + 0.36 * longest, sharey="row")
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
                    (values.get(_papers_name(m, task["unit"]), {}).get(column), i) for i, m in enumerate(methods)
                ]
                for value, i in places:
                    if value is not None:
                        axis.plot(value, i, BENCHMARKS[name][benchmark], **HOLLOW)
            axis.axvline(1, color="black", linewidth=0.8)
            axis.set_xlabel(f"{method_name(task['unit'])} = 1")
            axis.set_title(f"{name}: {title}")
            tidy(axis, "x")
        axis.set_yticks(range(len(methods)), [method_name(method) for method in methods])
        axis.invert_yaxis()
        for benchmark in paper:
            label = f"paper, {paper_tables()['benchmarks'][benchmark]['name']}"
            axis.plot([], [], BENCHMARKS[name][benchmark], label=label, **HOLLOW)
        if paper:
            axis.legend(frameon=False, fontsize=8, loc="lower right")
    device = numbers["machine"].get("device", "")
    figure.suptitle(f"Training cost: bars measured{f' on {device}' if device else ''}")
    return figure


def _papers_name(method: str, unit: str) -> str:
    """The paper's row that a method is compared with; its UniAdapter of rank 512 is the unit itself."""
    if method in UNITS:
        return method_name(UNITS[1]) if method == unit else ""
    return method_name(method)


def _bars(axis: Axes, methods: Sequence[str], ratios: Sequence[float]) -> None:
    """A bar for each method, its ratio written inside."""
    colors = [OWN if method.startswith("aurora") else PALE for method in methods]
    axis.barh(range(len(methods)), ratios, color=colors, height=0.66)
    for i, ratio in enumerate(ratios):
        axis.text(0.02, i, f"{ratio:.2f}", va="center", fontsize=9, color="white" if ratio > 0.12 else "black")
