"""Plots of a sweep: the forms of one part of the method (figures 4 and 6, and 4.4), and the rank (figure 3)."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from matplotlib.figure import Figure

from lavis_aurora.analysis.drawing import CYCLE, FULL, OTHER, OURS, PALE, Plot, despine, spread_labels, subplots
from lavis_aurora.analysis.paper import (
    DIRECTIONS,
    LAYERS,
    WIDTH,
    aurora_count,
    label,
    lora_count,
    metric_title,
    paper_tables,
    uniadapter_count,
)
from lavis_aurora.analysis.results import ComparedMethod, compared, read_table, series
from lavis_aurora.common.errors import AuroraError
from lavis_aurora.common.files import read_json
from lavis_aurora.evaluation.scores import TOP

RECALLS = ("image_to_text_r1", "text_to_image_r1", "video_to_text_r1", "text_to_video_r1", "agg_metrics")
MIN_AXIS_SPAN = 6.0  # percent; what differs by less is hardly more than chance, and shall not look like more
RANK_KEY = "model.mode_approx.rank"
RANKS = (4, 8, 16, 32, 64, 128, 256, 512)
METHODS = {"LoRA": (lora_count, FULL), "UniAdapter": (uniadapter_count, OTHER), "Aurora": (aurora_count, OURS)}


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
            low, high = axis.get_ylim()
            missing = max(MIN_AXIS_SPAN - (high - low), 0) / 2
            axis.set_ylim(low - missing, high + missing)
            despine(axis)
        axes[0].set_ylabel("percent")
        seeds = sorted({len(found[metric]["cells"]) for found in values.values() for metric in found})
        count = str(seeds[0]) if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]}"
        spread = "mean, standard deviation and each of" if seeds[-1] > 1 else "of"
        figure.suptitle(f"{self.title}: {spread} {count} seed{'s' if seeds[-1] > 1 else ''}")
        return figure


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


class RankPlot(Plot):
    """Recall against the rank R, and parameters against it together with LoRA and UniAdapter."""

    name = "rank"
    about = "recall and parameters against the rank (figure 3)"

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        parser.add_argument("table", metavar="SWEEP.CSV", help=f"of scripts/sweep.py, over {RANK_KEY} and seeds")
        parser.add_argument("--split", default="test")
        parser.add_argument("--layers", type=int, default=LAYERS, help="L of the counts; BLIP base's by default")
        parser.add_argument("--width", type=int, default=WIDTH, help="d of the counts; BLIP base's by default")

    def numbers(self, args: argparse.Namespace) -> dict[str, Any]:
        """Recalls by direction and rank, counts by method and rank."""
        columns = list(read_table(args.table, RANK_KEY)[0])
        panels = {}
        for direction in DIRECTIONS:
            names = [f"{args.split}.{direction}_r{k}" for k in TOP]
            if all(name in columns for name in names):
                panels[direction] = names
        accuracy = f"{args.split}.agg_metrics"
        if not panels and accuracy in columns:
            panels["accuracy"] = [accuracy]
        if not panels:
            raise AuroraError(
                f"{args.table}: has no recalls and no accuracy of the split {args.split!r}; see --split"
            )
        found = series(args.table, RANK_KEY, [name for names in panels.values() for name in names])
        ranks = sorted(found, key=int)
        sizes = {
            name: [count(rank, args.layers, args.width) for rank in RANKS] for name, (count, _) in METHODS.items()
        }
        base = (args.layers, args.width) == (LAYERS, WIDTH)
        return {
            "table": str(args.table),
            "panels": panels,
            "ranks": [int(rank) for rank in ranks],
            "values": {rank: found[rank] for rank in ranks},
            "counts": {"layers": args.layers, "width": args.width, "ranks": list(RANKS), **sizes},
            "paper": paper_counts() if base else [],
        }

    def draw(self, numbers: dict[str, Any]) -> Figure:
        """A panel of recalls for each direction, and one of counts."""
        panels, ranks = numbers["panels"], numbers["ranks"]
        figure, axes = subplots(1, len(panels) + 1, 3.9, 3.5)
        for axis, (direction, metrics) in zip(axes, panels.items()):
            names: list[tuple[float, str, str]] = []
            for metric, color in zip(metrics, CYCLE):
                shown = [numbers["values"][str(rank)][metric] for rank in ranks]
                name = f"R@{metric.rpartition('_r')[2]}" if "_r" in metric else "accuracy"
                means = [one["mean"] for one in shown]
                axis.errorbar(ranks, means, [one["spread"] or 0 for one in shown], color=color, marker="o", capsize=3)
                names.append((means[-1], name, color))
            axis.set_title(DIRECTIONS.get(direction, direction))
            _rank_axis(axis, ranks)
            low, high = axis.get_ylim()
            names.sort()
            heights = spread_labels([(mean - low) / (high - low) for mean, _, _ in names], gap=0.055)
            for height, (_, name, color) in zip(heights, names):
                place = (ranks[-1], low + height * (high - low))
                axis.annotate(name, place, (7, 0), "data", "offset points", va="center", color=color)
        axes[0].set_ylabel("percent")
        axis, counts = axes[-1], numbers["counts"]
        for name, (_, color) in METHODS.items():
            axis.plot(counts["ranks"], counts[name], color=color, marker=".")
            last = (counts["ranks"][-1], counts[name][-1])
            axis.annotate(name, last, (5, 0), "data", "offset points", va="center", color=color)
            points = [(one["rank"], one["tunable"]) for one in numbers["paper"] if one["method"] == name]
            if points:
                axis.plot(*zip(*points), "o", color=color, markerfacecolor="none", markersize=9)
        if numbers["paper"]:
            axis.plot([], [], "o", color="black", markerfacecolor="none", markersize=9, label="paper's table 1")
        axis.plot([], [], color="black", marker=".", label="formulas of appendix E")
        axis.legend(frameon=False, loc="upper left", fontsize=8)
        axis.set_yscale("log")
        axis.set_ylim(top=axis.get_ylim()[1] * 5)
        axis.set_title(f"trained parameters, L = {counts['layers']}, d = {counts['width']}")
        _rank_axis(axis, counts["ranks"])
        cells = {len(one["cells"]) for by_metric in numbers["values"].values() for one in by_metric.values()}
        note = f"mean and standard deviation of {max(cells)} seeds" if max(cells) > 1 else "one seed"
        figure.suptitle(f"The rank R: what it gives ({note}) and what it costs")
        return figure


def paper_counts() -> list[dict[str, Any]]:
    """What table 1 of the paper says that LoRA, UniAdapter and Aurora train."""
    rows = [row for row in paper_tables()["tables"]["1"]["rows"] if row["method"] in METHODS]
    return [
        {"method": row["method"], "label": label(row), **{k: row[k] for k in ("rank", "tunable")}} for row in rows
    ]


def _rank_axis(axis, ranks: list[int]) -> None:
    axis.set_xscale("log", base=2)
    axis.set_xticks(ranks, [str(rank) for rank in ranks])
    # Names stand right of the lines.
    axis.set_xlim(right=ranks[-1] * (ranks[-1] / ranks[0]) ** 0.3 if len(ranks) > 1 else None)
    axis.set_xlabel("rank R")
    axis.minorticks_off()
    despine(axis)


RANK = RankPlot()


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

    def numbers(self, args: argparse.Namespace) -> dict[str, Any]:
        """The methods, their scores the mean over the metrics."""
        found = compared(read_json(args.records))
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
        for i, method in enumerate(methods):
            points = [one for one in numbers["methods"] if one["label"] == method]
            style: dict[str, Any] = {"color": CYCLE[i % len(CYCLE)], "label": method}
            x, y = [one["parameters"] for one in points], [one["mean"] for one in points]
            if not any(x):  # nothing is trained
                scores.axhline(y[0], linestyle=":", color=PALE, label=method)
                continue
            spread = [one["spread"] or 0 for one in points]
            scores.errorbar(x, y, yerr=spread, fmt="o-", capsize=4, **style)
            for one in points:
                if one["budget"] in ("", numbers["budget"]) and len(one["rates"]) > 1:
                    tried = sorted((float(rate), score or 0.0) for rate, score in one["rates"].items())
                    rates.plot(*zip(*tried), "o-", **style)
        metric = "R@1, mean of both directions" if len(numbers["metrics"]) > 1 else "accuracy"
        scores.set(xscale="log", xlabel="adapter parameters", ylabel=f"test: {metric}, percent")
        rates.set(xscale="log", xlabel="rate (run.init_lr)", ylabel=f"validation: {metric}, percent")
        rates.set_title(f"rates, at {numbers['budget']} parameters")
        scores.set_title(f"{numbers['task']}: each method at its best rate")
        scores.xaxis.set_major_formatter(lambda x, _: f"{x / 1000:g}k")
        scores.xaxis.set_minor_formatter(lambda x, _: f"{x / 1000:g}k" if f"{x:e}"[0] in "25" else "")
        for axis in (scores, rates):
            despine(axis)
        scores.legend(frameon=False, fontsize=8)
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
