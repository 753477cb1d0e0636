r"""Train a project once for each cell of a grid of options, and write one table of what came out.

    python scripts/sweep.py --cfg-path projects/aurora/demo_ret.yaml --output output/sweep_rank --jobs 2 \
        --grid model.mode_approx.rank=4,16,64 run.seed=1,2

Each cell is `python train.py` in a process and a folder of its own. The same command again goes on: finished and
diverged cells are kept, interrupted ones resume, failed ones are tried again. Several at once share the cells among
them. sweep.csv holds a row for each cell, and mean and spread (sample standard deviation) over the seeds.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, Optional

from processes import TrainingProcess, add_jobs_argument, add_options_argument, run_all

from lavis_aurora.analysis.results import final_metrics, latest_run, trained_parameters, write_table
from lavis_aurora.common.errors import AuroraError, Diverged
from lavis_aurora.common.files import read_json, write_text
from lavis_aurora.common.summary import read_summary
from lavis_aurora.data.annotations import build_checked
from lavis_aurora.project import load_config
from lavis_aurora.training.run_lock import FolderInUse, RunLock

DONE, PLAN = "cell.json", "sweep.json"
PATIENCE = 2.0  # seconds that nobody is told of


@contextmanager
def locked(folder: Path, named_by: str = "--output") -> Iterator[None]:
    """Around what no other process does in a folder at the same time; it is made. Arguments are RunLock's."""
    folder.mkdir(parents=True, exist_ok=True)
    start, said = time.monotonic(), False
    with RunLock(named_by) as lock:
        while True:
            try:
                lock.take(folder)
                break
            except FolderInUse as error:
                if not said and time.monotonic() - start > PATIENCE:
                    print(f"waiting: {error}", flush=True)
                    said = True
                time.sleep(0.1)
        yield


def parse_grid(arguments: Sequence[str]) -> dict[str, list[str]]:
    """Values by key of ``KEY=VALUE,VALUE`` arguments; commas inside brackets separate nothing.

    Raises:
        AuroraError: an argument is of another form, or names something twice.
    """
    grid: dict[str, list[str]] = {}
    for argument in arguments:
        key, sign, text = argument.partition("=")
        values = re.split(r",(?![^\[{]*[\]}])", text)
        if not sign or not key or "" in values:
            raise AuroraError(f"--grid {argument}: not KEY=VALUE,VALUE")
        if key in grid or len(set(values)) < len(values):
            raise AuroraError(f"--grid {argument}: a key or a value stands there twice")
        grid[key] = values
    return grid


@dataclass
class Cell(TrainingProcess):
    """One combination of the grid's values.

    Attributes:
        settings: value of each key.
        folder: everything that it writes.
        result: status (done, failed, diverged), seconds, and what came out; empty before the end.
    """

    settings: dict[str, str]
    folder: Path
    result: dict[str, Any] = field(default_factory=dict)
    lock: RunLock = field(default_factory=lambda: RunLock("--output"), compare=False)

    @property
    def name(self) -> str:
        return cell_name(self.settings)

    def take(self) -> bool:
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            self.lock.take(self.folder)
        except FolderInUse:
            return False
        return True

    def release(self) -> None:
        self.lock.release()

    def is_done(self) -> bool:
        """Whether another command finished it; its result is then read."""
        if (self.folder / DONE).is_file():
            self.result = read_json(self.folder / DONE)
        return bool(self.result)

    def keep(self) -> None:
        """Write down a result that stands, for :meth:`is_done`."""
        write_text(self.folder / DONE, json.dumps(self.result, indent=1))

    @property
    def diverged(self) -> bool:
        """Whether training ended because of its rate, by :class:`Diverged`, and of nothing that comes and goes."""
        return self.process is not None and self.process.returncode == Diverged.exit_status

    def start(self, cfg_path: str, options: Sequence[str]) -> None:
        """Start it on one thread, or go on where it was interrupted."""
        given = [*options, *(f"{key}={value}" for key, value in self.settings.items())]
        # Of the frozen model there is nothing to train: the same test, without a word about it.
        frozen = "model.tuning=frozen" in given
        self.start_run(cfg_path, given if frozen else [*given, "run.resume=auto"], evaluate=frozen)

    def poll(self) -> bool:
        """Whether it has ended, which it says; its result is then complete, and kept if the next try would end so."""
        if not super().poll():
            return False
        run = None if self.failed else latest_run(self.folder)
        if run is None:
            error, status = last_error(self.output()), "diverged" if self.diverged else "failed"
            self.result = {"status": status, "seconds": self.seconds, "error": error}
            said = f"{status}: {self.name}: {error}\n  all of it: {self.log}"
        else:
            self.result = {
                "status": "done",
                "seconds": self.seconds,
                "run": run.name,
                "parameters": trained_parameters(read_summary(run)),
                "metrics": final_metrics(run),
            }
            said = f"done: {self.name}, {timedelta(seconds=round(self.seconds))}"
        if self.result["status"] != "failed":
            self.keep()
        print(said, flush=True)
        return True


def cell_name(settings: dict[str, str]) -> str:
    """Name of a cell and of its folder."""
    shown = ",".join(f"{key}={value}" for key, value in settings.items())
    return re.sub(r"[^\w.,=+-]", "_", shown)


def last_error(output: str) -> str:
    """The line of a failed run's output that says why."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    named = [line for line in lines if re.match(r"(error|[\w.]*(Error|Exception|Interrupt))\b.*:", line)]
    return (named or lines or ["it printed nothing"])[-1]


def build_cells(grid: dict[str, list[str]], folder: Path) -> list[Cell]:
    """A cell for each combination, in the order of the grid.

    Raises:
        AuroraError: two combinations would share a folder.
    """
    cells = []
    for values in itertools.product(*grid.values()):
        settings = dict(zip(grid, values))
        cells.append(Cell(settings, folder / cell_name(settings)))
    if len({cell.folder for cell in cells}) < len(cells):
        raise AuroraError("--grid: two cells would have folders of one name; change their values")
    return cells


def write_or_check_plan(folder: Path, cfg_path: str, options: Sequence[str]) -> None:
    """Write down what all cells have in common, or compare it with what was written.

    Raises:
        AuroraError: the folder holds a sweep of another project or of other options.
    """
    plan = {"project": Path(cfg_path).read_text(encoding="utf-8"), "options": sorted(options)}
    path = folder / PLAN
    with locked(folder):
        if not path.is_file():
            write_text(path, json.dumps(plan, indent=1))
            return
    before = read_json(path)
    if before["project"] != plan["project"]:
        raise AuroraError(f"--output {folder}: it holds a sweep of another project; name another folder")
    if before["options"] != plan["options"]:
        theirs = " ".join(before["options"]) or "none"
        raise AuroraError(f"--output {folder}: it holds a sweep with other options, {theirs}; name another folder")


def check_cells(cells: Sequence[Cell], cfg_path: str, options: Sequence[str], folder: Path) -> None:
    """Check every cell's configuration before any of them starts, and make data that several would make at once.

    Other commands of the folder may be about to make them too.
    """
    configs = [
        load_config(cfg_path, [*options, *(f"{key}={value}" for key, value in cell.settings.items())])
        for cell in cells
    ]
    with locked(folder):
        for name, dataset in configs[0].datasets_cfg.items():
            build_checked(name, dataset)


def time_left(done: Sequence[float], pending: int, running: Sequence[float], jobs: int) -> Optional[float]:
    """Seconds until all cells are done; None before the first is.

    Args:
        done: seconds that each finished cell took.
        pending: cells that have not started.
        running: seconds since each running cell started.
        jobs: cells at a time.
    """
    if not done:
        return None
    mean = sum(done) / len(done)
    work = pending * mean + sum(max(mean - seconds, 0) for seconds in running)
    longest = max([max(mean - seconds, 0) for seconds in running], default=0)
    return max(work / jobs, longest)


def report(cells: Sequence[Cell], active: Sequence[Cell], pending: int, jobs: int) -> str:
    """The progress line, and one for each running cell; ``pending`` are those that do not run yet, or elsewhere."""
    counts = Counter(cell.result["status"] for cell in cells if cell.result)
    total, done = sum(counts.values()) + len(active) + pending, counts.pop("done", 0)
    counts["running elsewhere"] = sum(cell.elsewhere for cell in cells)
    fresh = [cell.result["seconds"] for cell in cells if cell.process and cell.result.get("status") == "done"]
    left = time_left(fresh, pending, [time.time() - cell.start_time for cell in active], jobs)
    shown = "known after the first cell" if left is None else f"about {timedelta(seconds=round(left))}"
    others = "".join(f", {count} {what}" for what, count in counts.items() if count)
    head = f"[{done}/{total} done{others}]  left: {shown}"
    return "\n".join([head, *(f"  {cell.name}: {cell.progress()}" for cell in active)])


def run_cells(cells: Sequence[Cell], jobs: int, cfg_path: str, options: Sequence[str]) -> None:
    """Run what is not finished, ``jobs`` at a time, with a progress line every now and then."""
    pending = [cell for cell in cells if not cell.is_done()]
    if len(pending) < len(cells):
        print(f"{len(cells) - len(pending)} of {len(cells)} cells are finished and kept", flush=True)

    def print_report(active: list[Cell], left: int) -> None:
        print(report(cells, active, left, jobs), flush=True)

    run_all(pending, jobs, lambda cell: cell.start(cfg_path, options), Cell.poll, print_report)


def run(arguments: argparse.Namespace) -> int:
    """The whole sweep; the exit code is the number of failed cells, at most 1."""
    grid = parse_grid(arguments.grid)
    folder = Path(arguments.output).expanduser().absolute()
    cells = build_cells(grid, folder)
    if not Path(arguments.cfg_path).is_file():
        raise AuroraError(f"--cfg-path {arguments.cfg_path}: no such file")
    check_cells(cells, arguments.cfg_path, arguments.options, folder)
    write_or_check_plan(folder, arguments.cfg_path, arguments.options)
    start = time.time()
    try:
        run_cells(cells, arguments.jobs, arguments.cfg_path, arguments.options)
    finally:
        if any(cell.result for cell in cells):
            with locked(folder):
                write_table([(cell.settings, cell.result) for cell in cells if cell.result], folder / "sweep.csv")
    failed = [cell for cell in cells if cell.result["status"] != "done"]
    print(f"{len(cells)} cells, {len(failed)} failed, {timedelta(seconds=round(time.time() - start))}")
    print(f"table: {folder / 'sweep.csv'}")
    return min(len(failed), 1)


def main(argv: Optional[Sequence[str]] = None) -> None:
    """Run the sweep that the command line asks for; the exit status is 1 if a cell failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cfg-path", required=True, help="project YAML")
    parser.add_argument(
        "--grid", action="extend", nargs="+", required=True, metavar="KEY=VALUE,VALUE", help="what differs"
    )
    add_options_argument(parser, "the same for all cells")
    parser.add_argument("--output", required=True, help="folder of the sweep; the same folder goes on")
    add_jobs_argument(parser, 1)
    try:
        sys.exit(run(parser.parse_args(argv)))
    except AuroraError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("interrupted; the same command goes on")


if __name__ == "__main__":
    main()
