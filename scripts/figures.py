"""Draw a figure of the paper from runs, sweeps or benchmarks of this package.

    python scripts/figures.py rank output/sweep_rank/sweep.csv --out docs/rank.png
    python scripts/figures.py NAME --help        # what each figure reads

The numbers behind a picture are written beside it, as json.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Optional

from lavis_aurora.analysis.drawing import FigureModule, save
from lavis_aurora.common.errors import AuroraError

# Figure: (module and, if it holds several, the object in it; what it shows).
FIGURES = {
    "rank": ("rank", "recall and parameters against the rank (figure 3)"),
    "context": ("ablation:CONTEXT", "forms of the context enhancement (figure 4)"),
    "gate": ("ablation:GATE", "forms of the gate (figure 6)"),
    "gate-init": ("ablation:GATE_INIT", "starting values of the gate (figure 6)"),
    "sharing": ("ablation:SHARING", "U and V of all towers, or of each"),
    "attention": ("attention", "where each word of a text looks in a picture (figure 5)"),
    "distribution": ("distribution", "attention weights before and after tuning (figures 7, 10, 11)"),
    "bubbles": ("bubbles", "all methods by two metrics and their size (figure 8)"),
    "cases": ("cases", "single texts with ranked pictures, or questions with answers (figures 12, 13)"),
    "cost": ("cost", "time and memory of training (table 5)"),
}

SUFFIXES = (".png", ".pdf", ".svg")


def load(name: str) -> FigureModule:
    """The module or object that draws a figure; only its own imports are paid for."""
    module, _, member = FIGURES[name][0].partition(":")
    found = import_module(f"lavis_aurora.analysis.{module}")
    return getattr(found, member) if member else found


def main(argv: Optional[Sequence[str]] = None) -> None:
    """Command line."""
    argv = list(sys.argv[1:] if argv is None else argv)
    listed = "\n".join(f"  {name:<14}{text}" for name, (_, text) in FIGURES.items())
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=f"figures:\n{listed}", formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", choices=FIGURES, metavar="NAME")
    name = parser.parse_args(argv[:1]).name
    figure = load(name)
    own = argparse.ArgumentParser(prog=f"figures.py {name}", description=FIGURES[name][1])
    figure.add_arguments(own)
    own.add_argument("--out", type=Path, default=Path(f"{name}.png"), help="the picture; .json goes beside it")
    args = own.parse_args(argv[1:])
    if args.out.suffix not in SUFFIXES:
        own.error(f"--out {args.out}: the name of a picture ends in {' or '.join(SUFFIXES)}")
    try:
        numbers = figure.numbers(args)
        picture, beside = save(figure.draw(numbers), numbers, args.out)
    except AuroraError as error:
        sys.exit(f"error: {error}")
    print(f"picture: {picture}\nnumbers: {beside}")


if __name__ == "__main__":
    main()
