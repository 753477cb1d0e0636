"""Plots of sweeps, the forms of one part of the method (figures 4 and 6, and 4.4), and of comparisons of methods."""

from __future__ import annotations

import argparse
import itertools
import textwrap
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lavis_aurora.analysis.drawing import CYCLE, OURS, PALE, Plot, despine, label_points, subplots
from lavis_aurora.analysis.paper import COSTS, method_costs, method_name, metric_title, read_costs
from lavis_aurora.analysis.results import ComparedMethod, compared, read_table, series
from lavis_aurora.common.errors import AuroraError, did_you_mean
from lavis_aurora.common.files import read_json

RECALLS = ("image_to_text_r1", "text_to_image_r1", "video_to_text_r1", "text_to_video_r1", "agg_metrics")
MIN_AXIS_SPAN = 6.0  # percent; what differs by less is hardly more than chance, and shall not look like more


@dataclass
class Ablation(Plot):
    """A plot of the values of one key.

    Attributes:
        name, about: those of every plot.
        key: of the YAML.
        title: of the figure.
        labels: of its values, in the order in which they are drawn; others follow.
        paper: the value that is the method's own.
    """

    name: str
    about: str
    key: str
    title: str
    labels: Mapping[str, str]
    paper: str

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        parser.add_argument("table", metavar="SWEEP.CSV", help=f"of scripts/sweep.py, over {self.key} and seeds")
        parser.add_argument("--metrics", nargs="+", help="columns; R@1 both ways and the mean recall by default")

    def numbers(self, args: argparse.Namespace) -> dict[str, Any]:
        """Mean, spread and cells of the metrics by value of the key, in the order drawn."""
        metrics = args.metrics or default_metrics(args.table)
        found = series(args.table, self.key, metrics)
        order = [value for value in self.labels if value in found] + [v for v in found if v not in self.labels]
        return {
            "table": str(args.table),
            "key": self.key,
            "metrics": metrics,
            "labels": {value: self.labels.get(value, value) for value in order},
            "values": {value: found[value] for value in order},
        }

    def draw(self, numbers: dict[str, Any]) -> Figure:
        """A panel for each metric: mean and spread of each form, and every seed as a dot."""
        metrics, values = numbers["metrics"], numbers["values"]
        figure, axes = subplots(1, len(metrics), 3.9, 3.4)
        for axis, metric in zip(axes, metrics):
            for i, (value, found) in enumerate(values.items()):
                one = found.get(metric)
                if one is None:
                    continue
                color = OURS if value == self.paper else PALE
                axis.errorbar(
                    i, one["mean"], yerr=one["spread"] or 0, fmt="o", markersize=9, capsize=5, color=color, zorder=3
                )
                axis.plot([i + 0.16] * len(one["cells"]), one["cells"], ".", color="#374151", markersize=5, zorder=4)
                axis.annotate(f"{one['mean']:.1f}", (i, one["mean"]), (-11, 0), "data", "offset points", ha="right")
            axis.set_xticks(range(len(values)), [numbers["labels"][value] for value in values])
            axis.set_xlim(-0.7, len(values) - 0.5)
            axis.set_title(metric_title(metric, any(other.endswith("_r1") for other in metrics)))
            _widen(axis)
            despine(axis)
        axes[0].set_ylabel("percent")
        seeds = sorted({len(found[metric]["cells"]) for found in values.values() for metric in found})
        count = str(seeds[0]) if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]}"
        spread = "mean, standard deviation and each of" if seeds[-1] > 1 else "of"
        figure.suptitle(f"{self.title}: {spread} {count} seed{'s' if seeds[-1] > 1 else ''}")
        return figure


def _widen(axis: Axes) -> None:
    """Let the axis of percent span :data:`MIN_AXIS_SPAN`."""
    low, high = axis.get_ylim()
    missing = max(MIN_AXIS_SPAN - (high - low), 0) / 2
    axis.set_ylim(low - missing, high + missing)


def default_metrics(table: str) -> list[str]:
    """R@1 of each direction and the mean recall, or the accuracy, of the first tested split of a sweep's table."""
    columns = list(read_table(table)[0])
    split = next((column.split(".")[0] for column in columns if column.endswith(".agg_metrics")), "test")
    return [name for name in (f"{split}.{metric}" for metric in RECALLS) if name in columns] or [
        f"{split}.agg_metrics"
    ]


CONTEXT = Ablation(
    name="context",
    about="forms of the context enhancement (figure 4)",
    key="model.context.form",
    title="Context enhancement",
    labels={"none": "none", "random": "random", "mean": "mean", "attention": "attention\n(the paper)"},
    paper="attention",
)
GATE = Ablation(
    name="gate",
    about="forms of the gate (figure 6)",
    key="model.gate.form",
    title="Gated query transformation",
    labels={
        "none": "none",
        "convex": "convex\n(the paper)",
        "affine": "affine\n(its code)",
        "residual": "residual\n(ours)",
    },
    paper="residual",
)
GATE_INIT = Ablation(
    name="gate-init",
    about="starting values of the gate (figure 6)",
    key="model.gate.init",
    title="Start of the gate's gamma and beta",
    labels={"ones": "ones", "zeros": "zeros\n(the paper)"},
    paper="zeros",
)
SHARING = Ablation(
    name="sharing",
    about="U and V of all towers, or of each",
    key="model.mode_approx.sharing",
    title="U and V of all towers, or of each",
    labels={"tower": "separate\nby tower", "global": "shared\n(the paper)"},
    paper="global",
)


class ComparisonPlot(Plot):
    """Methods of scripts/comparison.py: the metric against trained parameters, and against the rate.

    The first panel has the mean and spread of the test split at the best rate, the second the validation score at
    each rate, which of a run that failed is drawn as 0.
    """

    name = "comparison"
    about = "methods by what they train, each at its best rate, and by their rates"

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        parser.add_argument("records", metavar="TASK.JSON", help="of scripts/comparison.py")
        parser.add_argument("--budget", default="25k", help="whose rates are drawn; default: %(default)s")
        parser.add_argument("--methods", nargs="+", help="names of their YAMLs; default: all")

    def numbers(self, args: argparse.Namespace) -> dict[str, Any]:
        """The methods, their scores the mean over the metrics."""
        records = read_json(args.records)
        names = {record["method"] for record in records}
        for name in args.methods or ():
            if name not in names:
                raise AuroraError(f"--methods {name}: {args.records} has no run of it{did_you_mean(name, names)}")
        found = compared([record for record in records if record["method"] in (args.methods or names)])
        if not found:
            raise AuroraError(f"{args.records}: no run of it has ended well")
        return {
            "task": Path(args.records).stem,
            "budget": args.budget,
            "metrics": list(found[0].scores),
            "methods": [_scored(one) for one in found],
        }

    def draw(self, numbers: dict[str, Any]) -> Figure:
        """Two panels."""
        figure, (scores, rates) = subplots(1, 2, 5.6, 4.2)
        names = dict.fromkeys(one["label"] for one in numbers["methods"])
        methods = sorted(names, key=lambda name: not name.startswith("Aurora"))  # the first color is ours
        looks = itertools.product("os^D", [color for color in CYCLE if color != PALE])
        for method in methods:
            points = [one for one in numbers["methods"] if one["label"] == method]
            x, y = [one["parameters"] for one in points], [one["mean"] for one in points]
            if not any(x):  # nothing is trained
                scores.axhline(y[0], linestyle=":", color=PALE)
                scores.annotate(method, (1, y[0]), (-2, 2), ("axes fraction", "data"), "offset points", ha="right")
                continue
            marker, color = next(looks)
            style: dict[str, Any] = {"color": color, "marker": marker, "label": method}
            spread = [one["spread"] or 0 for one in points]
            scores.errorbar(x, y, yerr=spread, capsize=4, **style)
            for one in points:
                if one["budget"] in ("", numbers["budget"]) and len(one["rates"]) > 1:
                    tried = sorted((float(rate), score or 0.0) for rate, score in one["rates"].items())
                    rates.plot(*zip(*tried), **style)
        metric = _metric_name(numbers["metrics"])
        scores.set(xscale="log", xlabel="adapter parameters", ylabel=f"test: {metric}, percent")
        rates.set(xscale="log", xlabel="rate (run.init_lr)", ylabel=f"validation: {metric}, percent")
        rates.set_title(f"rates, at {numbers['budget']} parameters")
        scores.set_title(f"{numbers['task']}: each method at its best rate")
        scores.xaxis.set_major_formatter(lambda x, _: f"{x / 1000:g}k")
        scores.xaxis.set_minor_formatter(lambda x, _: f"{x / 1000:g}k" if f"{x:e}"[0] in "25" else "")
        for axis in (scores, rates):
            despine(axis)
        scores.legend(frameon=False, fontsize=8, loc="center right", bbox_to_anchor=(1, 0.68))
        return figure


def _scored(method: ComparedMethod) -> dict[str, Any]:
    """A method as drawn: of each seed the mean over the metrics."""
    seeds = [mean(values) for values in zip(*method.scores.values())]
    return {
        "label": method.label,
        "budget": method.budget,
        "parameters": method.parameters,
        "mean": mean(seeds),
        "spread": stdev(seeds) if len(seeds) > 1 else None,
        "seeds": seeds,
        "rate": method.rate,
        "rates": {str(rate): score for rate, score in method.rates.items()},
    }


COMPARISON = ComparisonPlot()


# The measured task of scripts/bench_train.py by that of scripts/comparison.py.
BENCHED = {"pictures": "retrieval", "clips": "video", "questions": "vqa"}


class FrontierPlot(Plot):
    """What methods reach in scripts/comparison.py against what a step of them costs by scripts/bench_train.py.

    A method's YAML names the row of the latter in its key ``cost``. The line joins those that none reaches at less.
    """

    name = "frontier"
    about = "scores against time and memory of a step"

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        parser.add_argument("bench", metavar="BENCH.JSON", help="of scripts/bench_train.py --methods frontier --out")
        parser.add_argument("records", metavar="TASK.JSON", help="of scripts/comparison.py")
        parser.add_argument("--budget", default="25k", help="of the methods that have several; default: %(default)s")
        parser.add_argument("--methods", default="scripts/comparison", help="their YAMLs; default: %(default)s")

    def numbers(self, args: argparse.Namespace) -> dict[str, Any]:
        """Scores and ratios of cost of each method, and in one line those that miss one of them."""
        task, bench, costs = Path(args.records).stem, read_costs(args.bench), method_costs(args.methods)
        if task not in BENCHED:
            raise AuroraError(f"{args.records}: name {', '.join(BENCHED)}.json of scripts/comparison.py")
        measured = bench["tasks"].get(BENCHED[task])
        remedy = f"measure by scripts/bench_train.py --tasks {BENCHED[task]} --methods frontier"
        if measured is None:
            raise AuroraError(f"{args.bench}: has no steps of {BENCHED[task]}; {remedy}")
        sizes = ("", args.budget)
        found = {one.method: one for one in compared(read_json(args.records)) if one.budget in sizes}
        points, missing = [], defaultdict(list)
        for method in {**found, **costs}:
            row = costs.get(method)
            if row is None:
                missing["no cost is named of"].append(method)
            elif method not in found:
                missing[f"no run at {args.budget} of"].append(method)
            elif row not in measured["methods"]:
                missing[f"{Path(args.bench).name} lacks"].append(f"{row} ({method})")
            else:
                points.append({**_scored(found[method]), "row": row, **measured["methods"][row]})
        left_out = "; ".join(f"{why} {', '.join(names)}" for why, names in missing.items())
        if not points:
            raise AuroraError(f"{args.bench}: nothing to draw ({left_out}); {remedy}")
        return {
            **{"task": task, "budget": args.budget, "unit": measured["unit"], "points": points, "left_out": left_out},
            **{key: bench["arguments"].get(key) for key in ("size", "batch", "clock")},
            "metrics": list(next(iter(found.values())).scores),
            "machine": bench["machine"],
        }

    def draw(self, numbers: dict[str, Any]) -> Figure:
        """Two panels, time and memory."""
        figure, axes = subplots(1, 2, 6.4, 4.6)
        points = numbers["points"]
        for axis, (key, (_, title)) in zip(axes, COSTS.items()):
            for point in points:
                color = OURS if point["label"].startswith("Aurora") else PALE
                axis.errorbar(point[key], point["mean"], point["spread"], fmt="o", capsize=4, color=color)
            best = frontier([(point[key], point["mean"]) for point in points])
            axis.step(*zip(*best), where="post", color="black", linewidth=0.8, zorder=0)
            axis.margins(0.08)
            axis.set_xlim(left=0)  # so that a tenth looks like a tenth
            _widen(axis)
            names = [(_with_seeds(point), point[key], point["mean"], PALE) for point in points]
            label_points(axis, names)
            axis.set_xlabel(f"{title}, {method_name(numbers['unit'])} = 1")
            despine(axis, "both")
        metric = _metric_name(numbers["metrics"])
        axes[0].set_ylabel(f"test: {metric}, percent")
        figure.suptitle(
            f"{metric} on the demo of {numbers['task']} against what a step costs on BLIP {numbers['size']}'s shapes"
        )
        if numbers["left_out"]:
            figure.supxlabel(textwrap.fill(f"Left out: {numbers['left_out']}", 150), fontsize=7)
        return figure


def frontier(points: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """Those (cost, score) of which no other has at most the cost and at least the score, by cost."""
    best: list[tuple[float, float]] = []
    for cost, score in sorted(points, key=lambda point: (point[0], -point[1])):
        if not best or score > best[-1][1]:
            best.append((cost, score))
    return best


def _with_seeds(point: Mapping[str, Any]) -> str:
    """The label of a point; one without an error bar says why."""
    return point["label"] if point["spread"] is not None else f"{point['label']} (one seed)"


def _metric_name(metrics: Sequence[str]) -> str:
    return "R@1, mean of both directions" if len(metrics) > 1 else "accuracy"


FRONTIER = FrontierPlot()
