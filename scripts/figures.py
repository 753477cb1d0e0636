"""Draw a figure of the paper from runs, sweeps or benchmarks of this package.

    python scripts/figures.py rank output/sweep_rank/sweep.csv --out docs/rank.png
    python scripts/figures.py NAME --help        # what each figure reads

The numbers behind a picture are written beside it, as json.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Optional

from lavis_aurora.analysis.drawing import Plot, save
from lavis_aurora.analysis.examples import ATTENTION, CASES
from lavis_aurora.analysis.paper_figures import BUBBLES, COST
from lavis_aurora.analysis.ranks import NESTED, RANK, RANK_PLOT
from lavis_aurora.analysis.sweep_figures import COMPARISON, CONTEXT, FRONTIER, GATE, GATE_INIT, SHARING
from lavis_aurora.analysis.weights import DISTRIBUTION
from lavis_aurora.common.errors import AuroraError

SWEEPS = (COMPARISON, FRONTIER, RANK, RANK_PLOT, NESTED, CONTEXT, GATE, GATE_INIT, SHARING)
LISTED = (*SWEEPS, ATTENTION, DISTRIBUTION, BUBBLES, CASES, COST)
PLOTS: dict[str, Plot] = {plot.name: plot for plot in LISTED}
SUFFIXES = (".png", ".pdf", ".svg")


def main(argv: Optional[Sequence[str]] = None) -> None:
    """Draw the figure that ``argv`` names and write it, and its numbers."""
    argv = list(sys.argv[1:] if argv is None else argv)
    listed = "\n".join(f"  {name:<14}{plot.about}" for name, plot in PLOTS.items())
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=f"figures:\n{listed}", formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", choices=PLOTS, metavar="NAME")
    plot = PLOTS[parser.parse_args(argv[:1]).name]
    own = argparse.ArgumentParser(prog=f"figures.py {plot.name}", description=plot.about)
    plot.add_arguments(own)
    own.add_argument("--out", type=Path, default=Path(f"{plot.name}.png"), help="the picture; .json goes beside it")
    args = own.parse_args(argv[1:])
    if args.out.suffix not in SUFFIXES:
        own.error(f"--out {args.out}: the name of a picture ends in {' or '.join(SUFFIXES)}")
    try:
        numbers = plot.numbers(args)
        picture, beside = save(plot.draw(numbers), numbers, args.out)
    except AuroraError as error:
        sys.exit(f"error: {error}")
    print(f"picture: {picture}\nnumbers: {beside}")
    if numbers.get("left_out"):
        print(f"left out: {numbers['left_out']}")


if __name__ == "__main__":
    main()
