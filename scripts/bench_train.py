"""Time and memory of a training step, all ways of tuning side by side.

    python scripts/bench_train.py --tasks retrieval --batch 2 --out bench.json

Each measurement is a process of its own; the methods take turns, and the medians over all rounds are printed, also in
the form of the paper's table 5. Weights are random and data are made up: neither changes the cost.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import statistics
import time
import warnings
from collections import defaultdict
from datetime import timedelta
from pathlib import Path

from bench_step import METHODS, TASKS, measure
from measuring import measure_in_subprocess

from lavis_aurora.analysis.paper import UNITS, method_costs, method_name
from lavis_aurora.common.files import atomic_write

MB = 1e6
# The methods that figures.py frontier draws, and their unit.
FRONTIER = "frontier"


def measure_apart(args: argparse.Namespace, task: str, method: str) -> dict:
    """:func:`measure` in a new process."""
    arguments = ["--task", task, "--method", method, "--device", args.device]
    for key in ("batch", "steps", "warmup", "threads", "size", "checkpointed", "mini_batch", "clock"):
        arguments += [f"--{key.replace('_', '-')}", str(getattr(args, key))]
    arguments += [f"--{key}" for key in ("amp", "compile", "profile") if getattr(args, key)]
    *before, result = (
        measure_in_subprocess(__file__, arguments, args.threads, f"{task}, {method}").strip().splitlines()
    )
    if args.profile:
        print("\n".join(before))
    return json.loads(result)


def run_all(args: argparse.Namespace) -> dict:
    """Medians by task and method; the methods take turns. ``--out`` holds what has been measured at any time."""
    runs = [(task, method) for task in args.tasks for _ in range(args.rounds) for method in args.methods]
    results: dict = defaultdict(lambda: defaultdict(list))
    start = time.time()
    for i, (task, method) in enumerate(runs):
        results[task][method].append(result := measure_apart(args, task, method))
        left = (time.time() - start) / (i + 1) * (len(runs) - i - 1)
        seconds, memory = statistics.median(result["seconds"]), result["memory"] / MB
        print(
            f"[{i + 1}/{len(runs)}] {task:<10} {method_name(method):<32} {seconds:7.2f} s/step {memory:8.0f} MB  "
            f"left: about {timedelta(seconds=round(left))}",
            flush=True,
        )
        medians = {task: {m: summary(rounds) for m, rounds in methods.items()} for task, methods in results.items()}
        if args.out:
            with atomic_write(args.out) as file:
                file.write(json.dumps({"arguments": vars(args), "results": medians}, indent=1).encode())
    return medians


def expanded(methods: list[str]) -> list[str]:
    """Methods with those of the frontier in place of its name, in the order of METHODS."""
    costs = method_costs(Path(__file__).with_name("comparison")).values() if FRONTIER in methods else ()
    wanted = {*methods, *costs, *(UNITS[:1] if costs else ())}
    return [method for method in METHODS if method in wanted]


def summary(rounds: list[dict]) -> dict:
    """One method's rounds as medians."""
    seconds = [value for one in rounds for value in one["seconds"]]
    fixed = {key: rounds[0][key] for key in ("trained", "checkpoint", "backbone", "machine")}
    return {
        "seconds": statistics.median(seconds),
        "fastest": min(seconds),
        "slowest": max(seconds),
        "memory": statistics.median(one["memory"] for one in rounds),
        "steps": len(seconds),
        **fixed,
    }


def tables(results: dict) -> str:
    """What was measured, then each unit's ratios in the form of the paper's table 5; Markdown."""
    lines = []
    for task, methods in results.items():
        lines += [
            f"{task}, {TASKS[task][0]} px" + (f", {TASKS[task][1]} frames" if TASKS[task][1] else ""),
            "",
            "| tuning | trained, without heads | checkpoint, MB | s/step (fastest - slowest) | MB above the model |",
            "| --- | --- | --- | --- | --- |",
        ]
        for method, one in methods.items():
            spread = f"{one['seconds']:.3g} ({one['fastest']:.3g} - {one['slowest']:.3g})"
            lines.append(
                f"| {method_name(method)} | {one['trained']:,} | {one['checkpoint'] / MB:.2f} | {spread} | "
                f"{one['memory'] / MB:,.0f} |"
            )
        lines.append("")
    for unit in UNITS:
        measured = [task for task, methods in results.items() if unit in methods]
        if not measured:
            continue
        head = " | ".join(f"{task}: time | memory" for task in measured)
        lines += [
            f"Unit: {method_name(unit)}",
            "",
            f"| tuning | trained | {head} |",
            "| --- | --- |" + " --- |" * 2 * len(measured),
        ]
        for method in METHODS:
            rows = [results[task].get(method) for task in measured]
            if not all(rows):
                continue
            ratios = [
                f"{one[key] / results[task][unit][key]:.2f}"
                for one, task in zip(rows, measured)
                for key in ("seconds", "memory")
            ]
            lines.append(f"| {method_name(method)} | {rows[0]['trained'] / 1e6:.2f}M | {' | '.join(ratios)} |")
        lines.append("")
    return "\n".join(lines)


def make_parser() -> argparse.ArgumentParser:
    """Of the command line; check_gpu.py measures by it too."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument(
        "--methods",
        nargs="+",
        choices=[*METHODS, FRONTIER],
        metavar="METHOD",
        default=list(METHODS),
        help=f"{', '.join(METHODS)} (default: all); {FRONTIER}: the unit and the cost: of scripts/comparison/*.yaml",
    )
    parser.add_argument("--batch", type=int, default=2, help="pairs, questions or videos of a step")
    parser.add_argument("--steps", type=int, default=2, help="measured steps of a process")
    parser.add_argument("--warmup", type=int, default=1, help="steps before them")
    parser.add_argument("--rounds", type=int, default=3, help="processes of each method and task")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--amp", action="store_true", help="mixed precision")
    parser.add_argument("--compile", action="store_true", help="compile the layers, as run.compile")
    parser.add_argument("--checkpointed", type=int, default=0, help="layers of the ViT computed again backward")
    parser.add_argument("--mini-batch", type=int, default=0, help="as model.mini_batch_size, but for vqa")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of a process")
    parser.add_argument(
        "--clock",
        choices=("wall", "processor"),
        default="wall",
        help="processor: the time of all threads, which other programs on the machine disturb less",
    )
    parser.add_argument("--size", choices=("base", "tiny"), default="base", help="of the model")
    parser.add_argument("--profile", action="store_true", help="print each process's costliest operations")
    parser.add_argument("--out", help="write the results as json")
    parser.add_argument("--task", help=argparse.SUPPRESS)
    parser.add_argument("--method", help=argparse.SUPPRESS)
    return parser


def main() -> None:
    parser = make_parser()
    args = parser.parse_args()
    if args.method:
        # Its only line of output is the result.
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        print(json.dumps(measure(args)))
        return
    args.methods = expanded(args.methods)
    if args.out and not Path(args.out).absolute().parent.is_dir():
        parser.error(f"--out {args.out}: no such folder")
    results = run_all(args)
    print("\n" + tables(results))
    first = next(iter(next(iter(results.values())).values()))
    settings = {**first["machine"], "batch": args.batch, "clock": args.clock}
    print(", ".join(f"{key} {value}" for key, value in settings.items()))
    if args.out:
        print(f"written to {args.out}")


if __name__ == "__main__":
    main()
