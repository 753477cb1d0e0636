"""VQAv2's accuracy against the formula written out, and against LAVIS's own task."""

from __future__ import annotations

import json
from itertools import combinations
from pathlib import Path
from statistics import mean

import pytest
from lavis.common.registry import registry
from lavis.tasks.vqa import VQATask

from lavis_aurora.evaluation.answers import vqa_accuracy

# Ten answers of a question, its types, and what is answered.
QUESTIONS = [
    (["red"] * 8 + ["orange"] * 2, "color", "other", "red"),
    (["red"] * 8 + ["orange"] * 2, "color", "other", "orange"),
    (["blue"] * 5 + ["cyan"] * 3 + ["green"] * 2, "color", "other", "cyan"),
    (["2"] * 9 + ["3"], "count", "number", "two"),
    (["2"] * 9 + ["3"], "count", "number", "3"),
    (["yes"] * 10, "yes/no", "yes/no", "no"),
]


def formula(answers: list[str], answer: str) -> float:
    """Over every nine of the ten annotators: a third for each who gave the answer, one at most."""
    return mean(min(1.0, nine.count(answer) / 3) for nine in combinations(answers, 9))


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    """results, questions, annotations"""
    head = dict.fromkeys(("info", "task_type", "data_type", "data_subtype", "license"), "")
    asked = [{"question_id": i, "image_id": i, "question": "?"} for i in range(len(QUESTIONS))]
    truth = [
        {
            "question_id": i,
            "image_id": i,
            "question_type": kind,
            "answer_type": answer_type,
            "answers": [{"answer": answer, "answer_id": n} for n, answer in enumerate(answers)],
        }
        for i, (answers, kind, answer_type, _) in enumerate(QUESTIONS)
    ]
    given = [{"question_id": i, "answer": question[-1]} for i, question in enumerate(QUESTIONS)]
    paths = [tmp_path / f"{name}.json" for name in ("results", "questions", "annotations")]
    for path, content in zip(paths, (given, {**head, "questions": asked}, {"annotations": truth})):
        path.write_text(json.dumps(content))
    return paths


def test_accuracy_is_the_formula_by_type_and_kind(files: list[Path]) -> None:
    words = {"two": "2"}
    own = [formula(answers, words.get(given, given)) for answers, _, _, given in QUESTIONS]
    scores = vqa_accuracy(*files)
    assert scores["accuracy"] == pytest.approx(100 * mean(own), abs=0.01)
    for column, key in ((1, "question_types"), (2, "answer_types")):
        names = {question[column] for question in QUESTIONS}
        expected = {name: 100 * mean(a for a, q in zip(own, QUESTIONS) if q[column] == name) for name in names}
        assert scores[key] == pytest.approx(expected, abs=0.01)
    assert scores["question_types"]["color"] != scores["question_types"]["count"]


def test_accuracy_is_that_of_lavis_own_task(files: list[Path], tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setitem(registry.mapping["paths"], "output_dir", str(tmp_path))
    task = VQATask(num_beams=1, max_len=2, min_len=1, evaluate=True, num_ans_candidates=1)
    task.ques_files, task.anno_files = {"val": str(files[1])}, {"val": str(files[2])}
    theirs = task._report_metrics(str(files[0]), "val")
    ours = vqa_accuracy(*files)
    assert theirs == {"agg_metrics": ours["accuracy"], **ours["answer_types"]}
