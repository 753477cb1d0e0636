r"""Compare one nested training with trainings of each rank, over seeds, on the test split.

    python scripts/nested.py --task pictures --output output/nested --jobs 2
    python scripts/nested.py --task clips --output output/nested_clips --seeds 1 --methods growing dedicated

The same command again goes on. Methods: ``growing``, ``one`` and ``uniform`` are values of
mode_approx.nested_steps, with 1.5 times the epochs; of each run the adapter of the best epoch is cut to every rank
and tested. ``dedicated`` trains each rank by itself. ``naive`` cuts the dedicated run of the largest rank, whose
components are in no order; ``largest`` keeps its largest components, and ``proximal`` those of a run of 1.5 times the
epochs that shortens components in each step, see proximal.py. The area is that under R@1 (the mean of both
directions) over log2(rank), per unit of it, so that it is a recall too. nested.json in the folder holds the recalls,
which ``figures.py nested`` draws; another call adds its methods and seeds there.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any, Optional

from comparison import SEEDS, TASKS
from processes import ROOT, add_jobs_argument, add_options_argument
from proximal import component_sizes
from sweep import Cell, locked, run_cells, write_or_check_plan
from torch import Tensor

from lavis_aurora.adapters.config import AdapterConfig, read_adapter
from lavis_aurora.adapters.files import set_tensors, truncated_adapter, write_adapter
from lavis_aurora.adapters.sets import KINDS
from lavis_aurora.analysis.results import compared_metrics, latest_run
from lavis_aurora.common.errors import AuroraError
from lavis_aurora.common.files import read_json, write_text
from lavis_aurora.common.summary import read_summary
from lavis_aurora.mode_approx.factors import FactorSet
from lavis_aurora.project import merge_options

RANKS = (4, 8, 16, 32, 64)
NESTED = ("growing", "one", "uniform")
METHODS = (*NESTED, "dedicated", "naive", "largest", "proximal")
CUT_RUN = {"naive": "dedicated", "largest": "dedicated"}  # whose adapter a method cuts, if not its own
SORTED = ("largest", "proximal")
# What the comparison of methods found best for this size, see scripts/comparison/aurora_all_linear.yaml.
OPTIONS = ("model.mode_approx.targets=all_linear",)
RATE, RATES = "1e-2", {4: "2e-2"}  # by rank
LONGER = 1.5  # epochs of a nested training by those of one rank


class CutTest(Cell):
    """A test of a trained cell's best epoch, of an adapter that is cut to a rank.

    Args:
        trained: the cell.
        rank: to which its adapter is cut.
        largest: keep the largest components, not the first.
    """

    def __init__(self, trained: Cell, rank: int, largest: bool = False) -> None:
        folder = trained.folder / f"{'largest' if largest else 'rank'}_{rank}"
        super().__init__({**trained.settings, "model.mode_approx.rank": str(rank)}, folder)
        self.trained, self.rank, self.largest = trained, rank, largest

    def start(self, cfg_path: str, options: Sequence[str]) -> None:
        """Cut the adapter, and start evaluate.py with it; its settings are the model's."""
        run = latest_run(self.trained.folder)
        assert run is not None
        adapter = self.folder / "adapter"
        if not adapter.exists():
            config, tensors = read_adapter(run / "adapter_best")
            if self.largest and config.settings.form == "cp":  # no other can be cut, as is said next
                tensors = sort_components(config, tensors)
            write_adapter(adapter, *truncated_adapter(config, tensors, self.rank, str(run / "adapter_best")))
        rest = [one for one in options if not one.startswith("model.mode_approx.")]
        self.start_run(cfg_path, [*rest, f"model.adapter={adapter}"], evaluate=True)


class ProximalCell(Cell):
    """A run whose components are shortened in each step."""

    program = "scripts/proximal.py"


def sort_components(config: AdapterConfig, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """An adapter's tensors with the components from the largest to the smallest, which give the same outputs."""
    slots = {name: (shape[0], shape[1]) for name, shape in config.slots.items()}
    own = set_tensors(config, tensors)
    factors = FactorSet(slots, config.settings)
    factors.load_state_dict(own)
    order = component_sizes(factors, slots).argsort(descending=True)
    prefix = KINDS[config.kind].prefix
    return {**tensors, **{f"{prefix}.{key}": one[:, order] for key, one in own.items()}}


def trained_cells(
    folder: Path, methods: Sequence[str], seeds: Sequence[int], epochs: int
) -> dict[tuple[str, int, int], Cell]:
    """The runs to train, by method, largest rank and seed; ``epochs`` are those of one rank."""
    wanted = [(method, RANKS[-1]) for method in methods if method in (*NESTED, "proximal")]
    if "dedicated" in methods:
        wanted += [("dedicated", rank) for rank in RANKS]
    if CUT_RUN.keys() & set(methods) and "dedicated" not in methods:
        wanted.append(("dedicated", RANKS[-1]))
    cells = {}
    for seed in seeds:
        for method, rank in wanted:
            settings = {
                "model.mode_approx.rank": str(rank),
                "run.seed": str(seed),
                "run.init_lr": RATES.get(rank, RATE),
            }
            if method in NESTED:
                few = ",".join(map(str, RANKS[:-1]))
                more = {"nested": "true", "nested_ranks": f"[{few}]", "nested_steps": method}
                settings |= {f"model.mode_approx.{key}": value for key, value in more.items()}
                settings["run.rank"] = "auto"
            if method != "dedicated":
                settings["run.max_epoch"] = str(round(LONGER * epochs))
            kind = ProximalCell if method == "proximal" else Cell
            cells[method, rank, seed] = kind(settings, folder / f"{method}_{rank}_seed{seed}")
    return cells


def run_or_fail(cells: Sequence[Cell], jobs: int, cfg_path: str, options: Sequence[str]) -> None:
    """Run what is not finished; an AuroraError if one fails."""
    run_cells(cells, jobs, cfg_path, options)
    lost = [cell for cell in cells if cell.result["status"] != "done"]
    if lost:
        remedy = "lower its rate" if lost[0].result["status"] == "diverged" else "the same command goes on"
        raise AuroraError(f"{len(lost)} of {len(cells)} {lost[0].result['status']}, see {lost[0].log}; {remedy}")


def recall(cell: Cell) -> float:
    """R@1 on test, the mean of both directions, or the accuracy, in percent."""
    metrics = cell.result["metrics"]["test"]
    return statistics.mean(metrics[name] for name in compared_metrics(metrics))


def training_seconds(cell: Cell) -> float:
    """Of the steps alone."""
    run = latest_run(cell.folder)
    assert run is not None
    return read_summary(run)["seconds"]["training"]


def area(recalls: Mapping[int, float]) -> float:
    """Under recall over log2(rank), by the trapezoid rule, divided by the width."""
    ranks = sorted(recalls)
    steps = [
        (math.log2(high) - math.log2(low)) * (recalls[low] + recalls[high]) / 2 for low, high in zip(ranks, ranks[1:])
    ]
    return sum(steps) / (math.log2(ranks[-1]) - math.log2(ranks[0]))


def table(found: Mapping[str, Mapping[str, Mapping[str, float]]], seconds: Mapping[str, float]) -> str:
    """Mean (and spread over seeds) by method and rank in Markdown, the area, and training seconds of a seed.

    Args:
        found: recalls by method, seed and rank, as nested.json has them.
        seconds: by method.
    """
    head = ["method", *map(str, RANKS), "area", "training, s"]
    lines = ["| " + " | ".join(head) + " |", "| --- " * len(head) + "|"]
    for method, by_seed in found.items():
        row, runs = [], [{int(rank): value for rank, value in one.items()} for one in by_seed.values()]
        for values in (*([one[rank] for one in runs] for rank in RANKS), [*map(area, runs)]):
            spread = f" ({statistics.stdev(values):.1f})" if len(values) > 1 else ""
            row.append(f"{statistics.mean(values):.1f}{spread}")
        lines.append(f"| {method} | " + " | ".join(row) + f" | {seconds[method]:.0f} |")
    return "\n".join(lines)


def collect(
    methods: Sequence[str],
    seeds: Sequence[int],
    trained: Mapping[tuple[str, int, int], Cell],
    tests: Mapping[tuple[str, int, int], CutTest],
) -> tuple[dict[str, dict[int, dict[int, float]]], dict[str, float]]:
    """Recall by method, seed and rank, and the mean seconds of a seed's training."""
    found: dict[str, dict[int, dict[int, float]]] = {}
    seconds: dict[str, float] = {}
    for method in methods:
        source = CUT_RUN.get(method, method)
        runs = [cell for (name, rank, _), cell in trained.items() if name == source]
        if method in CUT_RUN:
            runs = [trained[source, RANKS[-1], seed] for seed in seeds]
        seconds[method] = sum(training_seconds(cell) for cell in runs) / len(seeds)
        for seed in seeds:
            if method == "dedicated":
                found.setdefault(method, {})[seed] = {rank: recall(trained[method, rank, seed]) for rank in RANKS}
                continue
            whole = trained[source, RANKS[-1], seed]
            cut = {rank: recall(tests[method, rank, seed]) for rank in RANKS[:-1]}
            found.setdefault(method, {})[seed] = {**cut, RANKS[-1]: recall(whole)}
    return found, seconds


def add_results(path: Path, found: Mapping[str, Any], seconds: Mapping[str, float], auto: Mapping[str, int]) -> Any:
    """Add recalls by method, seed and rank, seconds by method, and chosen ranks to those of the file; all of them."""
    known = read_json(path) if path.is_file() else {"recall": {}, "seconds": {}, "auto": {}}
    for method, by_seed in found.items():
        of_method = known["recall"].setdefault(method, {})
        for seed, recalls in by_seed.items():
            of_method[str(seed)] = {str(rank): value for rank, value in recalls.items()}
        known["recall"][method] = dict(sorted(of_method.items(), key=lambda one: int(one[0])))
    known["seconds"].update(seconds)
    known["auto"].update(auto)
    write_text(path, json.dumps(known, indent=1) + "\n")
    return known


def run(args: argparse.Namespace) -> None:
    """Train, test, and write the table."""
    cfg_path, options = str(ROOT / "projects" / "aurora" / TASKS[args.task]), [*OPTIONS, *args.options]
    folder = args.output.expanduser().absolute()
    write_or_check_plan(folder, cfg_path, options)
    epochs = int(merge_options(cfg_path, options).run.max_epoch)
    trained = trained_cells(folder, args.methods, args.seeds, epochs)
    run_or_fail([*trained.values()], args.jobs, cfg_path, options)
    tests = {
        (method, rank, seed): CutTest(trained[CUT_RUN.get(method, method), RANKS[-1], seed], rank, method in SORTED)
        for method, seed, rank in product(args.methods, args.seeds, RANKS[:-1])
        if method != "dedicated"
    }
    run_or_fail([*tests.values()], args.jobs, cfg_path, options)
    found, seconds = collect(args.methods, args.seeds, trained, tests)
    auto = {}
    for (method, _, seed), cell in trained.items():
        at = latest_run(cell.folder)
        if method in NESTED and at is not None:
            auto[f"{method}, seed {seed}"] = read_json(at / "ranks.json")["chosen"]
    with locked(folder):
        known = add_results(folder / "nested.json", found, seconds, auto)
    print(table(known["recall"], known["seconds"]))
    if known["auto"]:
        print("run.rank: auto chose " + "; ".join(f"{rank} ({which})" for which, rank in known["auto"].items()))


def main(argv: Optional[Sequence[str]] = None) -> None:
    """Run what is missing, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--task", choices=TASKS, default="pictures", help="default: %(default)s")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), help="default: all")
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS), help="default: %(default)s")
    add_options_argument(parser, "the same for all runs")
    parser.add_argument("--output", type=Path, default=Path("output/nested"), help="folder; the same one goes on")
    add_jobs_argument(parser, 1)
    try:
        run(parser.parse_args(argv))
    except AuroraError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("interrupted; the same command goes on")


if __name__ == "__main__":
    main()
