"""Open-ended video question answering: exact match, overall and by question word."""

from __future__ import annotations

import logging
from collections import defaultdict
from typing import Any

from lavis.common.dist_utils import main_process
from lavis.common.registry import registry
from lavis.common.vqa_tools.vqa_eval import VQAEval
from torch.utils.data import Dataset

from lavis_aurora.errors import AuroraError
from lavis_aurora.files import read_json
from lavis_aurora.tasks_vqa import VqaAuroraTask

# Of MSRVTT-QA (Xu et al., ACM MM 2017), whose questions all begin with one of them.
QUESTION_WORDS = ("what", "who", "how", "when", "where")


def normalise(answer: str, evaluator: VQAEval) -> str:
    """An answer without case, punctuation and articles, and with digits for numbers, as VQAv2's evaluator has it.

    An answer of which nothing would be left is only put in lower case.
    """
    text = " ".join(answer.split())
    return evaluator.processDigitArticle(evaluator.processPunctuation(text)) or text.lower()


def exact_match(results: list[dict[str, Any]]) -> dict[str, float]:
    """Accuracy in percent of results with ``question``, ``answer`` and ``truth``: overall and by question word.

    Returns:
        ``agg_metrics`` (overall), a figure for each of :data:`QUESTION_WORDS` that occurs, ``other`` for questions
        that begin differently.
    """
    evaluator = VQAEval()
    right: dict[str, list[bool]] = defaultdict(list)
    for result in results:
        first = (result["question"].lower().split() or [""])[0]
        word = first if first in QUESTION_WORDS else "other"
        right[word].append(normalise(result["answer"], evaluator) == normalise(result["truth"], evaluator))
    words = [word for word in (*QUESTION_WORDS, "other") if word in right]
    metrics = {"agg_metrics": 100 * sum(sum(right[word]) for word in words) / len(results)}
    return {**metrics, **{word: 100 * sum(right[word]) / len(right[word]) for word in words}}


@registry.register_task("video_qa_aurora")
class VideoQaAuroraTask(VqaAuroraTask):
    """Answers to questions about videos, or pictures (own_vqa), generated (D.3) or ranked, and how many are right."""

    # LAVIS numbers the samples of a split; question_id need not differ.
    result_key = "instance_id"

    def _check_split(self, files: str, key: str, dataset: Dataset) -> None:
        if files.endswith(".train.storage"):
            raise AuroraError(f"run.{key}: {files} holds questions to train on; evaluate another split")
        self._check_answers(files, dataset)

    def valid_step(self, model, samples: dict) -> list[dict[str, Any]]:
        """``question_id``, ``answer``, ``instance_id``, ``question`` and the true answer, ``truth``."""
        rest = zip(samples["instance_id"], samples["text_input"], samples["answer"])
        return [
            {**result, "instance_id": instance, "question": question, "truth": truth}
            for result, (instance, question, truth) in zip(super().valid_step(model, samples), rest)
        ]

    @main_process
    def _report_metrics(self, result_file: str, split: str) -> dict[str, Any]:
        """Exact match in percent, and the number of questions."""
        results = read_json(result_file)
        metrics = exact_match(results)
        print(report(split, len(results), metrics), flush=True)
        logging.info("answers written to %s", result_file)
        return {**metrics, "questions": len(results)}


def report(split: str, count: int, metrics: dict[str, float]) -> str:
    """One line: number of questions, accuracy, and accuracy by question word."""
    shown = ", ".join(f"{word} {value:.2f}" for word, value in metrics.items() if word != "agg_metrics")
    return f"{split}: {count} questions, accuracy {metrics['agg_metrics']:.2f} % ({shown})"
