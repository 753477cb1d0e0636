"""What all figures have in common: a headless canvas, colours, and the numbers beside each picture."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import matplotlib
import matplotlib.pyplot as plt  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402

from lavis_aurora.common.errors import AuroraError  # noqa: E402

# The paper's unit of cost. In LAVIS's own model first: that is how its UniAdapter ran.
UNITS = ("lavis-uniadapter-512", "uniadapter-512")
NAMES = {"uniadapter": "UniAdapter", "aurora": "Aurora", "lora": "LoRA"}


def method_name(method: str) -> str:
    """A method of the benchmark program, as the paper writes it.

    >>> method_name("lavis-uniadapter-512")
    "UniAdapter (r=512), LAVIS's own"
    """
    if method == "frozen-flow":
        return "frozen, gradients flow"
    if method.startswith("lavis-"):
        return f"{method_name(method[len('lavis-') :])}, LAVIS's own"
    kind, _, rank = method.rpartition("-")
    return f"{NAMES[kind]} (r={rank})" if kind in NAMES else method


matplotlib.use("Agg")



OWN, FULL, OTHER, PALE = "#c2410c", "#1d4e89", "#c9b458", "#9aa5b1"
CYCLE = (OWN, FULL, "#4d7c0f", "#7e22ce", OTHER, "#0f766e", PALE)
DPI = 140


class FigureModule(Protocol):
    """A figure: what it reads, the numbers it makes of that, and the picture of these numbers."""

    def add_arguments(self, parser) -> None: ...

    def numbers(self, args) -> dict[str, Any]: ...

    def draw(self, numbers: dict[str, Any]) -> Figure: ...


def canvas(rows: int, columns: int, width: float, height: float, **options: Any) -> tuple[Figure, list[Axes]]:
    """A figure of equal panels, each of ``width`` by ``height`` inches, and the panels row by row."""
    figure, axes = plt.subplots(
        rows, columns, figsize=(width * columns, height * rows), squeeze=False, layout="constrained", **options
    )
    return figure, list(axes.flat)


def tidy(axis: Axes, grid: str = "y") -> None:
    """No frame but two axes, and a light grid."""
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(axis=grid, color="#e5e7eb", linewidth=0.8)
    axis.set_axisbelow(True)


def blank(axis: Axes) -> None:
    """A panel of a picture: no axes."""
    axis.set_xticks([])
    axis.set_yticks([])
    axis.spines[:].set_visible(False)


def apart(heights: Sequence[float], gap: float, top: float = 0.98) -> list[float]:
    """Heights from low to high, moved so that names at them do not overlap: ``gap`` apart, none above ``top``."""
    moved = list(heights)
    for i in range(1, len(moved)):
        moved[i] = max(moved[i], moved[i - 1] + gap)
    above = top + gap
    for i in reversed(range(len(moved))):
        above = moved[i] = min(moved[i], above - gap)
    return moved


def save(figure: Figure, numbers: dict[str, Any], path: str | Path) -> tuple[Path, Path]:
    """Write the picture, and its numbers as json beside it; returns both paths.

    Raises:
        AuroraError: it cannot be written.
    """
    path = Path(path)
    beside = path.with_suffix(".json")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=DPI)
        beside.write_text(json.dumps(numbers, indent=1))
    except OSError as error:
        raise AuroraError(f"{path}: cannot be written ({error})") from error
    finally:
        plt.close(figure)
    return path, beside
