"""Forms of one part of the method compared, from a sweep: figures 4 and 6, and the sharing of factors."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from matplotlib.figure import Figure

from lavis_aurora.analysis.drawing import OWN, PALE, canvas, tidy
from lavis_aurora.analysis.table import read_table, series

RECALLS = ("image_to_text_r1", "text_to_image_r1", "video_to_text_r1", "text_to_video_r1", "agg_metrics")
SPAN = 6.0  # percent; what differs by less is hardly more than chance, and shall not look like more
TITLES = {
    "image_to_text": "image to text",
    "text_to_image": "text to image",
    "video_to_text": "video to text",
    "text_to_video": "text to video",
}


@dataclass
class Ablation:
    """A figure of the values of one key.

    Attributes:
        key: of the YAML.
        title: of the figure.
        labels: of its values, in the order in which they are drawn; others follow.
        paper: the value that is the method's own.
    """

    key: str
    title: str
    labels: Mapping[str, str]
    paper: str

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Arguments of the figure."""
        parser.add_argument("table", metavar="SWEEP.CSV", help=f"of scripts/sweep.py, over {self.key} and seeds")
        parser.add_argument("--metrics", nargs="+", help="columns; R@1 both ways and the mean recall by default")

    def numbers(self, args: argparse.Namespace) -> dict[str, Any]:
        """Mean, spread and cells by metric and value of the key."""
        metrics = args.metrics or default_metrics(args.table)
        found = series(args.table, self.key, metrics)
        order = [value for value in self.labels if value in found] + [v for v in found if v not in self.labels]
        return {
            "table": str(args.table),
            "key": self.key,
            "metrics": metrics,
            "labels": {value: self.labels.get(value, value) for value in order},
            "values": {value: found[value] for value in order},
        }

    def draw(self, numbers: dict[str, Any]) -> Figure:
        """A panel for each metric: mean and spread of each form, and every seed as a dot."""
        metrics, values = numbers["metrics"], numbers["values"]
        figure, axes = canvas(1, len(metrics), 3.9, 3.4)
        for axis, metric in zip(axes, metrics):
            for i, (value, found) in enumerate(values.items()):
                one = found.get(metric)
                if one is None:
                    continue
                color = OWN if value == self.paper else PALE
                axis.errorbar(
                    i, one["mean"], yerr=one["spread"] or 0, fmt="o", markersize=9, capsize=5, color=color, zorder=3
                )
                axis.plot([i + 0.16] * len(one["cells"]), one["cells"], ".", color="#374151", markersize=5, zorder=4)
                axis.annotate(f"{one['mean']:.1f}", (i, one["mean"]), (-11, 0), "data", "offset points", ha="right")
            axis.set_xticks(range(len(values)), [numbers["labels"][value] for value in values])
            axis.set_xlim(-0.7, len(values) - 0.5)
            axis.set_title(metric_title(metric, any(other.endswith("_r1") for other in metrics)))
            low, high = axis.get_ylim()
            missing = max(SPAN - (high - low), 0) / 2
            axis.set_ylim(low - missing, high + missing)
            tidy(axis)
        axes[0].set_ylabel("percent")
        seeds = sorted({len(found[metric]["cells"]) for found in values.values() for metric in found})
        count = str(seeds[0]) if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]}"
        spread = "mean, standard deviation and each of" if seeds[-1] > 1 else "of"
        figure.suptitle(f"{self.title}: {spread} {count} seed{'s' if seeds[-1] > 1 else ''}")
        return figure


def default_metrics(table: str) -> list[str]:
    """R@1 of each direction and the mean recall, or the accuracy, of the first tested split of a sweep's table."""
    columns = list(read_table(table)[0])
    split = next((column.split(".")[0] for column in columns if column.endswith(".agg_metrics")), "test")
    return [name for name in (f"{split}.{metric}" for metric in RECALLS) if name in columns] or [
        f"{split}.agg_metrics"
    ]


def metric_title(metric: str, retrieval: bool = False) -> str:
    """A column of a sweep's table, in words; whether it is of retrieval, ``agg_metrics`` does not say itself."""
    split, _, name = metric.partition(".")
    if name == "agg_metrics":
        return "mean of R@1, 5, 10" if retrieval else "accuracy, or mean of R@1, 5, 10"
    if name == "accuracy":
        return name
    for direction, words in TITLES.items():
        rest = name.removeprefix(f"{direction}_")
        if rest != name:
            plain = rest.removeprefix("itc_")
            return f"{'R@' + plain[1:] if plain[0] == 'r' else plain}, {words}{', ITC only' * (plain != rest)}"
    return metric


CONTEXT = Ablation(
    key="model.context.form",
    title="Context enhancement",
    labels={"none": "none", "random": "random", "mean": "mean", "attention": "attention\n(the paper)"},
    paper="attention",
)
GATE = Ablation(
    key="model.gate.form",
    title="Gated query transformation",
    labels={
        "none": "none",
        "convex": "convex\n(the paper)",
        "affine": "affine\n(its code)",
        "residual": "residual\n(ours)",
    },
    paper="residual",
)
GATE_INIT = Ablation(
    key="model.gate.init",
    title="Start of the gate's gamma and beta",
    labels={"ones": "ones", "zeros": "zeros\n(the paper)"},
    paper="zeros",
)
SHARING = Ablation(
    key="model.mode_approx.sharing",
    title="U and V of all towers, or of each",
    labels={"tower": "separate\nby tower", "global": "shared\n(the paper)"},
    paper="global",
)
