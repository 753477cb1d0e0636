"""The demo's program: figures read from runs, tables and pictures of them, and errors."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import demo
import pytest
from demo_tasks import Run, execute, gap_closed, validation_score
from demo_vqa import BASELINE
from PIL import Image
from tiny_summary import counts, leave_summary

from lavis_aurora.demo.clips import generate_clips
from lavis_aurora.demo.question_files import generate_questions, split_files

PARAMETERS = {"frozen": 0, "heads": 50, "lora": 100, "aurora": 100, "full": 1000}


def _run(folder: Path, task: str, tuning: str, results: dict[str, dict]) -> Run:
    """A run that is over, and left these result files, or summaries by their folders."""
    run = Run(demo.TASKS[task].path, tuning, 1e-2, folder / tuning, seconds=12.0)
    for name, content in results.items():
        if name.endswith(".json"):
            path = run.folder / "job/result" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(content))
        else:
            leave_summary(run.folder / name, parameters=counts({"gate": PARAMETERS[tuning]}, 1000), **content)
    return run


def _validations(level: float) -> list[dict]:
    """Two epochs, the first better."""
    scores = [{"agg_metrics": level / 2}, {"agg_metrics": level / 4}]
    return [{"epoch": i, "split": "val", "metrics": metrics} for i, metrics in enumerate(scores)]


def _retrieval(level: float, kind: str = "image") -> dict[str, dict]:
    metrics = {"agg_metrics": level}
    for direction in (f"{kind}_to_text", f"text_to_{kind}"):
        for k in (1, 5, 10):
            metrics |= {f"{direction}_r{k}": level + k, f"{direction}_itc_r{k}": level, f"{direction}_chance_r{k}": k}
    sizes = {"samples": 5, f"{kind}s": 5, "texts": 6}
    return {"job": {"metrics": {"test": metrics}, "data": {"test": sizes}, "validation": _validations(level)}}


def _video(level: float) -> dict[str, dict]:
    one_frame = _retrieval(level / 2, "video")["job"]
    return {**_retrieval(level, "video"), "one_frame/job": one_frame}


def _vqa(level: float) -> dict[str, dict]:
    kinds = {"color": 1.0, "shape": 2.0, "count": 3.0, "position": 4.0, "yes/no": 5.0}
    scores = {
        "split": "test",
        "questions": 20,
        "accuracy": level,
        "answer_types": {"other": level + 6, "number": level + 3, "yes/no": level + 5},
        "question_types": {kind: level + more for kind, more in kinds.items()},
    }
    return {
        "job": {"metrics": {"test": {"agg_metrics": level}}, "validation": _validations(level)},
        "test_epoch_best_accuracy.json": scores,
        # Of other kinds: a pattern too wide would read these.
        "val_epoch_0_vqa_result.json": {"answer": "red"},
        "test_epoch_best_vqa_result.json": {"answer": "red"},
    }


RESULTS = {"retrieval": _retrieval, "vqa": _vqa, "video": _video}
LEVELS = {"frozen": 20.0, "heads": 30.0, "lora": 45.0, "aurora": 50.0, "full": 60.0}
BASELINES = {"retrieval": {}, "video": {}, "vqa": {BASELINE: _vqa(10.0)["test_epoch_best_accuracy.json"]}}


def _rows(tmp_path: Path, task: str) -> list[dict]:
    ways = demo.TASKS[task].learning_rates
    runs = [_run(tmp_path, task, tuning, RESULTS[task](LEVELS[tuning])) for tuning in ways]
    return demo.rows_of(demo.TASKS[task], runs, BASELINES[task])


@pytest.mark.parametrize("task", RESULTS)
def test_rows_have_what_the_runs_wrote(tmp_path: Path, task: str) -> None:
    rows = _rows(tmp_path, task)
    assert [row["tuning"] for row in rows] == [*demo.TASKS[task].learning_rates]
    for row in rows:
        assert row["trained_parameters"] == PARAMETERS[row["tuning"]]
        assert row["percent_of_backbone"] == PARAMETERS[row["tuning"]] / 10
        assert row["seconds"] == 12
    json.dumps(rows)


@pytest.mark.parametrize("task", RESULTS)
def test_the_best_epoch_counts_in_a_search(tmp_path: Path, task: str) -> None:
    assert validation_score(_run(tmp_path, task, "full", RESULTS[task](60.0))) == 30


def test_table_of_retrieval(tmp_path: Path) -> None:
    lines = demo.TASKS["retrieval"].table(_rows(tmp_path, "retrieval")).splitlines()
    assert "5 images, 6 texts" in lines[0]
    [aurora, plain] = [line.split() for line in lines if line.startswith("Aurora  ")]
    assert aurora[1:] == ["51.0", "55.0", "60.0"] * 2 + ["100", "10.00%", "12"]
    assert plain[1:7] == ["50.0"] * 6
    assert lines.count("Aurora closes 75% of the gap in mean R@1 between frozen and full") == 2


def test_table_of_vqa(tmp_path: Path) -> None:
    lines = demo.TASKS["vqa"].table(_rows(tmp_path, "vqa")).splitlines()
    assert "20 questions" in lines[0]
    assert lines[2].split() == ["all", "other", *_vqa(0)["test_epoch_best_accuracy.json"]["question_types"]] + [
        "trained",
        "share",
        "seconds",
    ]
    [aurora] = [line.split() for line in lines if line.startswith("Aurora  ")]
    assert aurora[1:] == ["50.0", "56.0", "51.0", "52.0", "53.0", "54.0", "55.0", "100", "10.00%", "12"]
    [baseline] = [line.split() for line in lines if line.startswith(BASELINE)]
    assert baseline[3:] == ["10.0", "16.0", "11.0", "12.0", "13.0", "14.0", "15.0"]
    assert lines[-1] == "Aurora closes 75% of the gap between frozen and full"


def test_table_of_videos(tmp_path: Path) -> None:
    lines = demo.TASKS["video"].table(_rows(tmp_path, "video")).splitlines()
    assert "5 videos, 6 texts" in lines[0]
    assert [line.split()[-2:] for line in lines if "video-to-text" in line] == 3 * [
        ["video-to-text", "text-to-video"]
    ]
    [aurora, plain, one] = [line.split()[1:7] for line in lines if line.startswith("Aurora  ")]
    assert (aurora, plain) == (["51.0", "55.0", "60.0"] * 2, ["50.0"] * 6)
    assert one == ["26.0", "30.0", "35.0"] * 2
    # of one frame, what Aurora closes says nothing
    assert sum("Aurora closes" in line for line in lines) == 4


def test_videos_are_evaluated_on_one_frame_too(tmp_path: Path, monkeypatch) -> None:
    commands = []
    monkeypatch.setattr("processes.subprocess.Popen", lambda command, **_: commands.append(command))
    task = demo.TASKS["video"]
    # Without validation, as of "full" here, no epoch is the best.
    files = {"frozen": "checkpoint_best.pth", "aurora": "checkpoint_best.pth", "full": "checkpoint_latest.pth"}
    for tuning, file in files.items():
        run = _run(tmp_path, "video", tuning, _video(20.0))
        (run.folder / "job" / "checkpoint_latest.pth").touch()
        (run.folder / "job" / file).touch()
        [further] = task.extra_evaluations(run)
        (further.folder).rename(tmp_path / f"{tuning}_old")
        further.start(["datasets.demo_video.vis_processor.eval.n_frms=8"])
    for command, tuning in zip(commands, files):
        assert command[1].endswith("evaluate.py") and f"model.tuning={tuning}" in command
        # behind the user's: the last one counts
        frames = [option for option in command if "n_frms" in option]
        assert frames[-1] == "datasets.demo_video.vis_processor.eval.n_frms=1"
        source = [] if tuning == "frozen" else [f"run.resume_ckpt_path={tmp_path / tuning / 'job' / files[tuning]}"]
        assert [option for option in command if "resume_ckpt_path" in option] == source


def test_clips_are_drawn(tmp_path: Path) -> None:
    [path] = generate_clips(tmp_path, "shifted", {"test": 2}).values()
    dataset = SimpleNamespace(annotation=json.loads(path.read_text()), vis_root=str(tmp_path / "videos"))
    assert demo.TASKS["video"].baselines({"test": dataset}, tmp_path) == {}
    with Image.open(tmp_path / "clips.png") as picture:
        assert picture.format == "PNG" and picture.width > picture.height


@pytest.mark.parametrize("task", RESULTS)
def test_picture(tmp_path: Path, task: str) -> None:
    path = tmp_path / "table.png"
    demo.TASKS[task].draw(_rows(tmp_path, task), path)
    with Image.open(path) as picture:
        assert picture.format == "PNG" and picture.width > 800


def test_the_baseline_of_vqa_is_the_most_common_answer_in_training(tmp_path: Path) -> None:
    """Ten of ten annotators say yes to one question in training; the other is not asked there."""
    generate_questions(tmp_path, "shifted", {"test": 2}, each=2)
    _, _, questions, annotations = split_files(tmp_path, "shifted", "test")
    asked = json.loads(questions.read_text())["questions"]
    truth = json.loads(annotations.read_text())
    for item, answer in zip(truth["annotations"], ("yes", "yes", "no", "no")):
        for given in item["answers"]:
            given["answer"] = answer
    annotations.write_text(json.dumps(truth))
    texts = [asked[0]["question"], asked[2]["question"]]
    train = [
        {"question": texts[0], "answer": ["yes"] * 10},
        {"question": texts[1], "answer": ["yes"] * 6 + ["no"] * 4},
    ]
    datasets = {
        "train": SimpleNamespace(annotation=train),
        "test": SimpleNamespace(
            annotation=asked, coco_fmt_qust_file=str(questions), coco_fmt_anno_file=str(annotations)
        ),
    }
    found = demo.TASKS["vqa"].baselines(datasets, tmp_path)[BASELINE]
    assert found["accuracy"] == 50
    assert {entry["answer"] for entry in json.loads((tmp_path / "most_common_answer.json").read_text())} == {"yes"}


def test_gap_closed() -> None:
    assert gap_closed({"frozen": 10, "aurora": 20, "full": 50}) == 25
    assert gap_closed({"frozen": 10, "aurora": 20, "full": 10}) is None


def test_a_failed_run_ends_the_demo_with_the_end_of_its_log(tmp_path: Path, monkeypatch) -> None:
    """The program in its place imports nothing of the package, which takes seconds."""
    (tmp_path / "train.py").write_text("import sys; sys.exit(f'error: {sys.argv[2]}: no such file')")
    monkeypatch.setattr("processes.ROOT", tmp_path)
    run = Run(tmp_path / "missing.yaml", "full", 1e-3, tmp_path / "run")
    with pytest.raises(SystemExit, match=r"the run 'full, rate 0.001' failed(.|\n)*missing.yaml: no such file"):
        execute([run], 1, [])


def test_a_run_left_early_is_stopped(tmp_path: Path, monkeypatch) -> None:
    run = Run(tmp_path / "x.yaml", "full", 1e-3, tmp_path / "run")
    monkeypatch.setattr(Run, "poll", lambda self: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        execute([run], 1, [])
    assert run.process.wait(30) != 0


@pytest.mark.parametrize("task", demo.TASKS)
def test_projects_of_the_demos_can_be_loaded_and_searched(task: str) -> None:
    from lavis_aurora.project import load_config

    own = demo.TASKS[task]
    cfg = load_config(str(own.path))
    assert cfg.run_cfg.init_lr == own.learning_rates["aurora"] and cfg.model_cfg.tuning == "aurora"
    assert {*own.lr_grid} == {*own.learning_rates} - {"frozen"}
    assert all(own.learning_rates[tuning] in rates for tuning, rates in own.lr_grid.items())


def test_command_line_chooses_the_task(monkeypatch, capsys) -> None:
    called = []
    monkeypatch.setattr(
        demo, "compare", lambda task, folder, *rest: called.append((task.project, folder.parent.name))
    )
    demo.main([])
    demo.main(["--task", "vqa"])
    demo.main(["--task", "video"])
    assert called == [(f"demo_{name}.yaml", f"demo_{name}") for name in ("ret", "vqa", "video")]
    with pytest.raises(SystemExit):
        demo.main(["--task", "vqaa"])
    assert "invalid choice: 'vqaa'" in capsys.readouterr().err


@pytest.mark.parametrize(("task", "own"), [("retrieval", ["run.max_epoch=3", "run.valid_splits=[]"]), ("vqa", [])])
def test_the_users_options_come_behind_the_demos_own(tmp_path: Path, monkeypatch, task: str, own: list[str]) -> None:
    given = []
    monkeypatch.setattr(demo, "make_data", lambda task, options, *_: given.append(options))
    monkeypatch.setattr(demo, "execute", lambda runs, jobs, options: given.append(options) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        demo.main(["--task", task, "--output", str(tmp_path), "--options", "run.valid_splits=[val]"])
    assert given == [[*own, "run.valid_splits=[val]"]] * 2


def test_a_search_validates_again_for_as_many_epochs(tmp_path: Path, monkeypatch) -> None:
    given = []
    monkeypatch.setattr(demo, "make_data", lambda *_: None)
    monkeypatch.setattr(demo, "execute", lambda runs, jobs, options: given.append(options) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        demo.main(["--search", "--output", str(tmp_path), "--options", "run.seed=2"])
    [options] = given
    assert options[0] == "run.max_epoch=3" and options[-1] == "run.seed=2"
    assert [option for option in options if "valid" in option][-1] == "run.valid_splits=[val]"


def test_options_that_cannot_be_used_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"^error: .*run.max_epochs: unknown key; did you mean 'max_epoch'"):
        demo.main(["--output", str(tmp_path / "out"), "--options", "run.max_epochs=1"])
    with pytest.raises(SystemExit, match=r"^error: --options run.test_splits: .*compared on test; leave it in"):
        demo.main(["--output", str(tmp_path / "out"), "--options", "run.test_splits=[val]"])
    with pytest.raises(SystemExit, match=r"^error: --options run.valid_splits: .*compared on val; leave it in"):
        demo.main(["--search", "--output", str(tmp_path / "out"), "--options", "run.valid_splits=[]"])
    assert not (tmp_path / "out").exists()
