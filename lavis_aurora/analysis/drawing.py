"""What all plots have in common: their protocol, headless panels, colors, and the numbers next to each picture."""

from __future__ import annotations

import argparse
import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lavis_aurora.common.files import write_text, writing

matplotlib.use("Agg")

OURS, FULL, OTHER, PALE = "#c2410c", "#1d4e89", "#c9b458", "#9aa5b1"
CYCLE = (OURS, FULL, "#4d7c0f", "#7e22ce", OTHER, "#0f766e", PALE)
DPI = 140


class Plot(ABC):
    """A plot of scripts/figures.py.

    Attributes:
        name: of the plot, on the command line.
        about: what it shows.
    """

    name: str
    about: str

    @abstractmethod
    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Add what it reads to its command line."""

    @abstractmethod
    def numbers(self, args: argparse.Namespace) -> dict[str, Any]:
        """What is drawn, fit for json.

        Raises:
            AuroraError: what the arguments name cannot be drawn.
        """

    @abstractmethod
    def draw(self, numbers: dict[str, Any]) -> Figure:
        """The picture of these numbers; it needs nothing else."""


def subplots(rows: int, columns: int, width: float, height: float, **options: Any) -> tuple[Figure, list[Axes]]:
    """A figure of equal panels, each of ``width`` by ``height`` inches, and the panels row by row."""
    figure, axes = plt.subplots(
        rows, columns, figsize=(width * columns, height * rows), squeeze=False, layout="constrained", **options
    )
    return figure, list(axes.flat)


def despine(axis: Axes, grid: str = "y") -> None:
    """No frame but two axes, and a light grid."""
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(axis=grid, color="#e5e7eb", linewidth=0.8)
    axis.set_axisbelow(True)


def hide_axes(axis: Axes) -> None:
    """A panel of a picture: no axes."""
    axis.set_xticks([])
    axis.set_yticks([])
    axis.spines[:].set_visible(False)


def spread_labels(heights: Sequence[float], gap: float, top: float = 0.98) -> list[float]:
    """Heights from low to high, moved so that names at them do not overlap: ``gap`` apart, none above ``top``."""
    moved = list(heights)
    for i in range(1, len(moved)):
        moved[i] = max(moved[i], moved[i - 1] + gap)
    above = top + gap
    for i in reversed(range(len(moved))):
        above = moved[i] = min(moved[i], above - gap)
    return moved


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
            arrowprops={
                "arrowstyle": "-",
                "color": color,
                "linewidth": 0.6,
                "alpha": 0.8,
                "relpos": (0, 0.5),
                "shrinkA": 1,
            },
        )


def save(figure: Figure, numbers: dict[str, Any], path: str | Path) -> tuple[Path, Path]:
    """Write the picture, and its numbers as json beside it; returns both paths.

    Raises:
        AuroraError: it cannot be written.
    """
    path = Path(path)
    beside = path.with_suffix(".json")
    try:
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            figure.savefig(path, dpi=DPI)
        write_text(beside, json.dumps(numbers, indent=1))
    finally:
        plt.close(figure)
    return path, beside
