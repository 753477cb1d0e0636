"""Tune the tiny BLIP on pictures unlike those it knows, in four ways, and compare them.

    bash scripts/demo.sh                    # the comparison: a table and a picture
    bash scripts/demo.sh --search           # learning rates compared on the validation split

Each run is `python train.py --cfg-path projects/aurora/demo_ret.yaml`, with model.tuning and run.init_lr set.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
CFG_PATH = ROOT / "projects" / "aurora" / "demo_ret.yaml"
# Of a few rates tried on the validation split; test was never looked at. --search compares those of GRID.
RATES = {"frozen": 1e-3, "heads": 1e-2, "aurora": 1e-2, "full": 1e-3}
GRID = {"heads": (3e-3, 1e-2, 3e-2), "aurora": (3e-3, 1e-2, 3e-2), "full": (3e-4, 1e-3, 3e-3)}
LABELS = {"frozen": "frozen backbone", "heads": "heads only", "aurora": "Aurora", "full": "full fine-tuning"}
DIRECTIONS = ("image_to_text", "text_to_image")
TOP = (1, 5, 10)


@dataclass
class Run:
    """One training run in a process of its own.

    Attributes:
        tuning: value of model.tuning.
        rate: value of run.init_lr.
        folder: everything that the run writes.
        seed: value of run.seed.
    """

    tuning: str
    rate: float
    folder: Path
    seed: int = 42
    process: subprocess.Popen | None = None
    started: float = 0.0
    seconds: float = 0.0

    @property
    def name(self) -> str:
        return f"{self.tuning}, rate {self.rate:g}" if self.tuning != "frozen" else self.tuning

    @property
    def log(self) -> Path:
        return self.folder / "log.txt"

    def start(self, options: Sequence[str]) -> None:
        """Start it, on one thread."""
        self.folder.mkdir(parents=True)
        script = "evaluate.py" if self.tuning == "frozen" else "train.py"
        command = [sys.executable, str(ROOT / script), "--cfg-path", str(CFG_PATH), "--options"]
        command += [f"model.tuning={self.tuning}", f"run.init_lr={self.rate}", f"run.seed={self.seed}"]
        command += [f"run.output_dir={self.folder}", *options]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        self.started = time.time()
        with self.log.open("w") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment, cwd=ROOT)

    def finished(self) -> bool:
        """Whether it is done; a failed run ends the demo with the end of its log."""
        if self.process.poll() is None:
            return False
        self.seconds = time.time() - self.started
        if self.process.returncode:
            sys.exit(f"demo: the run '{self.name}' failed; {self.log} ends with:\n{self.tail(15)}")
        return True

    def tail(self, lines: int) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])

    def progress(self) -> str:
        """Where it is, from its last progress line."""
        lines = [line for line in self.log.read_text(errors="replace").splitlines() if "  step " in line]
        return lines[-1].partition("[INFO] ")[2] if lines else "starting"

    def result(self, split: str) -> dict[str, Any]:
        """The last result file of a split."""
        files = sorted(self.folder.glob(f"*/result/{split}_epoch_*.json"), key=lambda path: path.stat().st_mtime)
        return json.loads(files[-1].read_text())

    def best_validation(self) -> float:
        """Mean recall of the best epoch on the validation split, percent."""
        files = self.folder.glob("*/result/val_epoch_*.json")
        return max(json.loads(path.read_text())["metrics"]["agg_metrics"] for path in files)

    def trained_parameters(self) -> tuple[int, int]:
        """(trained, all) parameters, as the run logged them."""
        [line] = [line for line in self.log.read_text().splitlines() if line.startswith("trainable params")]
        trained, total = (part.split(":")[1] for part in line.split("||")[:2])
        return int(trained.replace(",", "")), int(total.replace(",", ""))


def execute(runs: list[Run], jobs: int, options: Sequence[str]) -> None:
    """Run all, ``jobs`` at a time, saying where each one is."""
    waiting, active, last = list(runs), [], 0.0
    try:
        while waiting or active:
            while waiting and len(active) < jobs:
                active.append(waiting.pop(0))
                active[-1].start(options)
                print(f"started: {active[-1].name}", flush=True)
            time.sleep(0.5)
            for run in [run for run in active if run.finished()]:
                active.remove(run)
                print(f"done: {run.name}, {timedelta(seconds=round(run.seconds))}", flush=True)
            if time.time() - last > 20:
                last = time.time()
                for run in active:
                    print(f"  {run.name}: {run.progress()}", flush=True)
    finally:
        for run in active:
            run.process.kill()


def make_data(options: Sequence[str]) -> None:
    """Make the pictures before several runs ask for them at once."""
    from lavis_aurora.cli import load_config
    from lavis_aurora.data.annotations import build_checked

    cfg = load_config(str(CFG_PATH), list(options))
    for name, dataset in cfg.datasets_cfg.items():
        build_checked(name, dataset)


def rows_of(runs: list[Run]) -> list[dict[str, Any]]:
    """A row of figures for each run, measured on the test split."""
    backbone = max(run.trained_parameters()[0] for run in runs)
    rows = []
    for run in runs:
        trained, _ = run.trained_parameters()
        result = run.result("test")
        rows.append(
            {
                "tuning": run.tuning,
                "rate": run.rate,
                "seed": run.seed,
                "trained_parameters": trained,
                "percent_of_backbone": 100 * trained / backbone,
                "seconds": run.seconds,
                "metrics": result["metrics"],
                "images": result["images"],
                "texts": result["texts"],
            }
        )
    return rows


def mean_recall(metrics: dict[str, float], suffix: str = "", top: Sequence[int] = TOP) -> float:
    """Mean of R@K over both directions, percent."""
    values = [metrics[f"{direction}{suffix}_r{k}"] for direction in DIRECTIONS for k in top]
    return sum(values) / len(values)


def gap_closed(rows: list[dict[str, Any]], suffix: str = "", top: Sequence[int] = TOP) -> float | None:
    """Share of the way from frozen to full fine-tuning that Aurora goes, percent."""
    by_tuning = {row["tuning"]: mean_recall(row["metrics"], suffix, top) for row in rows}
    gap = by_tuning["full"] - by_tuning["frozen"]
    return 100 * (by_tuning["aurora"] - by_tuning["frozen"]) / gap if gap > 0 else None


def table(rows: list[dict[str, Any]]) -> str:
    """The comparison as text: recalls both ways, after and before reranking."""
    first = rows[0]
    lines = [f"test split of the shifted domain: {first['images']} images, {first['texts']} texts; R@K in percent"]
    for suffix, title in (("", "reranked (ITM + ITC)"), ("_itc", "not reranked (ITC)")):
        lines += ["", f"{title:<22}{'image-to-text':>22}{'text-to-image':>24}"]
        heads = f"{'R@1':>8}{'R@5':>8}{'R@10':>8}"
        lines.append(f"{'':<20}{heads}{heads}{'trained':>12}{'share':>8}{'seconds':>9}")
        for row in rows:
            recalls = "".join(f"{row['metrics'][f'{d}{suffix}_r{k}']:8.1f}" for d in DIRECTIONS for k in TOP)
            cost = f"{row['trained_parameters']:12,}{row['percent_of_backbone']:7.2f}%{row['seconds']:9.0f}"
            lines.append(f"{LABELS[row['tuning']]:<20}{recalls}{cost}")
        chance = "".join(f"{first['metrics'][f'{d}_chance_r{k}']:8.1f}" for d in DIRECTIONS for k in TOP)
        lines.append(f"{'chance':<20}{chance}")
        for label, top in (("R@1", (1,)), ("R@1/5/10", TOP)):
            closed = gap_closed(rows, suffix, top)
            if closed is not None:
                lines.append(f"Aurora closes {closed:.0f}% of the gap in mean {label} between frozen and full")
    return "\n".join(lines)


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Bars of R@1 both ways, reranked, with the trained parameters under each method."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    colors = {"frozen": "#9aa5b1", "heads": "#c9b458", "aurora": "#c2410c", "full": "#1d4e89"}
    figure, axes = plt.subplots(1, 2, figsize=(9, 4), sharey=True)
    for axis, direction in zip(axes, DIRECTIONS):
        for i, row in enumerate(rows):
            metrics = row["metrics"]
            value, plain = metrics[f"{direction}_r1"], metrics[f"{direction}_itc_r1"]
            axis.bar(i, value, color=colors[row["tuning"]], width=0.7)
            axis.plot([i - 0.35, i + 0.35], [plain, plain], color="black", linewidth=1.2, linestyle=":")
            axis.text(i, max(value, plain) + 1, f"{value:.1f}", ha="center")
        axis.plot([], [], color="black", linewidth=1.2, linestyle=":", label="without reranking")
        labels = [
            f"{LABELS[row['tuning']].replace(' ', chr(10))}\n{row['trained_parameters']:,}\n"
            f"({row['percent_of_backbone']:.1f}%)"
            for row in rows
        ]
        axis.set_xticks(range(len(rows)), labels, fontsize=9)
        axis.set_title(direction.replace("_", "-"))
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("R@1, percent")
    axes[0].legend(frameon=False, loc="upper left")
    figure.suptitle("The tiny BLIP on the shifted domain: parameters trained, and R@1 after reranking")
    figure.tight_layout()
    figure.savefig(path, dpi=140)


def compare(folder: Path, jobs: int, seed: int, options: Sequence[str]) -> None:
    """Run the four ways, print the table, draw the picture."""
    # The longest first: it decides when all are done.
    order = ("full", "aurora", "heads", "frozen")
    runs = {tuning: Run(tuning, RATES[tuning], folder / tuning, seed) for tuning in order}
    execute(list(runs.values()), jobs, options)
    rows = rows_of([runs[tuning] for tuning in LABELS])
    text = table(rows)
    (folder / "table.txt").write_text(text + "\n")
    (folder / "table.json").write_text(json.dumps(rows, indent=1))
    draw(rows, folder / "table.png")
    print(f"\n{text}\n\ntable: {folder / 'table.txt'} and .json\npicture: {folder / 'table.png'}")


def search(folder: Path, jobs: int, seed: int, options: Sequence[str]) -> None:
    """Mean recall on the validation split for each rate of the grid."""
    runs = [Run(t, rate, folder / f"{t}_{rate:g}", seed) for t, rates in GRID.items() for rate in rates]
    execute(runs, jobs, ["run.test_splits=[]", *options])
    lines = [f"{'tuning':<10}{'rate':>10}{'mean recall on val':>22}"]
    lines += [f"{run.tuning:<10}{run.rate:>10g}{run.best_validation():>22.1f}" for run in runs]
    (folder / "search.txt").write_text("\n".join(lines) + "\n")
    print("\n" + "\n".join(lines))


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--search", action="store_true", help="choose learning rates on the validation split")
    parser.add_argument("--jobs", type=int, default=min(2, os.cpu_count() or 1), help="runs at a time")
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--output", type=Path, default=Path("output") / "demo_ret", help="folder of the results")
    parser.add_argument("--options", nargs="+", default=[], metavar="KEY=VALUE", help="override keys of the YAML")
    args = parser.parse_args()
    start = time.time()
    folder = (args.output / time.strftime("%Y%m%d_%H%M%S")).absolute()
    make_data(args.options)
    (search if args.search else compare)(folder, args.jobs, args.seed, args.options)
    print(f"in all {timedelta(seconds=round(time.time() - start))}")


if __name__ == "__main__":
    main()
