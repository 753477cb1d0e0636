"""VQAv2's accuracy of files of answers: against the formula written out, and beside LAVIS's own task."""

from __future__ import annotations

import json
from itertools import combinations
from pathlib import Path
from statistics import mean

import pytest
from lavis.common.registry import registry
from lavis.tasks.vqa import VQATask

from lavis_aurora.common.errors import AuroraError
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


def write(folder: Path, questions: list[tuple[list[str], str, str, str]]) -> list[Path]:
    """Results, questions and annotations."""
    head = dict.fromkeys(("info", "task_type", "data_type", "data_subtype", "license"), "")
    asked = [{"question_id": i, "image_id": i, "question": "?"} for i in range(len(questions))]
    truth = [
        {
            "question_id": i,
            "image_id": i,
            "question_type": kind,
            "answer_type": answer_type,
            "answers": [{"answer": answer, "answer_id": n} for n, answer in enumerate(answers)],
        }
        for i, (answers, kind, answer_type, _) in enumerate(questions)
    ]
    # VQAv2's evaluator, and LAVIS's, read two keys of a result and ignore others.
    given = [{"question_id": i, "answer": one[-1], "confidence": 0.5} for i, one in enumerate(questions)]
    paths = [folder / f"{name}.json" for name in ("results", "questions", "annotations")]
    for path, content in zip(paths, (given, {**head, "questions": asked}, {"annotations": truth})):
        path.write_text(json.dumps(content))
    return paths


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    """results, questions, annotations"""
    return write(tmp_path, QUESTIONS)


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
    assert "unreachable" not in scores and "few_annotators" not in scores


def lavis_figure(files: list[Path], folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """Of LAVIS's own task."""
    monkeypatch.setitem(registry.mapping["paths"], "output_dir", str(folder))
    task = VQATask(num_beams=1, max_len=2, min_len=1, evaluate=True, num_ans_candidates=1)
    task.ques_files, task.anno_files = {"val": str(files[1])}, {"val": str(files[2])}
    return task._report_metrics(str(files[0]), "val")


def test_accuracy_is_that_of_lavis_own_task(files: list[Path], tmp_path: Path, monkeypatch) -> None:
    theirs = lavis_figure(files, tmp_path, monkeypatch)
    ours = vqa_accuracy(*files)
    assert theirs == {"agg_metrics": ours["accuracy"], **ours["answer_types"]}
    assert ours["lavis_accuracy"] == ours["official_accuracy"] == ours["accuracy"]


def test_words_that_lavis_processes_on_one_side_alone(tmp_path: Path, monkeypatch, capsys) -> None:
    given = [
        (["two"] * 10, "count", "number", "two"),
        (["the cat"] * 10, "what", "other", "the cat"),
        (["none"] * 10, "count", "number", "none"),
        (["the cat"] * 9 + ["dog"], "what", "other", "cat"),
    ]
    files = write(tmp_path, given)
    scores = vqa_accuracy(*files)
    assert capsys.readouterr().out == ""
    theirs = lavis_figure(files, tmp_path, monkeypatch)
    assert scores["accuracy"] == scores["official_accuracy"] == 100
    assert scores["lavis_accuracy"] == theirs["agg_metrics"] == 0


def test_generated_answers_are_compared_with_the_truth_as_decoded(tmp_path: Path) -> None:
    """The truth as the model would decode it; what VQAv2's evaluator makes of the file is told."""
    decoded = {"10:30": "10 : 30", "11": "11", "3.5": "3. 5", "4": "4"}
    given = [
        (["10:30"] * 10, "time", "other", "10 : 30"),
        (["10:30"] * 9 + ["11"], "time", "other", "10 : 30"),
        (["3.5"] * 9 + ["4"], "count", "number", "3. 5"),
        (["猫"] * 10, "what", "other", ""),
    ]
    files = write(tmp_path, given)
    scores = vqa_accuracy(*files, generated=lambda texts: {one: decoded[one] for one in texts if one in decoded})
    assert (scores["accuracy"], scores["official_accuracy"]) == (75, 0)
    assert scores["question_types"] == {"time": 100, "count": 100, "what": 0}
    assert scores["unreachable"] == (4, 1, 75, ["猫"])


def test_questions_that_the_list_cannot_answer(tmp_path: Path) -> None:
    given = [
        (["red"] * 10, "color", "other", "red"),
        (["two"] * 10, "count", "number", "2"),
        (["pink"] * 7 + ["red"] * 3, "color", "other", "red"),
    ]
    scores = vqa_accuracy(*write(tmp_path, given), answer_list=["red", "2"])
    assert scores["accuracy"] == pytest.approx(100 * (1 + 0.9) / 3, abs=0.01)
    assert scores["unreachable"] == (3, 1, pytest.approx(100 * (1 + 0.9) / 3), ["two"])


def test_questions_with_too_few_annotators(tmp_path: Path) -> None:
    given = [(["red"] * count, "color", "other", "red") for count in (10, 9, 2)]
    files = write(tmp_path, given)
    scores = vqa_accuracy(*files)
    assert scores["few_annotators"] == {"questions": 2, "question_id": 2, "annotators": 2}
    assert scores["accuracy"] == pytest.approx(100 * (1 + 1 + 1 / 3) / 3, abs=0.01)
    with pytest.raises(AuroraError, match="annotations.json: question 0 has no answers"):
        vqa_accuracy(*write(tmp_path, [([], "color", "other", "red")]))
