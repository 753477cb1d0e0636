"""The question answering task: whole runs in VQAv2's format, results for the official evaluators, bad input."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from distributed import run_programs
from lavis.tasks.vqa import VQATask
from omegaconf import OmegaConf
from runs import logged, only_run
from tiny_vqa import KINDS, vqa_project

from lavis_aurora import AuroraError
from lavis_aurora.common.answers import Unreachable
from lavis_aurora.models.blip_vqa_aurora import BlipVqaAurora
from lavis_aurora.project import load_config
from lavis_aurora.training.tasks.answers import VqaAuroraTask, report
from lavis_aurora_cli import evaluate, train

ROOT = Path(__file__).resolve().parents[2]
GENERATE = ["run.inference_method=generate", "run.num_beams=1", "run.max_len=4"]


def run(yaml: Path, *options: str, command=train) -> None:
    command(["--cfg-path", str(yaml), *(["--options", *options] if options else [])])


def accuracy_of(answers: list[dict], truth: list[dict]) -> float:
    """All ten true answers of a question are one string, so an answer is right or wrong."""
    right = {item["question_id"]: item["answers"][0]["answer"] for item in truth}
    return 100 * sum(right[entry["question_id"]] == entry["answer"] for entry in answers) / len(answers)


# Whole runs


@pytest.mark.parametrize(("string_ids", "options"), [(False, []), (True, GENERATE)], ids=["rank", "generate"])
def test_a_run_trains_scores_and_answers(tmp_path, capsys, string_ids, options):
    run(vqa_project(tmp_path, string_ids=string_ids), *options)
    folder, data = only_run(tmp_path), tmp_path / "data"
    results = {path.name for path in (folder / "result").iterdir()}
    assert results == {"val_epoch_0_vqa_result.json", "val_epoch_0_accuracy.json", "test_epoch_best_vqa_result.json"}
    ids = [entry["question_id"] for entry in json.loads((data / "test.json").read_text())]
    answers = json.loads((folder / "result" / "test_epoch_best_vqa_result.json").read_text())
    assert [entry["question_id"] for entry in answers] == ids
    assert all(set(entry) == {"question_id", "answer", "confidence"} for entry in answers)
    assert all(isinstance(entry["answer"], str) and 0 < entry["confidence"] <= 1 for entry in answers)
    validated = json.loads((folder / "result" / "val_epoch_0_vqa_result.json").read_text())
    [log] = logged(folder, "val_agg_metrics")
    truth = json.loads((data / "truth.json").read_text())["annotations"]
    assert log["val_agg_metrics"] == pytest.approx(accuracy_of(validated, truth), abs=0.01)
    assert {f"val_{kind}" for _, kind, _ in KINDS} <= log.keys() and log["val_questions"] == 6
    scores = json.loads((folder / "result" / "val_epoch_0_accuracy.json").read_text())
    assert scores["accuracy"] == log["val_agg_metrics"] and scores["questions"] == 6
    assert scores["question_types"].keys() == {kind for kind, _, _ in KINDS}
    [tested] = logged(folder, "final_test_questions")
    assert tested["final_test_agg_metrics"] is None
    out = capsys.readouterr().out
    assert "val: 6 questions, accuracy" in out and "test: 6 questions answered; their true answers are not" in out
    state = torch.load(folder / "checkpoint_best.pth", weights_only=True)["model"]
    assert state and all("mode_approx" in key or ".gate." in key for key in state)


@pytest.mark.slow
def test_training_on_one_question_type_learns_it(tmp_path):
    """The answer follows from the question alone: a decoder trained as a whole gets them all right."""
    run(
        vqa_project(tmp_path),
        "model.tuning=full",
        "run.max_epoch=14",
        "run.num_ans_candidates=8",
        "run.valid_splits=[]",
        "run.test_splits=[val]",
    )
    [log] = logged(only_run(tmp_path), "final_val_agg_metrics")
    assert log["final_val_agg_metrics"] == pytest.approx(100)
    assert log["final_val_yes/no"] == log["final_val_number"] == log["final_val_other"] == pytest.approx(100)


def test_evaluation_alone_and_from_a_checkpoint(tmp_path):
    yaml = vqa_project(tmp_path)
    run(yaml, "run.valid_splits=[]")
    first = only_run(tmp_path)
    answers = (first / "result" / "test_epoch_0_vqa_result.json").read_text()
    for name in ("train.json", "vg.json", "val.json"):
        (tmp_path / "data" / name).unlink()  # of splits that it does not need
    run(yaml, f"run.resume_ckpt_path={first / 'checkpoint_latest.pth'}", command=evaluate)
    [second] = [path for path in (tmp_path / "output").iterdir() if path != first]
    assert (second / "result" / "test_epoch_0_vqa_result.json").read_text() == answers


@pytest.mark.slow
def test_two_processes_train_and_answer_as_one(tmp_path, monkeypatch):
    """Seven questions, an uneven number: a repeated one is counted once."""
    logs = []
    for processes, batch in ((1, 4), (2, 2)):
        folder = tmp_path / str(processes)
        folder.mkdir()
        yaml = vqa_project(folder, count=7)
        monkeypatch.chdir(folder)
        argv = ["--cfg-path", str(yaml), "--options", f"run.batch_size_train={batch}"]
        run_programs(processes, train, argv) if processes > 1 else train(argv)
        output = only_run(folder)
        answers = json.loads((output / "result" / "test_epoch_best_vqa_result.json").read_text())
        assert len(answers) == len({entry["question_id"] for entry in answers}) == 7
        assert not list((output / "result").glob("*_rank*"))
        logs.append(logged(output, "train_loss") + logged(output, "val_agg_metrics"))
    for a, b in zip(*logs):
        assert a.keys() == b.keys()
        for key, value in a.items():
            assert b[key] == pytest.approx(value, abs=2e-3), key


# Results


def test_results_are_lavis_results_without_its_parts(tmp_path):
    (tmp_path / "ours").mkdir()
    (tmp_path / "theirs").mkdir()
    result = [{"question_id": i % 70, "answer": f"answer {i}"} for i in range(100)]
    paths = [
        cls.save_result(result, str(tmp_path / name), "x", remove_duplicate="question_id")
        for cls, name in ((VqaAuroraTask, "ours"), (VQATask, "theirs"))
    ]
    ours, theirs = (json.loads(Path(path).read_text()) for path in paths)
    assert ours == theirs and len(ours) == 70
    assert [path.name for path in (tmp_path / "ours").iterdir()] == ["x.json"]
    every = VqaAuroraTask.save_result(result, str(tmp_path / "ours"), "x")
    assert json.loads(Path(every).read_text()) == result


def test_100_000_answers_are_saved_in_seconds(tmp_path):
    """The test of VQAv2 asks 450,000: each must not be compared with all others."""
    result = [{"question_id": 10 * i, "answer": "yes"} for i in range(100_000)]
    start = time.process_time()
    path = VqaAuroraTask.save_result(result + result[:1], str(tmp_path), "x", remove_duplicate="question_id")
    assert time.process_time() - start < 4
    assert len(json.loads(Path(path).read_text())) == 100_000


def test_report_of_a_split():
    scores = {
        "accuracy": 61.5,
        "answer_types": {"yes/no": 80.0, "number": 43.0},
        "question_types": {"is there a": 80.0, "how many": 43.0},
    }
    first, second = report("val", 4, scores).splitlines()
    assert first == "val: 4 questions, accuracy 61.50 % (number 43.00, yes/no 80.00)"
    assert second == "val: by question type: how many 43.00, is there a 80.00"
    scores["question_types"] = {f"type {i}": 50.0 for i in range(65)}
    assert report("val", 4, scores) == first
    assert "not known here" in report("test", 4, None)


def test_report_says_what_has_to_be_known():
    scores = {
        "accuracy": 61.5,
        "official_accuracy": 60.25,
        "lavis_accuracy": 59.0,
        "answer_types": {"other": 61.5},
        "question_types": {f"type {i}": 50.0 for i in range(65)},
        "few_annotators": {"questions": 3, "question_id": "q-7", "annotators": 3},
        "unreachable": Unreachable(4, 1, 75.0, ["pink"]),
    }
    assert report("val", 4, scores).splitlines()[1:] == [
        "val: VQAv2's evaluator on the result file as it is gives 60.25 %, see docs/evaluation.md#questions",
        "val: LAVIS's evaluator gives 59.00 %, see docs/evaluation.md#questions",
        "val: fewer than 10 annotators answered 3 of 4 questions; question 'q-7' has 3, where no answer gets more "
        "than 67 %",
        "val: 1 of 4 questions (25.0 %) have no true answer that can be given: 'pink'; "
        "the accuracy is at most 75.00 %",
    ]
    scores["few_annotators"]["annotators"] = 9
    assert "question 'q-7' has 9\n" in report("val", 4, scores)
    same = {"official_accuracy": 61.5, "lavis_accuracy": 61.5, "unreachable": Unreachable(4, 0, 100.0, [])}
    del scores["few_annotators"]
    assert len(report("val", 4, {**scores, **same}).splitlines()) == 1


def test_a_run_says_what_the_list_cannot_answer(tmp_path, capsys):
    """One question of three kinds asks for 2; of its annotators one is left."""
    yaml = vqa_project(tmp_path)
    (tmp_path / "data" / "answers.json").write_text(json.dumps(["yes", "red", "two"]))
    truth = json.loads((tmp_path / "data" / "truth.json").read_text())
    truth["annotations"][0]["answers"] = truth["annotations"][0]["answers"][:1]
    (tmp_path / "data" / "truth.json").write_text(json.dumps(truth))
    run(yaml, "run.test_splits=[]")
    scores = json.loads((only_run(tmp_path) / "result" / "val_epoch_0_accuracy.json").read_text())
    bound = pytest.approx(100 * 3 / 6)
    assert scores["unreachable"] == {"questions": 6, "unreachable": 2, "upper_bound": bound, "examples": ["2"]}
    assert scores["few_annotators"] == {"questions": 1, "question_id": 4_000_000_000, "annotators": 1}
    [log] = logged(only_run(tmp_path), "val_agg_metrics")
    assert (log["val_unreachable"], log["val_upper_bound"]) == (2, bound)
    assert {"val_official_accuracy", "val_lavis_accuracy"} <= log.keys()
    out = capsys.readouterr().out
    assert "val: fewer than 10 annotators answered 1 of 6 questions; question 4000000000 has 1, where no" in out
    assert "val: 2 of 6 questions (33.3 %) have no true answer that can be given: '2'" in out


def test_models_that_give_no_confidence(tmp_path, monkeypatch):
    """LAVIS's give a list of answers."""
    monkeypatch.setattr(BlipVqaAurora, "predict_answers", lambda self, samples, **_: ["red"] * len(samples["image"]))
    run(vqa_project(tmp_path), "run.valid_splits=[]", command=evaluate)
    answers = json.loads((only_run(tmp_path) / "result" / "test_epoch_0_vqa_result.json").read_text())
    assert all(set(entry) == {"question_id", "answer"} for entry in answers)


# Bad input


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("run.valid_splits=[test]", "run.valid_splits needs true answers to select the best epoch by"),
        ("run.valid_splits=[train]", "holds questions to train on"),
        ("run.num_ans_candidates=0", "run.num_ans_candidates: 0"),
        ("run.num_beams=0", "run.num_beams: 0"),
        ("run.min_len=10", "run.max_len: 10 cannot be used; it must be 11 or more"),
        ("run.inference_method=rnk", "run.inference_method: unknown value 'rnk'; did you mean 'rank'"),
        ("run.prompt=short", "run.prompt: 'short' cannot be used; it must be empty, or hold a {}"),
        ("model.tuning=heads", "model.tuning: blip_vqa_aurora has no heads"),
        ("model.rank_chunk=0", "model.rank_chunk: 0"),
        ("model.context.form=mean", "model.context: unknown key"),
    ],
)
def test_settings_that_cannot_be_used(tmp_path, capsys, change, message):
    with pytest.raises(SystemExit):
        run(vqa_project(tmp_path), change)
    [line] = capsys.readouterr().err.splitlines()
    assert message in line and not list((tmp_path / "output").glob("*/*.pth"))


def test_rank_needs_a_list_of_answers(tmp_path):
    """Said before an epoch is spent, also for a dataset that has none."""
    cfg = load_config(str(vqa_project(tmp_path)))
    task = VqaAuroraTask.setup_task(cfg=cfg)
    with pytest.raises(AuroraError, match="X: run.inference_method rank needs a list of answers"):
        task._check_split("X", "test_splits", SimpleNamespace(answer_list=None, coco_fmt_anno_file=None))
    task.inference_method = "generate"
    task._check_split("X", "test_splits", SimpleNamespace(answer_list=None, coco_fmt_anno_file=None))


def test_answers_missing_in_training_files(tmp_path, capsys):
    yaml = vqa_project(tmp_path)
    path = tmp_path / "data" / "train.json"
    entries = json.loads(path.read_text())
    entries[2]["answer"] = []
    path.write_text(json.dumps(entries))
    with pytest.raises(SystemExit):
        run(yaml)
    assert f"the answer of entry 2 of {path} must be a list of strings" in capsys.readouterr().err


def test_project_has_the_papers_settings():
    cfg = load_config(str(ROOT / "projects/aurora/vqav2.yaml"))
    settings, model = cfg.run_cfg, cfg.model_cfg
    assert (model.arch, model.model_type, model.image_size, model.mode_approx.rank) == (
        "blip_vqa_aurora",
        "base",
        480,
        64,
    )
    assert list(cfg.datasets_cfg) == ["coco_vqa", "vg_vqa"]
    for dataset in cfg.datasets_cfg.values():
        assert {processor.image_size for processor in dataset.vis_processor.values()} == {480}
    assert (settings.batch_size_train, settings.max_epoch, settings.init_lr, settings.weight_decay) == (
        16,
        10,
        1e-4,
        0.05,
    )
    assert (settings.inference_method, settings.num_ans_candidates, settings.prompt) == ("rank", 128, "")
    assert settings.lr_sched == "linear_warmup_cosine_lr"
    own = OmegaConf.load(Path(sys.modules["lavis"].__file__).parent / "configs/models/blip_vqav2.yaml").model
    assert (own.pretrained, own.vit_drop_path_rate) == (model.pretrained, model.vit_drop_path_rate)
