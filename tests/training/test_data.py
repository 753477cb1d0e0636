"""The report of the data in a run and in ``lavis-aurora check``: what is said, written and refused, and by whom."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from runs import only_run
from tiny import project_yaml
from tiny_vqa import vqa_project

from lavis_aurora_cli import main, train

COUNT = 4


@pytest.fixture
def project(tmp_path: Path) -> Path:
    return project_yaml(tmp_path, count=COUNT)


@pytest.fixture
def data(tmp_path: Path, project: Path) -> Path:
    return tmp_path / "data"


def _caption(path: Path, text: str) -> None:
    entries = json.loads(path.read_text())
    entries[0]["caption"] = [text]
    path.write_text(json.dumps(entries))


def test_check_prints_the_report_and_leaves_nothing(project: Path, data: Path, capsys: pytest.CaptureFixture) -> None:
    shutil.copy(data / "images/train/000.jpg", data / "images/test/001.jpg")
    main(["check", str(project), "--options", "run.valid_splits=[]", "model.pretrained=absent.pth"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == [f"coco_retrieval {split}: 4 images, 4 texts (1 of each)" for split in ("train", "test")]
    assert len(lines) == 3 and lines[2].startswith("warning: coco_retrieval test: 1 of 4 images are in coco_retr")
    assert not (data.parent / "output").exists()


@pytest.mark.parametrize("how", ["missing", "batch", "split", "entry"])
def test_check_fails_where_a_run_would(project: Path, data: Path, capsys: pytest.CaptureFixture, how: str) -> None:
    options = ["run.num_workers=0"]
    if how == "missing":
        (data / "images/train/002.jpg").unlink()
    elif how == "entry":
        _caption(data / "val.json", "\u200b")
    else:
        options += [{"batch": "run.batch_size_train=5", "split": "run.test_splits=[tset]"}[how]]
    said = {
        "missing": f"coco_retrieval train: cannot read 1 of 4 images, which 1 of 4 entries name: {data}",
        "batch": "run.batch_size_train: 5 on 1 processes",
        "split": "run.test_splits: no split 'tset'",
        "entry": f"the caption of entry 0 of {data / 'val.json'} must be a list of strings, each with words",
    }[how]
    errors = []
    for argv in (["check", str(project)], ["train", "--cfg-path", str(project)]):
        with pytest.raises(SystemExit) as caught:
            main([*argv, "--options", *options])
        assert caught.value.code == 1
        output = capsys.readouterr()
        errors.append(output.err.splitlines()[-1])
        assert ("refused: " in output.out) == (how == "missing" and argv[0] == "check")
    assert said in errors[1]
    # What check has printed already it does not print again.
    assert errors[0] == errors[1] or how == "missing" and errors[0].endswith("1 thing above would end the run")


def test_check_prints_each_refusal_once(project: Path, data: Path, capsys: pytest.CaptureFixture) -> None:
    for split in ("train", "test"):
        (data / f"images/{split}/002.jpg").unlink()
    with pytest.raises(SystemExit):
        main(["check", str(project), "--options", "run.num_workers=0"])
    output = capsys.readouterr()
    assert output.out.count("refused: coco_retrieval ") == output.out.count("cannot read 1 of 4 images") == 2
    assert "cannot read" not in output.err and output.err.endswith("2 things above would end the run\n")


def test_a_run_says_and_writes_it(
    project: Path, data: Path, capsys: pytest.CaptureFixture, caplog: pytest.LogCaptureFixture
) -> None:
    _caption(data / "test.json", "a star " * 20)
    shutil.copy(data / "images/train/000.jpg", data / "images/test/001.jpg")
    train(["--cfg-path", str(project)])
    found = json.loads((only_run(data.parent) / "data.json").read_text())
    assert [finding["level"] for finding in found["findings"]] == ["note", "warning"]
    warned = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert found["findings"][1]["text"] in warned
    # Below the figures of the test, not of the validation.
    table = capsys.readouterr().out
    for finding in found["findings"]:
        assert table.count(f"  {finding['text']}\n") == 1
        assert table.index(finding["text"]) > table.index("\ntest: ")
    assert "1 of 4 texts are cut at 35 tokens, e.g. 'a star a " in found["findings"][0]["text"]
    assert [one["examples"] for one in found["splits"] if one["split"] == "test"] == [{"cut_tokens": "a star " * 20}]


def test_questions_that_no_answer_is_right_for(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    def said(*options: str) -> str:
        main(["check", str(yaml), "--options", "run.num_workers=0", *options])
        return capsys.readouterr().out

    yaml = vqa_project(tmp_path)
    unreachable = "val: {} of 6 questions ({} %) have no true answer that can be given: "
    assert "true answer" not in said() + said("run.inference_method=generate")
    (tmp_path / "data" / "answers.json").write_text('["yes", "red"]')
    ranked = said()
    assert unreachable.format(2, 33.3) + "'2'; the accuracy is at most " in ranked
    assert "; add them to the list" in ranked
    assert "true answer" not in said("run.inference_method=generate"), "answers of the list do not matter"
    long = said("run.inference_method=generate", "run.min_len=3", "run.max_len=5")
    assert unreachable.format(6, "100.0") in long and "; raise run.max_len" in long


def test_questions_of_few_annotators_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    yaml = vqa_project(tmp_path)
    main(["check", str(yaml)])
    assert "annotators" not in capsys.readouterr().out
    path = tmp_path / "data" / "truth.json"
    found = json.loads(path.read_text())
    del found["annotations"][1]["answers"][3:]
    path.write_text(json.dumps(found))
    main(["check", str(yaml)])
    assert "coco_vqa val: fewer than 10 annotators answered 1 of 6 questions" in capsys.readouterr().out
