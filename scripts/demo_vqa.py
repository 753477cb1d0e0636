"""The demo of visual question answering."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

from demo_tasks import COLORS, COST_TITLES, LABELS, DemoTask, Row, Run, cost_columns, gap_closed

from lavis_aurora.analysis.results import result_file
from lavis_aurora.demo.questions import KINDS
from lavis_aurora.evaluation.answers import vqa_accuracy

# To compare with: for each question of the test split the answer most often given to it in training.
BASELINE = "most common answer"


class VqaDemo(DemoTask):
    """VQAv2's accuracy by answer type and by kind of question."""

    def metrics(self, run: Run) -> Row:
        """Number of questions, accuracy, and that by types, of which the summary has no section."""
        result = result_file(run.result_folder, "test_epoch_*_accuracy.json")
        return {key: result[key] for key in ("questions", "accuracy", "answer_types", "question_types")}

    def baselines(self, datasets: dict[str, Any], folder: Path) -> Row:
        """Accuracy of :data:`BASELINE`; to a question that training does not ask, the most common answer of all."""
        answers: dict[str, Counter[str]] = defaultdict(Counter)
        for entry in datasets["train"].annotation:
            answers[entry["question"]].update(entry["answer"])
        test = datasets["test"]
        unseen = sum(answers.values(), Counter())
        given = []
        for entry in test.annotation:
            [(answer, _)] = answers.get(entry["question"], unseen).most_common(1)
            given.append({"question_id": entry["question_id"], "answer": answer})
        path = folder / f"{BASELINE.replace(' ', '_')}.json"
        path.write_text(json.dumps(given), encoding="utf-8")
        return {BASELINE: vqa_accuracy(path, test.coco_fmt_qust_file, test.coco_fmt_anno_file)}

    def table(self, rows: list[Row]) -> str:
        first = rows[0]
        lines = [f"test split of the shifted domain: {first['questions']} questions; VQAv2's accuracy in percent"]
        # VQAv2's other types, number and yes/no, are the kinds count and yes/no.
        heads = "".join(f"{name:>10}" for name in ("all", "other", *KINDS))
        lines += ["", f"{'':<20}{heads}{COST_TITLES}"]
        lines += [f"{LABELS[row['tuning']]:<20}{_columns(row)}{cost_columns(row)}" for row in rows]
        lines.append(f"{BASELINE:<20}{_columns(first[BASELINE])}")
        closed = gap_closed({row["tuning"]: row["accuracy"] for row in rows})
        if closed is not None:
            lines.append(f"Aurora closes {closed:.0f}% of the gap between frozen and full")
        return "\n".join(lines)

    def draw(self, rows: list[Row], path: Path) -> None:
        """Bars of accuracy by kind of question, one color for each way of tuning."""
        import matplotlib.pyplot as plt

        figure, axis = plt.subplots(figsize=(10, 4), layout="constrained")
        width = 0.8 / len(rows)
        for i, row in enumerate(rows):
            name = LABELS[row["tuning"]]
            label = f"{name}: {row['trained_parameters']:,} trained ({row['percent_of_backbone']:.1f}%)"
            places = [x + (i - (len(rows) - 1) / 2) * width for x in range(1 + len(KINDS))]
            bars = axis.bar(places, _values(row), width, color=COLORS[row["tuning"]], label=label)
            axis.bar_label(bars, fmt="%.0f", fontsize=8)
        for x, value in enumerate(_values(rows[0][BASELINE])):
            label = None if x else BASELINE
            axis.plot([x - 0.42, x + 0.42], [value, value], color="black", linewidth=1.2, linestyle=":", label=label)
        axis.set_xticks(range(1 + len(KINDS)), ["all questions", *KINDS])
        axis.set_ylabel("accuracy, percent")
        axis.set_ylim(0, 105)
        axis.spines[["top", "right"]].set_visible(False)
        figure.legend(frameon=False, loc="outside lower center", ncols=2)
        axis.set_title("The tiny BLIP on the shifted domain: answers by kind of question")
        figure.savefig(path, dpi=140)


def _values(scores: dict[str, Any]) -> list[float]:
    """Accuracy of all questions and of each kind."""
    return [scores["accuracy"], *(scores["question_types"].get(kind, float("nan")) for kind in KINDS)]


def _columns(scores: dict[str, Any]) -> str:
    total, *kinds = _values(scores)
    return "".join(f"{value:10.1f}" for value in (total, scores["answer_types"].get("other", float("nan")), *kinds))


# Rates: Aurora's and LoRA's were chosen on the validation split among their grids below; of full fine-tuning 3e-4,
# 5e-4 and 1e-3 were tried by shorter runs.
VQA = VqaDemo(
    project="demo_vqa.yaml",
    learning_rates={"frozen": 1e-3, "lora": 1e-3, "aurora": 4e-3, "full": 5e-4},
    lr_grid={"lora": (5e-4, 1e-3, 3e-3), "aurora": (2e-3, 4e-3, 8e-3), "full": (3e-4, 5e-4, 1e-3)},
    score="accuracy",
)
