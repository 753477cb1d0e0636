"""Video question answering: exact match by question word, whole runs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from runs import logged, only_run
from tiny_video import QUESTIONS, video_overrides, write_video_questions

from lavis_aurora.evaluation.answers import exact_match
from lavis_aurora.models.blip_vqa_aurora import BlipVqaAurora
from lavis_aurora_cli import evaluate, train

ROOT = Path(__file__).resolve().parents[2]
COUNT = 7


@pytest.fixture
def options(tmp_path: Path) -> list[str]:
    """--options that make msrvtt_qa.yaml a run of seconds."""
    paths = write_video_questions(tmp_path / "data", COUNT)
    dataset = "datasets.msrvtt_qa_aurora.vis_processor"
    return [
        *video_overrides("msrvtt_qa_aurora", paths),
        f"{dataset}.train.n_frms=2",
        f"{dataset}.eval.n_frms=2",
        "model.model_type=tiny",
        "model.image_size=48",
        "model.pretrained=null",
        "run.batch_size_train=3",
        "run.batch_size_eval=4",
        "run.max_epoch=1",
        "run.num_workers=0",
        "run.device=cpu",
        f"run.output_dir={tmp_path / 'output'}",
    ]


def run(options: list[str], *more: str, command=train) -> None:
    command(["--cfg-path", str(ROOT / "projects/aurora/msrvtt_qa.yaml"), "--options", *options, *more])


# Exact match


def test_accuracy_by_question_word():
    asked = [
        ("what is this", "a", "a"),
        ("What is that", "b", "a"),
        ("what", "a", "a"),
        ("who sings", "man", "man"),
        ("how many", "two", "3"),
        ("is it", "yes", "yes"),
    ]
    results = [{"question": q, "answer": a, "truth": t} for q, a, t in asked]
    metrics = exact_match(results)
    assert metrics.pop("scores") == [100, 0, 100, 100, 0, 100]
    assert metrics == pytest.approx(
        {"agg_metrics": 100 * 4 / 6, "what": 200 / 3, "who": 100.0, "how": 0.0, "other": 100.0}
    )
    assert list(metrics) == ["agg_metrics", "what", "who", "how", "other"]
    ranked = exact_match(results, answer_list=["a", "3", "woman"])
    assert ranked["unreachable"] == (6, 2, pytest.approx(100 * 4 / 6), ["man", "yes"])


def test_generated_answers_are_compared_with_the_truth_as_decoded():
    asked = [("10 : 30", "10:30"), ("cafe", "café"), ("", "猫"), ("red", "blue")]
    results = [{"question": "what", "answer": answer, "truth": truth} for answer, truth in asked]
    assert exact_match(results)["agg_metrics"] == 25
    decoded = {"10:30": "10 : 30", "café": "cafe", "blue": "blue"}
    metrics = exact_match(results, generated=lambda texts: {one: decoded[one] for one in texts if one in decoded})
    assert metrics["scores"] == [100, 100, 0, 0] and metrics["agg_metrics"] == 50
    assert metrics["unreachable"] == (4, 1, 75, ["猫"])


# Runs


@pytest.mark.parametrize("method", ["generate", "rank"])
def test_what_the_model_answers_is_counted(tmp_path, options, capsys, monkeypatch, method):
    """A model that knows everything but who it is."""
    asked = []

    def answer(self, samples, **settings):
        asked.append(settings)
        right = dict(QUESTIONS)
        return ["nobody" if text.startswith("who") else f"The {right[text + '?']}." for text in samples["text_input"]]

    monkeypatch.setattr(BlipVqaAurora, "predict_answers", answer)
    # The question of a processor that leaves the mark out.
    path = tmp_path / "data" / "qa_test.json"
    entries = [{**entry, "question": entry["question"].rstrip("?")} for entry in json.loads(path.read_text())]
    path.write_text(json.dumps(entries))
    run(options, f"run.inference_method={method}", command=evaluate)
    assert len(asked) == 2 and all(settings["inference_method"] == method for settings in asked)
    assert asked[0]["num_beams"] == 1 and asked[0]["answer_list"] == ["red", "star", "two", "now", "left"]
    [log] = logged(only_run(tmp_path), "final_test_agg_metrics")
    figures = {key.removeprefix("final_test_"): log[key] for key in log if key != "final_test_epoch"}
    # Of seven questions the second and the last one ask who. All can be answered.
    assert (figures.pop("unreachable"), figures.pop("upper_bound")) == (0, 100)
    assert figures.pop("plain_accuracy") == 0  # "The red." is not "red"
    expected = {"what": 100, "who": 0, "how": 100, "when": 100, "where": 100, "questions": COUNT}
    assert figures == pytest.approx({"agg_metrics": 100 * 5 / 7, **expected})
    line = f"test: {COUNT} questions, accuracy 71.43 % (what 100.00, who 0.00, how 100.00, when 100.00, where 100.00)"
    assert line in capsys.readouterr().out


def test_equal_question_ids_count_as_questions_of_their_own(tmp_path, options):
    path = tmp_path / "data" / "qa_test.json"
    entries = [{**entry, "question_id": 7} for entry in json.loads(path.read_text())]
    path.write_text(json.dumps(entries))
    run(options, command=evaluate)
    results = json.loads((only_run(tmp_path) / "result" / "test_epoch_0_vqa_result.json").read_text())
    assert [(r["question"], r["truth"]) for r in results] == [QUESTIONS[i % len(QUESTIONS)] for i in range(COUNT)]
    assert {r["question_id"] for r in results} == {7}


@pytest.mark.parametrize("key", ["valid_splits", "test_splits"])
def test_the_train_split_is_not_evaluated(options, capsys, key):
    with pytest.raises(SystemExit):
        run(options, f"run.{key}=[train]")
    assert f"run.{key}: datasets.msrvtt_qa_aurora.build_info" in capsys.readouterr().err
