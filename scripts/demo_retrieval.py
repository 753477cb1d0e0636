"""The demos of image-text and video-text retrieval."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

from demo_runs import Run
from demo_tasks import COLORS, COST_HEADS, LABELS, DemoTask, Row, cost, cost_label, gap_closed

TOP = (1, 5, 10)


class RetrievalDemo(DemoTask):
    """Recalls in both directions, after and before reranking.

    Attributes:
        kind: of what is retrieved, "image" or "video".
        sections: parts of the table, the first one drawn as bars: title by what its metrics' names add.
        lines: of these parts that are drawn as lines over the bars, name and style.
        no_gap: of these parts, those without the share that Aurora closes.
    """

    kind: ClassVar[str] = "image"
    sections: ClassVar[Mapping[str, str]] = {"": "reranked (ITM + ITC)", "_itc": "not reranked (ITC)"}
    lines: ClassVar[Mapping[str, tuple[str, str]]] = {"_itc": ("without reranking", ":")}
    no_gap: ClassVar[tuple[str, ...]] = ()

    @property
    def directions(self) -> tuple[str, str]:
        """Names of both in a result file."""
        return f"{self.kind}_to_text", f"text_to_{self.kind}"

    def figures(self, run: Run) -> Row:
        result = run.results("test_epoch_*.json")[-1]
        return {key: result[key] for key in ("metrics", f"{self.kind}s", "texts")}

    def validation(self, run: Run) -> float:
        return max(result["metrics"]["agg_metrics"] for result in run.results("val_epoch_*.json"))

    def _recalls(self, row: Row, suffix: str, top: tuple[int, ...] = TOP) -> list[float]:
        return [row["metrics"][f"{direction}{suffix}_r{k}"] for direction in self.directions for k in top]

    def table(self, rows: list[Row]) -> str:
        first = rows[0]
        lines = [
            f"test split of the shifted domain: {first[f'{self.kind}s']} {self.kind}s, {first['texts']} texts; "
            "R@K in percent"
        ]
        forth, back = (direction.replace("_", "-") for direction in self.directions)
        for suffix, title in self.sections.items():
            lines += ["", f"{title:<22}{forth:>22}{back:>24}"]
            heads = "".join(f"{f'R@{k}':>8}" for k in TOP)
            lines.append(f"{'':<20}{heads}{heads}{COST_HEADS}")
            for row in rows:
                recalls = "".join(f"{value:8.1f}" for value in self._recalls(row, suffix))
                lines.append(f"{LABELS[row['tuning']]:<20}{recalls}{cost(row)}")
            lines.append(f"{'chance':<20}" + "".join(f"{value:8.1f}" for value in self._recalls(first, "_chance")))
            if suffix in self.no_gap:
                continue
            for label, top in (("R@1", (1,)), ("R@1/5/10", TOP)):
                recalls = {row["tuning"]: self._recalls(row, suffix, top) for row in rows}
                closed = gap_closed({tuning: sum(values) / len(values) for tuning, values in recalls.items()})
                if closed is not None:
                    lines.append(f"Aurora closes {closed:.0f}% of the gap in mean {label} between frozen and full")
        return "\n".join(lines)

    def draw(self, rows: list[Row], path: Path) -> None:
        """Bars of R@1 both ways, reranked, with the trained parameters under each way of tuning."""
        import matplotlib.pyplot as plt

        figure, axes = plt.subplots(1, 2, figsize=(9, 4.3), sharey=True, layout="constrained")
        for axis, direction in zip(axes, self.directions):
            for i, row in enumerate(rows):
                value = row["metrics"][f"{direction}_r1"]
                others = {suffix: row["metrics"][f"{direction}{suffix}_r1"] for suffix in self.lines}
                axis.bar(i, value, color=COLORS[row["tuning"]], width=0.7)
                for suffix, other in others.items():
                    style = self.lines[suffix][1]
                    axis.plot([i - 0.35, i + 0.35], [other, other], color="black", linewidth=1.2, linestyle=style)
                axis.text(i, max(value, *others.values()) + 1, f"{value:.1f}", ha="center")
            for label, style in self.lines.values():
                axis.plot([], [], color="black", linewidth=1.2, linestyle=style, label=label)
            axis.set_xticks(range(len(rows)), [cost_label(row) for row in rows], fontsize=9)
            axis.set_title(direction.replace("_", "-"))
            axis.spines[["top", "right"]].set_visible(False)
        axes[0].set_ylabel("R@1, percent")
        # below: bars may be of any height
        figure.legend(*axes[0].get_legend_handles_labels(), frameon=False, loc="outside lower center", ncols=2)
        figure.suptitle("The tiny BLIP on the shifted domain: parameters trained, and R@1 after reranking")
        figure.savefig(path, dpi=140)


# Rates: of a few tried on the validation split; test was never looked at.
RETRIEVAL = RetrievalDemo(
    project="demo_ret.yaml",
    rates={"frozen": 1e-3, "heads": 1e-2, "aurora": 1e-2, "full": 1e-3},
    grid={"heads": (3e-3, 1e-2, 3e-2), "aurora": (3e-3, 1e-2, 3e-2), "full": (3e-4, 1e-3, 3e-3)},
    score="mean recall",
)
