r"""Compare ways of tuning by what they train: each at its own best rate, chosen on the validation split, over seeds.

    python scripts/comparison.py --task pictures --jobs 2
    python scripts/comparison.py --task clips --methods aurora_attention lora_attention --budgets 25k

A method is a YAML of scripts/comparison: its options, its size at each budget, and the rates to try. The rates
are compared with one seed; the best is run with two more. Each run leaves a record in
docs/comparison/TASK.json, which is kept with the project: the same command runs what is missing there, and prints the
table. Several at once share the runs among them, in one --output. Another method is another YAML.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import statistics
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, Optional

from omegaconf import OmegaConf
from processes import ROOT, add_jobs_argument, run_all
from sweep import Cell, check_cells, locked, time_left

from lavis_aurora.analysis.results import best_rate, compared, compared_metrics, latest_run
from lavis_aurora.common.errors import AuroraError, did_you_mean
from lavis_aurora.common.files import read_json, write_text
from lavis_aurora.common.parsing import parse
from lavis_aurora.common.summary import Summary, read_summary
from lavis_aurora.config.check import read_yaml
from lavis_aurora.config.models import TUNINGS
from lavis_aurora.project import merge_options

TASKS = {"pictures": "demo_ret.yaml", "clips": "demo_video.yaml", "questions": "demo_vqa.yaml"}
METHODS = ROOT / "scripts" / "comparison"
RESULTS = ROOT / "docs" / "comparison"
SEEDS = (1, 2, 3)  # the first compares the rates
Record = dict[str, Any]
RUN = ("method", "budget", "rate", "seed")
SAME = (*RUN, "project")  # which holds what the options make of it


@dataclass
class Method:
    """A YAML of the comparison.

    Attributes:
        label: in tables and pictures.
        options: of its runs, KEY=VALUE.
        task_options: further ones by task.
        size: key that holds its size, if it has one.
        budgets: that size by the name of a budget of adapter parameters.
        rates: values of run.init_lr to try; none where nothing is trained.
        tasks: that it can do.
        cost: row of scripts/bench_train.py that such a step costs on BLIP base, for ``figures.py frontier``.
    """

    label: str
    options: list[str]
    size: Optional[str] = None
    budgets: dict[str, Any] = field(default_factory=dict)
    rates: list[float] = field(default_factory=list)
    tasks: list[str] = field(default_factory=lambda: list(TASKS))
    task_options: dict[str, list[str]] = field(default_factory=dict)
    cost: Optional[str] = None

    def options_at(self, budget: str, task: str) -> dict[str, str]:
        """Options of its runs at a budget; the one without a name is that of a method of one size."""
        options = dict(option.split("=", 1) for option in [*self.options, *self.task_options.get(task, ())])
        return {**options, **({self.size: str(self.budgets[budget])} if self.size else {})}


def read_methods(names: Sequence[str] | None) -> dict[str, Method]:
    """Methods by the names of their YAMLs; all without ``names``.

    Raises:
        AuroraError: there is no such YAML, or it holds something else.
    """
    known = sorted(path.stem for path in METHODS.glob("*.yaml"))
    for name in names or ():
        if name not in known:
            raise AuroraError(f"--methods {name}: there is no {METHODS / name}.yaml{did_you_mean(name, known)}")
    found = {}
    for name in names or known:
        content = OmegaConf.to_container(read_yaml(str(METHODS / f"{name}.yaml")))
        found[name] = parse(Method, content, f"{METHODS / name}.yaml", convert=True)
    return found


class Trial(Cell):
    """One run of a method.

    Attributes:
        key: what a record is known by: method, budget, rate (None where nothing is trained) and seed, options and
            a digest of what the project YAML makes of them.
    """

    def __init__(self, key: Record, settings: dict[str, str], folder: Path) -> None:
        rate = {} if key["rate"] is None else {"run.init_lr": repr(key["rate"])}
        super().__init__({**settings, **rate, "run.seed": str(key["seed"])}, folder)
        self.key = key

    @property
    def name(self) -> str:
        rate = "" if self.key["rate"] is None else f" at {self.key['rate']:g}"
        return f"{self.key['method']} {self.key['budget']}{rate}, seed {self.key['seed']}".replace("  ", " ")

    def record(self) -> Record:
        """What is kept of the run, once it has ended; a failed one, e.g. of too high a rate, has its error."""
        if self.result["status"] == "failed":
            return {**self.key, "error": self.result["error"]}
        summary = read_summary(latest_run(self.folder) or self.folder)
        return {
            **self.key,
            "parameters": summary["parameters"]["groups"],
            "validation": best_validation(summary),
            "metrics": summary["metrics"]["test"],
            "seconds": round(summary["seconds"]["training"], 1),
            "versions": summary["versions"],
            "machine": summary["machine"],
        }


def best_validation(summary: Summary) -> float | None:
    """R@1 (mean of both directions), or the accuracy, of the best epoch on the validation split.

    An epoch is chosen by the mean recall, as in LAVIS; of R@5 and R@10 there is nothing left to tell rates apart by.
    """
    best = max(summary["validation"], key=lambda one: one["metrics"]["agg_metrics"], default=None)
    if best is None:
        return None
    metrics = best["metrics"]
    return statistics.mean(metrics[name] for name in compared_metrics(metrics))


@dataclass
class Comparison:
    """The methods of a task, and what is known of them.

    Attributes:
        task: a key of :data:`TASKS`.
        methods: by name.
        budgets: those to run; methods of one size are run always.
        output: folder of the runs.
        options: KEY=VALUE of all runs, besides the YAML's.
        records: of the results file when it was read last, those of methods and budgets not asked for among them.
        took: seconds of the runs of this call.
        kept: folders of these runs.
    """

    task: str
    methods: dict[str, Method]
    budgets: Sequence[str] | None
    output: Path
    options: Sequence[str] = ()
    records: list[Record] = field(default_factory=list)
    took: list[float] = field(default_factory=list)
    kept: set[Path] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.read()

    def read(self) -> None:
        """Read the results file, to which other commands may have added."""
        if self.results.is_file():
            self.records = read_json(self.results)

    @property
    def project(self) -> Path:
        return ROOT / "projects" / "aurora" / TASKS[self.task]

    @property
    def results(self) -> Path:
        return RESULTS / f"{self.task}.json"

    def sizes(self) -> Iterator[tuple[str, Method, str]]:
        """Name, method and budget of all that is compared."""
        for name, method in self.methods.items():
            if self.task not in method.tasks:
                continue
            for budget in method.budgets if method.size else ("",):
                if not budget or self.budgets is None or budget in self.budgets:
                    yield name, method, budget

    def digest(self, settings: Mapping[str, str]) -> str:
        """Of all that such a run is told, besides its rate and seed: not of comments, nor of the other tunings."""
        options = [*self.options, *(f"{key}={value}" for key, value in settings.items())]
        config = OmegaConf.to_container(merge_options(str(self.project), options))
        model, run = config["model"], config["run"]
        own = TUNINGS[model["tuning"]].settings
        for key in {key for tuning in TUNINGS.values() for key in tuning.settings} - set(own):
            model.pop(key, None)
        for key in ("init_lr", "seed", "output_dir", *(() if run.get("lr_scales") else ("lr_scales",))):
            run.pop(key, None)
        return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()[:12]

    def trial(self, name: str, method: Method, budget: str, rate: float | None, seed: int) -> Trial:
        key = {"method": name, "label": method.label, "budget": budget, "rate": rate, "seed": seed}
        settings = method.options_at(budget, self.task)
        key.update(project=self.digest(settings), options=[f"{k}={v}" for k, v in settings.items()])
        folder = f"{name}_{budget}_{'' if rate is None else f'{rate:g}'}_{seed}_{key['project']}"
        return Trial(key, settings, self.output / folder)

    def missing(self) -> tuple[list[Trial], int]:
        """The runs that can start now, and the number of those that wait for the best rate."""
        trials, later = [], 0
        for size in self.sizes():
            rates = size[1].rates or [None]
            search = [self.trial(*size, rate, SEEDS[0]) for rate in rates]
            first = [trial for trial in search if not self.known(trial)]
            if first:
                trials += first
                later += len(SEEDS) - 1 if size[1].rates else 0
                continue
            best = best_rate([record for trial in search if (record := self.known(trial))])
            if best is not None:
                more = (self.trial(*size, best, seed) for seed in SEEDS[1:])
                trials += [trial for trial in more if not self.known(trial)]
        return trials, later

    def known(self, trial: Trial) -> Record | None:
        """The record of such a run."""
        return next((one for one in self.records if all(one[key] == trial.key[key] for key in SAME)), None)

    def keep(self, trial: Trial) -> None:
        """Add the record of a run that has ended to the file; those of its method and budget by another project go.

        Else a best rate might be one of the old project's.
        """

        def stays(one: Record) -> bool:
            if any(one[key] != trial.key[key] for key in ("method", "budget")):
                return True
            return one["project"] == trial.key["project"] and any(one[key] != trial.key[key] for key in RUN)

        with locked(RESULTS):
            self.read()
            self.records = [*filter(stays, self.records)]
            self.records.append(trial.record())
            self.records.sort(key=lambda one: (one["method"], one["budget"], one["rate"] or 0, one["seed"]))
            write_text(self.results, json.dumps(self.records, indent=1) + "\n")

    def run(self, jobs: int) -> None:
        """Run all that is missing; a line on each run that ends, and the time left."""
        while True:
            self.read()
            trials, later = self.missing()
            if not trials:
                return
            if replaced := self.kept & {trial.folder for trial in trials}:
                raise AuroraError(
                    f"{self.results}: a command with other options, or another project, has replaced the record of "
                    f"{sorted(replaced)[0].name}; run them one after the other"
                )
            check_cells(trials, str(self.project), self.options, self.output)

            def start(trial: Trial) -> None:
                self.read()
                if not self.known(trial):
                    trial.start(str(self.project), self.options)

            def poll(trial: Trial) -> bool:
                if trial.process is None:
                    return True  # another command has kept it
                ended = trial.poll()
                if ended:
                    self.keep(trial)
                    self.kept.add(trial.folder)
                    self.took.append(trial.seconds)
                return ended

            def report(active: list[Trial], pending: int, later: int = later) -> None:
                running = [time.time() - trial.start_time for trial in active]
                left = time_left(self.took, pending + later, running, jobs)
                shown = "known after the first run" if left is None else f"about {timedelta(seconds=round(left))}"
                print(f"[{len(active)} running, {pending + later} to come]  left: {shown}", flush=True)
                for trial in active:
                    print(f"  {trial.name}: {trial.progress()}", flush=True)

            run_all(trials, jobs, start, poll, report)


def table(records: list[Record]) -> str:
    """Methods at their best rates, by budget, in Markdown."""
    points = compared(records)
    metrics = list(dict.fromkeys(metric for point in points for metric in point.scores))
    lines = ["| " + " | ".join(["budget", "method", "adapter parameters", "rate", "seeds", *metrics]) + " |"]
    lines.append("| --- " * (5 + len(metrics)) + "|")
    for point in points:
        rate = "" if point.rate is None else f"{point.rate:g}{' (an end of those tried)' if point.at_end else ''}"
        scores = []
        for metric in metrics:
            values = point.scores.get(metric, [])
            spread = f" ({statistics.stdev(values):.1f})" if len(values) > 1 else ""
            scores.append(f"{statistics.mean(values):.1f}{spread}" if values else "")
        row = [point.budget, point.label, f"{point.parameters:,}", rate, str(point.seeds), *scores]
        lines.append("| " + " | ".join(row) + " |")
    return "\n".join(lines)


def main(argv: Optional[Sequence[str]] = None) -> None:
    """Run what is missing and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--task", choices=TASKS, default="pictures", help="default: %(default)s")
    parser.add_argument("--methods", nargs="+", help="names of YAMLs of scripts/comparison; default: all")
    parser.add_argument("--budgets", nargs="+", help="of adapter parameters, as these YAMLs name them; default: all")
    parser.add_argument("--options", nargs="+", default=[], metavar="KEY=VALUE", help="the same for all runs")
    parser.add_argument("--output", type=Path, default=Path("output/comparison"), help="folder of the runs")
    add_jobs_argument(parser, 1)
    args = parser.parse_args(argv)
    os.environ["HF_HUB_OFFLINE"] = "1"
    try:
        output = (args.output / args.task).absolute()
        comparison = Comparison(args.task, read_methods(args.methods), args.budgets, output, args.options)
        comparison.run(args.jobs)
    except AuroraError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("interrupted; the same command goes on")
    print(table(comparison.records))


if __name__ == "__main__":
    main()
