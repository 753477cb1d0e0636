"""Tune the tiny BLIP on pictures or clips unlike those it knows, in several ways, and compare them.

    bash scripts/demo.sh                    # image-text retrieval: a table and a picture
    bash scripts/demo.sh --task vqa         # question answering
    bash scripts/demo.sh --task video       # video-text retrieval
    bash scripts/demo.sh --search           # learning rates compared on the validation split

Each run is `python train.py --cfg-path projects/aurora/demo_*.yaml`, with model.tuning and run.init_lr set.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

from demo_retrieval import RETRIEVAL, VIDEO
from demo_tasks import LABELS, DemoTask, Row, Run, execute, validation_score
from demo_vqa import VQA
from processes import add_jobs_argument, add_options_argument

from lavis_aurora.common.errors import AuroraError
from lavis_aurora.data.annotations import build_checked
from lavis_aurora.project import load_config

TASKS: dict[str, DemoTask] = {"retrieval": RETRIEVAL, "vqa": VQA, "video": VIDEO}


def make_data(task: DemoTask, options: Sequence[str], key: str, split: str) -> dict[str, Any]:
    """Make the data before several runs ask for them at once; the datasets by split.

    Raises:
        AuroraError: the options are wrong, or leave ``split``, which is compared, out of ``run.KEY``.
    """
    cfg = load_config(str(task.path), list(options))
    if split not in (cfg.run_cfg.get(key) or []):
        raise AuroraError(f"--options run.{key}: the ways of tuning are compared on {split}; leave it in")
    [name] = cfg.datasets_cfg
    return build_checked(name, cfg.datasets_cfg[name])


def rows_of(task: DemoTask, runs: list[Run], baselines: Row) -> list[Row]:
    """A row for each run: what it trained and took, and what it measured on the test split."""
    trained = [run.summary()["parameters"]["trainable"] for run in runs]
    return [
        {
            "tuning": run.tuning,
            "rate": run.rate,
            "seed": run.seed,
            "trained_parameters": count,
            "percent_of_backbone": 100 * count / max(trained),
            "seconds": run.seconds,
            **task.metrics(run),
            **baselines,
        }
        for run, count in zip(runs, trained)
    ]


def compare(task: DemoTask, folder: Path, jobs: int, seed: int, options: Sequence[str]) -> None:
    """Run every way of tuning, print the table, draw the picture."""
    options = [*task.options, *options]
    datasets = make_data(task, options, "test_splits", "test")
    runs = {
        tuning: Run(task.path, tuning, rate, folder / tuning, seed) for tuning, rate in task.learning_rates.items()
    }
    # The longest first: it decides when all are done.
    execute([*runs.values()][::-1], jobs, options)
    execute([further for run in runs.values() for further in task.extra_evaluations(run)], jobs, options)
    rows = rows_of(task, [*runs.values()], task.baselines(datasets, folder))
    text = task.table(rows)
    (folder / "table.txt").write_text(text + "\n", encoding="utf-8")
    (folder / "table.json").write_text(json.dumps(rows, indent=1), encoding="utf-8")
    os.environ.setdefault("MPLBACKEND", "Agg")
    task.draw(rows, folder / "table.png")
    print(f"\n{text}\n\ntable: {folder / 'table.txt'} and .json\npicture: {folder / 'table.png'}")


def search(task: DemoTask, folder: Path, jobs: int, seed: int, options: Sequence[str]) -> None:
    """Score on the validation split for each rate of the grid."""
    make_data(task, options, "valid_splits", "val")
    runs = [
        Run(task.path, t, rate, folder / f"{t}_{rate:g}", seed) for t, rates in task.lr_grid.items() for rate in rates
    ]
    execute(runs, jobs, [*task.options, "run.valid_splits=[val]", "run.test_splits=[]", *options])
    lines = [f"{'tuning':<20}{'rate':>10}{task.score + ' on val':>22}"]
    lines += [f"{LABELS[run.tuning]:<20}{run.rate:>10g}{validation_score(run):>22.1f}" for run in runs]
    (folder / "search.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n" + "\n".join(lines))


def main(argv: Sequence[str] | None = None) -> None:
    """Compare the ways of tuning, or search learning rates, as the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--task", choices=TASKS, default="retrieval", help="default: %(default)s")
    parser.add_argument("--search", action="store_true", help="choose learning rates on the validation split")
    add_jobs_argument(parser, min(2, os.cpu_count() or 1))
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--output", type=Path, help="folder of the results (default: output/ and the task's name)")
    add_options_argument(parser, "override keys of the YAML")
    args = parser.parse_args(argv)
    task, start = TASKS[args.task], time.time()
    output = args.output or Path("output") / task.path.stem
    os.environ["HF_HUB_OFFLINE"] = "1"
    folder = (output / time.strftime("%Y%m%d_%H%M%S")).absolute()
    try:
        (search if args.search else compare)(task, folder, args.jobs, args.seed, args.options)
    except AuroraError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(f"interrupted; what is finished lies in {folder}")
    print(f"in all {timedelta(seconds=round(time.time() - start))}")


if __name__ == "__main__":
    main()
