"""What all demos have in common: a project, learning rates, a table and a picture."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from demo_runs import Run
from processes import ROOT

LABELS = {"frozen": "frozen backbone", "heads": "heads only", "aurora": "Aurora", "full": "full fine-tuning"}
COLORS = {"frozen": "#9aa5b1", "heads": "#c9b458", "aurora": "#c2410c", "full": "#1d4e89"}
Row = dict[str, Any]


@dataclass
class DemoTask(ABC):
    """What differs from demo to demo.

    Attributes:
        project: name of the YAML in projects/aurora.
        rates: learning rate of each way of tuning, the ways in the order of the table.
        grid: rates that --search compares.
        score: what the best epoch is selected by, in words.
    """

    project: str
    rates: dict[str, float]
    grid: dict[str, tuple[float, ...]]
    score: str

    @property
    def path(self) -> Path:
        return ROOT / "projects" / "aurora" / self.project

    @abstractmethod
    def figures(self, run: Run) -> Row:
        """What a run measured on the test split."""

    def again(self, run: Run) -> list[Run]:
        """Further evaluations of what a run has tuned, for :meth:`figures` to read."""
        return []

    @abstractmethod
    def validation(self, run: Run) -> float:
        """Score of the best epoch on the validation split, percent."""

    def references(self, datasets: dict[str, Any], folder: Path) -> Row:
        """Figures to compare with that no run measures, added to each row; ``folder`` is for files."""
        return {}

    @abstractmethod
    def table(self, rows: list[Row]) -> str:
        """The comparison as text."""

    @abstractmethod
    def draw(self, rows: list[Row], path: Path) -> None:
        """The comparison as a picture."""


def cost(row: Row) -> str:
    """Columns of a table: what the run trained and took."""
    return f"{row['trained_parameters']:12,}{row['percent_of_backbone']:7.2f}%{row['seconds']:9.0f}"


COST_HEADS = f"{'trained':>12}{'share':>8}{'seconds':>9}"


def cost_label(row: Row) -> str:
    """Lines under a bar: the way of tuning, and what it trained."""
    name = LABELS[row["tuning"]].replace(" ", "\n")
    return f"{name}\n{row['trained_parameters']:,}\n({row['percent_of_backbone']:.1f}%)"


def gap_closed(scores: dict[str, float]) -> float | None:
    """Share of the way from frozen to full fine-tuning that Aurora goes, percent; None where there is no way.

    Args:
        scores: by way of tuning.
    """
    gap = scores["full"] - scores["frozen"]
    return 100 * (scores["aurora"] - scores["frozen"]) / gap if gap > 0 else None
