"""What all demos have in common: their runs, a project, learning rates, a table and a picture."""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from processes import ROOT, TrainingProcess, run_all

from lavis_aurora.common.summary import SUMMARY, Summary, read_summary
from lavis_aurora.training.checkpoints import BEST, LATEST

LABELS = {
    **{"frozen": "frozen backbone", "heads": "heads only", "lora": "LoRA", "aurora": "Aurora"},
    "full": "full fine-tuning",
}
COLORS = {"frozen": "#9aa5b1", "heads": "#c9b458", "lora": "#6b8e6e", "aurora": "#c2410c", "full": "#1d4e89"}
# The YAMLs have rates for Aurora's parts; LoRA of rank 2 trains as many parameters as Aurora of rank 64.
OTHERS = ("run.lr_scales={}",)
OPTIONS = {"aurora": (), "lora": (*OTHERS, "model.lora.rank=2")}
Row = dict[str, Any]


@dataclass
class Run(TrainingProcess):
    """One run of a project YAML.

    Attributes:
        project: the YAML.
        tuning: value of model.tuning.
        rate: value of run.init_lr.
        folder: everything that the run writes.
        seed: value of run.seed.
        source: a finished run whose best epoch, without validation the last, is evaluated again, with the options.
        options: KEY=VALUE of this run alone, besides those of its way of tuning.
        seconds: that it took, once it has ended.
    """

    project: Path
    tuning: str
    rate: float
    folder: Path
    seed: int = 42
    source: Run | None = None
    options: tuple[str, ...] = ()
    seconds: float = 0.0

    @property
    def name(self) -> str:
        name = f"{self.tuning}, rate {self.rate:g}" if self.tuning != "frozen" else self.tuning
        return ", ".join([name, *self.options])

    @property
    def result_folder(self) -> Path:
        """The folder of the only run in :attr:`folder`."""
        [summary] = self.folder.glob(f"*/{SUMMARY}")
        return summary.parent

    def summary(self) -> Summary:
        """What it trained and measured."""
        return read_summary(self.result_folder)

    def start(self, options: Sequence[str]) -> None:
        """Start it with these options and its own, which count where both name a key."""
        given = [f"model.tuning={self.tuning}", f"run.init_lr={self.rate}", f"run.seed={self.seed}"]
        given += [*OPTIONS.get(self.tuning, OTHERS), *options, *self.options]
        if self.source and self.tuning != "frozen":
            best, last = (self.source.result_folder / name for name in (BEST, LATEST))
            # With run.valid_splits=[] no epoch is the best.
            given.append(f"run.resume_ckpt_path={best if best.is_file() else last}")
        self.start_run(self.project, given, evaluate=self.tuning == "frozen" or self.source is not None, cwd=ROOT)

    def poll(self) -> bool:
        """Whether it has ended, which it says; a failed run ends the demo with the end of its log."""
        if not super().poll():
            return False
        if self.failed:
            end = "\n".join(self.output().splitlines()[-15:])
            sys.exit(f"demo: the run '{self.name}' failed; {self.log} ends with:\n{end}")
        print(f"done: {self.name}, {timedelta(seconds=round(self.seconds))}", flush=True)
        return True


def execute(runs: list[Run], jobs: int, options: Sequence[str]) -> None:
    """Run all, ``jobs`` at a time, saying where each one is."""

    def start(run: Run) -> None:
        run.start(options)
        print(f"started: {run.name}", flush=True)

    def on_progress(active: list[Run], _pending: int) -> None:
        for run in active:
            print(f"  {run.name}: {run.progress()}", flush=True)

    run_all(runs, jobs, start, Run.poll, on_progress)


@dataclass
class DemoTask(ABC):
    """What differs from demo to demo.

    Attributes:
        project: name of the YAML in projects/aurora.
        learning_rates: of each way of tuning, the ways in the order of the table.
        lr_grid: those that --search compares.
        score: what the best epoch is selected by, in words.
        options: KEY=VALUE of all runs of a comparison, before the user's.
    """

    project: str
    learning_rates: dict[str, float]
    lr_grid: dict[str, tuple[float, ...]]
    score: str
    options: tuple[str, ...] = ()

    @property
    def path(self) -> Path:
        return ROOT / "projects" / "aurora" / self.project

    @abstractmethod
    def metrics(self, run: Run) -> Row:
        """What a run measured on the test split."""

    def extra_evaluations(self, run: Run) -> list[Run]:
        """Further evaluations of what a run has tuned, for :meth:`metrics` to read."""
        return []

    def baselines(self, datasets: dict[str, Any], folder: Path) -> Row:
        """Metrics to compare with that no run measures, added to each row; ``folder`` is for files."""
        return {}

    @abstractmethod
    def table(self, rows: list[Row]) -> str:
        """The comparison as text."""

    @abstractmethod
    def draw(self, rows: list[Row], path: Path) -> None:
        """The comparison as a picture."""


def validation_score(run: Run) -> float:
    """Score of the best epoch on the validation split, percent."""
    return max(float(one["metrics"]["agg_metrics"]) for one in run.summary()["validation"])


def cost_columns(row: Row) -> str:
    """Columns of a table: what the run trained and took."""
    return f"{row['trained_parameters']:12,}{row['percent_of_backbone']:7.2f}%{row['seconds']:9.0f}"


COST_TITLES = f"{'trained':>12}{'share':>8}{'seconds':>9}"


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
