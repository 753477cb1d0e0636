"""Runs of the demo: each a training or evaluation in a process of its own."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from processes import ROOT, TrainingProcess, run_all


@dataclass
class Run(TrainingProcess):
    """One run of a project YAML.

    Attributes:
        project: the YAML.
        tuning: value of model.tuning.
        rate: value of run.init_lr.
        folder: everything that the run writes.
        seed: value of run.seed.
        of: a run that is over; its best epoch is evaluated again, with the options.
        options: KEY=VALUE of this run alone.
    """

    project: Path
    tuning: str
    rate: float
    folder: Path
    seed: int = 42
    of: Run | None = None
    options: tuple[str, ...] = ()
    seconds: float = 0.0

    @property
    def name(self) -> str:
        name = f"{self.tuning}, rate {self.rate:g}" if self.tuning != "frozen" else self.tuning
        return ", ".join([name, *self.options])

    @property
    def log(self) -> Path:
        return self.folder / "log.txt"

    def start(self, options: Sequence[str]) -> None:
        """Start it."""
        given = [f"model.tuning={self.tuning}", f"run.init_lr={self.rate}", f"run.seed={self.seed}"]
        given += [f"run.output_dir={self.folder}", *options, *self.options]
        if self.of and self.tuning != "frozen":
            [best] = self.of.folder.glob("*/checkpoint_best.pth")
            given.append(f"run.resume_ckpt_path={best}")
        script = "evaluate.py" if self.tuning == "frozen" or self.of else "train.py"
        self.folder.mkdir(parents=True)
        self.launch(ROOT / script, self.project, given, more={"HF_HUB_OFFLINE": "1"}, cwd=ROOT)

    def ended(self) -> bool:
        """Whether it is done, which it says; a failed run ends the demo with the end of its log."""
        if self.process.poll() is None:
            return False
        self.seconds = time.time() - self.started
        if self.process.returncode:
            sys.exit(f"demo: the run '{self.name}' failed; {self.log} ends with:\n{self.tail(15)}")
        print(f"done: {self.name}, {timedelta(seconds=round(self.seconds))}", flush=True)
        return True

    def tail(self, lines: int) -> str:
        return "\n".join(self.output().splitlines()[-lines:])

    def results(self, pattern: str) -> list[dict[str, Any]]:
        """Its result files of that name, the last one last."""
        files = sorted(self.folder.glob(f"*/result/{pattern}"), key=lambda path: path.stat().st_mtime)
        return [json.loads(path.read_text()) for path in files]

    def trained_parameters(self) -> int:
        """Number of trained parameters, as the run logged it."""
        from lavis_aurora.analysis.results import trained_parameters

        return sum(trained_parameters(self.output()).values())


def execute(runs: list[Run], jobs: int, options: Sequence[str]) -> None:
    """Run all, ``jobs`` at a time, saying where each one is."""

    def start(run: Run) -> None:
        run.start(options)
        print(f"started: {run.name}", flush=True)

    def report(active: list[Run], waiting: int) -> None:
        for run in active:
            print(f"  {run.name}: {run.progress()}", flush=True)

    run_all(runs, jobs, start, Run.ended, report)
