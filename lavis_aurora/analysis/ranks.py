"""Plots of the rank: a sweep of it (figure 3), the ranks of a nested run, and that beside runs of each rank."""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any, ClassVar

from matplotlib.figure import Figure

from lavis_aurora.analysis.drawing import CYCLE, FULL, OTHER, OURS, Plot, despine, save, spread_labels, subplots
from lavis_aurora.analysis.paper import (
    DIRECTIONS,
    LAYERS,
    WIDTH,
    aurora_count,
    label,
    lora_count,
    paper_tables,
    uniadapter_count,
)
from lavis_aurora.analysis.results import read_table, series
from lavis_aurora.common.errors import AuroraError
from lavis_aurora.common.files import read_json
from lavis_aurora.evaluation.scores import TOP

RANK_KEY = "model.mode_approx.rank"
RANKS = (4, 8, 16, 32, 64, 128, 256, 512)
METHODS = {"LoRA": (lora_count, FULL), "UniAdapter": (uniadapter_count, OTHER), "Aurora": (aurora_count, OURS)}


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


def _rank_axis(axis, ranks: list[int], names: bool = True) -> None:
    """The rank from left to right; with room for names right of the lines."""
    axis.set_xscale("log", base=2)
    axis.set_xticks(ranks, [str(rank) for rank in ranks])
    if names and len(ranks) > 1:
        axis.set_xlim(right=ranks[-1] * (ranks[-1] / ranks[0]) ** 0.3)
    axis.set_xlabel("rank R")
    axis.minorticks_off()
    despine(axis)


RANK = RankPlot()


class NestedRankPlot(Plot):
    """``ranks.json`` of a nested run, see ``run.rank``."""

    name = "ranks"
    about = "the ranks of a nested run (run.rank: auto)"

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        parser.add_argument("table", metavar="RUN/ranks.json", help="of a run with run.rank, or of lavis-aurora rank")

    def numbers(self, args: argparse.Namespace) -> dict[str, Any]:
        """The table as it is."""
        numbers: dict[str, Any] = read_json(args.table)
        return numbers

    def draw(self, numbers: dict[str, Any]) -> Figure:
        """The metric of each rank with its standard error; the best less its error; the rank that is enough."""
        figure, [axis] = subplots(1, 1, 4.6, 3.4)
        rows = numbers["ranks"]
        best = max(rows, key=lambda row: row["metric"])
        chosen = next(row for row in rows if row["rank"] == numbers["chosen"])
        axis.errorbar(
            [row["rank"] for row in rows],
            [row["metric"] for row in rows],
            yerr=[row["error"] for row in rows],
            fmt="o-",
            capsize=4,
            color=FULL,
            label="one nested run",
        )
        least = best["metric"] - best["error"]
        axis.axhline(least, color=FULL, linewidth=0.8, linestyle=":", label="the best, less its standard error")
        label = f"enough: {chosen['rank']}"
        axis.plot(chosen["rank"], chosen["metric"], "o", markersize=11, color=OURS, zorder=4, label=label)
        _rank_axis(axis, [row["rank"] for row in rows], names=False)
        axis.set_ylabel(f"{numbers['metric']} on {numbers['split']}")
        axis.legend(frameon=False, fontsize=8, loc="lower right")
        return figure


RANK_PLOT = NestedRankPlot()


class NestedPlot(Plot):
    """``nested.json`` of scripts/nested.py."""

    name = "nested"
    about = "one nested training beside trainings of each rank (scripts/nested.py)"
    labels: ClassVar[dict[str, str]] = {
        "dedicated": "each rank by itself",
        "naive": "the largest rank, cut",
        "largest": "the largest rank, its largest components",
        "proximal": "with a proximal penalty, the largest components",
    }

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        parser.add_argument("table", metavar="nested.json", help="of the folder of scripts/nested.py")

    def numbers(self, args: argparse.Namespace) -> dict[str, Any]:
        """The table as it is: recall by method, seed and rank."""
        numbers: dict[str, Any] = read_json(args.table)
        return numbers

    def draw(self, numbers: dict[str, Any]) -> Figure:
        """R@1 of each rank, a line a method, with the standard deviation over seeds."""
        figure, [axis] = subplots(1, 1, 7.6, 4.2)
        for (method, by_seed), color in zip(numbers["recall"].items(), CYCLE):
            runs = [{int(rank): value for rank, value in one.items()} for one in by_seed.values()]
            ranks = sorted(runs[0])
            values = [[run[rank] for run in runs] for rank in ranks]
            spread = [statistics.stdev(one) if len(one) > 1 else 0.0 for one in values]
            name = self.labels.get(method, f"one training, nested_steps: {method}")
            axis.errorbar(
                ranks, [statistics.mean(one) for one in values], spread, fmt="o-", capsize=3, color=color, label=name
            )
        seeds = max(len(by_seed) for by_seed in numbers["recall"].values())
        _rank_axis(axis, ranks, names=False)
        axis.set_ylabel("R@1 on test, mean of both directions")
        axis.set_title("one seed" if seeds == 1 else f"mean and standard deviation of {seeds} seeds", fontsize=10)
        figure.legend(frameon=False, fontsize=8, loc="outside lower center", ncols=2)
        return figure


NESTED = NestedPlot()


def draw_ranks(folder: Path) -> Path:
    """Draw ``ranks.json`` of a run's folder as ``ranks.png`` beside it; the picture's path."""
    numbers = RANK_PLOT.numbers(argparse.Namespace(table=folder / "ranks.json"))
    picture, _ = save(RANK_PLOT.draw(numbers), numbers, folder / "ranks.png")
    return picture
