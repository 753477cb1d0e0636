"""VQAv2's accuracy, by LAVIS's copy of the official evaluator."""

from __future__ import annotations

from pathlib import Path

from lavis.common.vqa_tools.vqa import VQA
from lavis.common.vqa_tools.vqa_eval import VQAEval


def vqa_accuracy(results: str | Path, questions: str | Path, annotations: str | Path) -> dict:
    """Accuracy of answers, percent: min(1, matches / 3) over nine of ten annotators, averaged over the ten choices.

    Args:
        results: json list of ``question_id`` and ``answer``, one for each question.
        questions: VQAv2's questions file.
        annotations: VQAv2's annotations file.

    Returns:
        ``accuracy``, and by name ``answer_types`` and ``question_types``, as the annotations name them.
    """
    truth = VQA(str(annotations), str(questions))
    scorer = VQAEval(truth, truth.loadRes(str(results), str(questions)), n=2)
    scorer.evaluate()
    print()  # after the evaluator's progress bar
    return {
        "accuracy": scorer.accuracy["overall"],
        "answer_types": scorer.accuracy["perAnswerType"],
        "question_types": scorer.accuracy["perQuestionType"],
    }
