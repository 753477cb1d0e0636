"""Plot of the attention's weights before and after tuning (figures 7, 10 and 11)."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from lavis_aurora.analysis.drawing import FULL, OTHER, OURS, PALE, Plot, despine, subplots
from lavis_aurora.analysis.results import load_trained, read_config, tuned_model, untrained_model
from lavis_aurora.common.errors import AuroraError

KINDS = ("query", "key", "value")
FUSED = "qkv"
TOWERS = {
    "vision": r"visual_encoder\.",
    "text": r"text_encoder\..*\.attention\.",
    "cross": r"text_encoder\..*\.cross",
}
COLORS = {"aurora": OURS, "full": FULL}
BINS = 160


class DistributionPlot(Plot):
    """Densities of W_q, W_k and W_v, stacked over towers and layers, and of their changes."""

    name = "distribution"
    about = "attention weights before and after tuning (figures 7, 10, 11)"

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        parser.add_argument(
            "runs", nargs="+", metavar="RUN", help="runs from one backbone: of aurora, of full, or both"
        )
        parser.add_argument("--towers", nargs="+", choices=TOWERS, default=list(TOWERS))
        parser.add_argument("--layers", nargs="+", type=int, help="of each tower; all by default")

    def numbers(self, args: argparse.Namespace) -> dict[str, Any]:
        """Histograms of W_q, W_k, W_v, stacked over towers and layers, and of their changes."""
        before: dict[str, np.ndarray] = {}
        after: dict[str, dict[str, np.ndarray]] = {}
        for run in args.runs:
            tuning = tuned_model(read_config(run)).tuning
            if tuning not in COLORS or tuning in after:
                raise AuroraError(f"{run}: model.tuning is {tuning}; name at most one run of aurora and one of full")
            model = untrained_model(run)
            start = stacked(model, args.towers, args.layers)
            if before and any(not np.array_equal(before[kind], start[kind]) for kind in KINDS):
                raise AuroraError(
                    f"{run}: its backbone is not that of {args.runs[0]}; compare runs from one backbone"
                )
            before = start
            load_trained(model, run)
            after[tuning] = stacked(model, args.towers, args.layers)
        result: dict[str, Any] = {
            "runs": [str(run) for run in args.runs],
            "towers": args.towers,
            "layers": args.layers,
        }
        result["kinds"] = {kind: _histograms(before[kind], {t: w[kind] for t, w in after.items()}) for kind in KINDS}
        return result

    def draw(self, numbers: dict[str, Any]) -> Figure:
        """Left the weights, right their changes; W_q, W_k, W_v from top to bottom."""
        names = {"pretrained": "pretrained", "aurora": "Aurora", "full": "full fine-tuning"}
        figure, axes = subplots(len(KINDS), 2, 4.8, 2.3)
        for i, kind in enumerate(KINDS):
            left, right = axes[2 * i : 2 * i + 2]
            found = numbers["kinds"][kind]
            for tuning, density in found["weights"].items():
                label = f"{names[tuning]}, s.d. {found['deviation'][tuning]:.4f}"
                if tuning == "pretrained":
                    left.stairs(density, found["edges"], fill=True, color=PALE, alpha=0.6, label=label)
                else:
                    left.stairs(density, found["edges"], color=COLORS.get(tuning, OTHER), linewidth=1.4, label=label)
            for tuning, density in found["changes"].items():
                label = f"{names[tuning]}, s.d. {found['change_deviation'][tuning]:.4f}"
                right.stairs(
                    density, found["change_edges"], color=COLORS.get(tuning, OTHER), linewidth=1.4, label=label
                )
            left.set_ylabel(f"$W_{kind[0]}$: density")
            right.set_yscale("log")
            for axis in (left, right):
                axis.legend(frameon=False, fontsize=7, loc="upper right")
                despine(axis)
        axes[0].set_title("weights")
        axes[1].set_title("change by tuning (density, logarithmic)")
        layers = "all layers" if numbers["layers"] is None else f"layers {', '.join(map(str, numbers['layers']))}"
        figure.suptitle(f"Attention projections of {', '.join(numbers['towers'])}; {layers}")
        return figure


def stacked(model: nn.Module, towers: Sequence[str], layers: Sequence[int] | None) -> dict[str, np.ndarray]:
    """All weights of a kind as one vector, with the update that is active.

    Raises:
        AuroraError: nothing is selected.
    """
    found: dict[str, list[Tensor]] = {kind: [] for kind in KINDS}
    for name, weight in projections(model):
        tower = any(re.match(TOWERS[one], name) for one in towers)
        number = int(re.search(r"\.(\d+)\.", name)[1])
        if tower and (layers is None or number in layers):
            found[name.rpartition(".")[2]].append(weight.flatten())
    if not all(found.values()):
        raise AuroraError(f"--layers {layers}: the towers {', '.join(towers)} have no such layer")
    return {kind: torch.cat(weights).numpy() for kind, weights in found.items()}


@torch.no_grad()
def projections(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """(slot, weight) of the attention projections, W0 + dW, each in nn.Linear's layout (d_out, d_in)."""
    factors = getattr(model, "mode_approx", None)
    with nullcontext() if factors is None else factors.disabled():
        for name, module in model.named_modules():
            last = name.rpartition(".")[2]
            if not isinstance(module, nn.Linear) or last not in (*KINDS, FUSED):
                continue
            parts = module.weight.detach().chunk(3) if last == FUSED else [module.weight.detach()]
            slots = [f"{name}.{kind}" for kind in KINDS] if last == FUSED else [name]
            for slot, weight in zip(slots, parts):
                adapted = factors is not None and slot in factors.slots
                yield slot, weight + factors.delta_weight(slot) if adapted else weight


def _histograms(before: np.ndarray, after: dict[str, np.ndarray]) -> dict[str, Any]:
    """Densities of weights and of changes, with the deviations that say them in a number."""
    limit = float(np.quantile(np.abs(before), 0.999))
    edges = np.linspace(-limit, limit, BINS + 1)
    changes = {tuning: weights - before for tuning, weights in after.items()}
    wide = max([float(np.quantile(np.abs(change), 0.999)) for change in changes.values()] + [1e-12])
    wide_edges = np.linspace(-wide, wide, BINS + 1)

    def density(values: np.ndarray, bins: np.ndarray) -> list[float]:
        return (np.histogram(values, bins)[0] / (len(values) * (bins[1] - bins[0]))).tolist()

    return {
        "edges": edges.tolist(),
        "weights": {"pretrained": density(before, edges)} | {t: density(w, edges) for t, w in after.items()},
        "change_edges": wide_edges.tolist(),
        "changes": {tuning: density(change, wide_edges) for tuning, change in changes.items()},
        "deviation": {"pretrained": float(before.std())} | {t: float(w.std()) for t, w in after.items()},
        "change_deviation": {tuning: float(change.std()) for tuning, change in changes.items()},
    }


DISTRIBUTION = DistributionPlot()
