r"""Compare ways of tuning by what they train: each at its own best rate, chosen on the validation split, over seeds.

    python scripts/comparison.py --task pictures --jobs 2
    python scripts/comparison.py --task clips --methods aurora_attention lora_attention --budgets 25k

A method is a YAML of scripts/comparison: its options, its size at each budget, and the rates to try. The rates
are compared with one seed; the best is run with two more. Each run leaves a record in
docs/comparison/TASK.json, which is kept with the project: the same command runs what is missing there, and prints the
table. A run that diverges has a record too, as its rate is too high; one that fails otherwise has none. Several
commands at once share the runs among them, in one --output. Another method is another YAML.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import os
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional

from comparison_methods import TASKS, Method, read_methods
from omegaconf import OmegaConf
from processes import ROOT, add_jobs_argument, add_options_argument, run_all
from sweep import Cell, check_cells, locked, report

from lavis_aurora.analysis.results import best_rate, compared, compared_metrics, latest_run
from lavis_aurora.common.errors import AuroraError
from lavis_aurora.common.files import read_json, write_text
from lavis_aurora.common.summary import Summary, read_summary
from lavis_aurora.config.models import TUNINGS
from lavis_aurora.project import AuroraConfig, merge_options

RESULTS = ROOT / "docs" / "comparison"
SEEDS = (1, 2, 3)  # the first compares the rates
Record = dict[str, Any]
# What a record is known by: what is run, and what it starts from.
SIZE = ("method", "budget")
RUN = (*SIZE, "rate", "seed")
SOURCE = ("project", "weights")


class Trial(Cell):
    """One run of a method.

    Attributes:
        comparison: whose run it is.
        key: what a record is known by: method, budget, rate (None where nothing is trained) and seed, a digest of the
            project YAML with its options, and one of the pretrained weights.
    """

    def __init__(self, comparison: Comparison, key: Record, settings: dict[str, str], folder: Path) -> None:
        rate = {} if key["rate"] is None else {"run.init_lr": repr(key["rate"])}
        super().__init__({**settings, **rate, "run.seed": str(key["seed"])}, folder)
        self.comparison, self.key = comparison, key

    @property
    def name(self) -> str:
        rate = "" if self.key["rate"] is None else f" at {self.key['rate']:g}"
        return f"{self.key['method']} {self.key['budget']}{rate}, seed {self.key['seed']}".replace("  ", " ")

    def is_done(self) -> bool:
        """Whether another command has kept its record."""
        self.comparison.read()
        record = self.comparison.known(self)
        if record is not None:
            self.result = {"status": "diverged" if "error" in record else "done"}
        return record is not None

    def keep(self) -> None:
        self.comparison.keep(self)

    def record(self) -> Record:
        """What is kept of the run, once it has ended; one that diverged has its error."""
        if self.result["status"] == "diverged":
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


def agree(one: Record, key: Record, names: Sequence[str]) -> bool:
    """Whether a record has these of a key; one from before a name was kept agrees in it."""
    return all(one.get(name, key[name]) == key[name] for name in names)


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
        trials: the runs that this command has started, or waited for.
    """

    task: str
    methods: dict[str, Method]
    budgets: Sequence[str] | None
    output: Path
    options: Sequence[str] = ()
    records: list[Record] = field(default_factory=list)
    trials: list[Trial] = field(default_factory=list)

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

    def source(self, settings: Mapping[str, str]) -> Record:
        """What such a run starts from: digests by the names of :data:`SOURCE`.

        ``project`` is of all that it is told, besides its rate and seed: not of comments, nor of the other tunings.
        ``weights`` is of the file of pretrained weights that it loads; None where it loads none, or from a URL.
        """
        options = [*self.options, *(f"{key}={value}" for key, value in settings.items())]
        written = merge_options(str(self.project), options)
        config = OmegaConf.to_container(written)
        model, run = config["model"], config["run"]
        own = TUNINGS[model["tuning"]].settings
        for key in {key for tuning in TUNINGS.values() for key in tuning.settings} - set(own):
            model.pop(key, None)
        for key in ("init_lr", "seed", "output_dir", *(() if run.get("lr_scales") else ("lr_scales",))):
            run.pop(key, None)
        path = Path(AuroraConfig.build_model_config(written).model.get("pretrained") or "").expanduser()
        return {
            "project": hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()[:12],
            "weights": hashlib.sha256(path.read_bytes()).hexdigest()[:12] if path.is_file() else None,
        }

    def trials_of(
        self, name: str, method: Method, budget: str, rates: Sequence[float | None], seeds: Sequence[int]
    ) -> list[Trial]:
        """The runs of a method at a budget."""
        settings, found = method.options_at(budget, self.task), []
        source = self.source(settings)
        options = [f"{key}={value}" for key, value in settings.items()]
        for rate, seed in itertools.product(rates, seeds):
            key = {"method": name, "label": method.label, "budget": budget, "rate": rate, "seed": seed}
            # Named by the source too, or a run of another one would be resumed.
            parts = [name, budget, "" if rate is None else f"{rate:g}", seed, *source.values()]
            folder = self.output / "_".join(map(str, parts))
            found.append(Trial(self, {**key, **source, "options": options}, settings, folder))
        return found

    def missing(self) -> tuple[list[Trial], int]:
        """The runs that can start now, and the number of those that wait for the best rate."""
        trials, later = [], 0
        for size in self.sizes():
            rates = size[1].rates_of(self.task)
            search = self.trials_of(*size, rates or [None], SEEDS[:1])
            first = [trial for trial in search if not self.known(trial)]
            if first:
                trials += first
                later += len(SEEDS) - 1 if rates else 0
                continue
            best = best_rate([record for trial in search if (record := self.known(trial))])
            if best is not None:
                more = self.trials_of(*size, [best], SEEDS[1:])
                trials += [trial for trial in more if not self.known(trial)]
        return trials, later

    def known(self, trial: Trial) -> Record | None:
        """The record of such a run."""
        return next((one for one in self.records if agree(one, trial.key, RUN + SOURCE)), None)

    def keep(self, trial: Trial) -> None:
        """Add the record of a run to the file; those of its method and budget that started from others go.

        Else a best rate might be one of the old project's.
        """

        def stays(one: Record) -> bool:
            if not agree(one, trial.key, SIZE):
                return True
            return agree(one, trial.key, SOURCE) and not agree(one, trial.key, RUN)

        with locked(RESULTS, "records of the comparison"):
            self.read()
            self.records = [*filter(stays, self.records)]
            self.records.append(trial.record())
            self.records.sort(key=lambda one: (one["method"], one["budget"], one["rate"] or 0, one["seed"]))
            write_text(self.results, json.dumps(self.records, indent=1) + "\n")

    def run(self, jobs: int) -> list[Trial]:
        """Run all that is missing, each once, and say how far it is; those that failed, and are missing still."""
        while True:
            self.read()
            trials, later = self.missing()
            missing = {trial.folder for trial in trials}
            again = [trial for trial in self.trials if trial.folder in missing]
            if replaced := [trial.folder.name for trial in again if trial.result["status"] != "failed"]:
                raise AuroraError(
                    f"{self.results}: a command with other options, or another project, has replaced the record of "
                    f"{replaced[0]}; run them one after the other"
                )
            trials = [trial for trial in trials if trial.folder not in {one.folder for one in again}]
            if not trials:
                return again
            check_cells(trials, str(self.project), self.options, self.output)
            self.trials += trials
            self.run_trials(trials, later, jobs)

    def run_trials(self, trials: list[Trial], later: int, jobs: int) -> None:
        """Run these; ``later`` counts those that follow at the best rates."""

        def start(trial: Trial) -> None:
            trial.start(str(self.project), self.options)

        def print_report(active: list[Trial], pending: int) -> None:
            print(report(self.trials, active, pending + later, jobs), flush=True)

        run_all(trials, jobs, start, Trial.poll, print_report)


def table(records: list[Record]) -> str:
    """Methods at their best rates, by budget, in Markdown."""
    points = compared(records)
    metrics = list(dict.fromkeys(metric for point in points for metric in point.scores))
    names = ["accuracy" if metric == "agg_metrics" else metric for metric in metrics]
    lines = ["| " + " | ".join(["budget", "method", "adapter parameters", "rate", "seeds", *names]) + " |"]
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
    add_options_argument(parser, "the same for all runs")
    parser.add_argument("--output", type=Path, default=Path("output/comparison"), help="folder of the runs")
    add_jobs_argument(parser, 1)
    args = parser.parse_args(argv)
    os.environ["HF_HUB_OFFLINE"] = "1"
    try:
        output = (args.output / args.task).absolute()
        comparison = Comparison(args.task, read_methods(args.methods), args.budgets, output, args.options)
        failed = comparison.run(args.jobs)
    except AuroraError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("interrupted; the same command goes on")
    print(table(comparison.records))
    if failed:
        count = f"{len(failed)} of {len(comparison.trials)} runs failed"
        sys.exit(f"error: {count}, e.g. {failed[0].log}; the same command tries them again")


if __name__ == "__main__":
    main()
