"""Plot of the ranks of nested runs: recall or accuracy against rank, with what runs of each rank alone reach."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from lavis_aurora.analysis.drawing import FULL, OURS, Plot, despine, save, subplots
from lavis_aurora.common.files import read_json


class RankPlot(Plot):
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
        axis.set_xscale("log", base=2)
        axis.set_xticks([row["rank"] for row in rows], [str(row["rank"]) for row in rows])
        axis.set_xlabel("rank")
        axis.set_ylabel(f"{numbers['metric']} on {numbers['split']}")
        axis.legend(frameon=False, fontsize=8, loc="lower right")
        despine(axis)
        return figure


RANK_PLOT = RankPlot()


def draw_ranks(folder: Path) -> Path:
    """Draw ``ranks.json`` of a run's folder as ``ranks.png`` beside it; the picture's path."""
    numbers = RANK_PLOT.numbers(argparse.Namespace(table=folder / "ranks.json"))
    picture, _ = save(RANK_PLOT.draw(numbers), numbers, folder / "ranks.png")
    return picture
