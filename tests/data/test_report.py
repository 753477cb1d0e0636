"""The report of the data: what it counts, what it warns of and what it refuses, on small sets spoiled on purpose."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf
from tiny import project_yaml, tiny_config
from tiny_video import video_project, write_videos
from tiny_vqa import vqa_project

from lavis_aurora.common.errors import AuroraError, shown
from lavis_aurora.data import report as module
from lavis_aurora.data.annotations import build_checked
from lavis_aurora.data.media import MediaFiles
from lavis_aurora.data.report import LOOK_SECONDS, DataReport, report_data
from lavis_aurora.data.texts import TokenLimit
from lavis_aurora.encoders.towers import build_tokenizer
from lavis_aurora.project import load_config

COUNT = 4


@pytest.fixture
def project(tmp_path: Path) -> Path:
    return project_yaml(tmp_path, count=COUNT, captions_each=2)


@pytest.fixture
def data(tmp_path: Path, project: Path) -> Path:
    return tmp_path / "data"


def _report(project: Path, *options: str, seconds: float | None = None, decode: bool = False) -> DataReport:
    cfg = load_config(str(project), list(options))
    datasets = {name: build_checked(name, cfg.datasets_cfg[name]) for name in cfg.datasets_cfg}
    tokens = TokenLimit(build_tokenizer(tiny_config().tokenizer), 33, "model.max_txt_len")
    return report_data(datasets, cfg, tokens, seconds, decode)


def _counts(report: DataReport, split: str) -> dict[str, Any]:
    [found] = [one for one in report.splits if one.split == split]
    return found.counts


def _found(report: DataReport, *parts: str, level: str = "warning") -> None:
    """One finding of this level, and no other, names all parts."""
    [line] = [finding.text for finding in report.findings if finding.level == level]
    for part in parts:
        assert part in line


def _edit(path: Path, *changes: dict[str, Any]) -> None:
    """Change keys of the first entries."""
    entries = json.loads(path.read_text())
    for entry, change in zip(entries, changes):
        entry.update(change)
    path.write_text(json.dumps(entries))


def test_clean_data_are_counted_and_nothing_is_said(project: Path) -> None:
    report = _report(project)
    assert report.findings == [] and report.overlaps == []
    assert report.lines()[0] == ("note", "coco_retrieval train: 4 images, 8 texts (2 of each)")
    assert _counts(report, "train") == {
        **{"samples": 8, "images": 4, "texts": 8, "texts_each": (2, 2.0, 2), "ids": 4, "several_ids": 0},
        **{"shared_ids": 0, "repeated_texts": 0, "shared_texts": 0, "cut_words": 0, "cut_tokens": 0},
        **{"unknown_texts": 0, "entities": 0, "line_breaks": 0, "examples": {}, "missing": 0},
    }
    assert report.files["all"] == report.files["looked"] == 3 * COUNT


def test_only_the_splits_of_the_run_are_read(project: Path) -> None:
    assert [split.split for split in _report(project, "run.evaluate=true").splits] == ["test"]
    assert [split.split for split in _report(project, "run.valid_splits=[]").splits] == ["train", "test"]


def test_the_check_of_an_evaluation_says_that_it_does_not_look_at_the_training_data(
    project: Path, data: Path
) -> None:
    shutil.copy(data / "images/train/000.jpg", data / "images/test/000.jpg")
    report = _report(project, "run.evaluate=true")
    _found(report, "not compared with the training data", "run.evaluate=false", level="note")
    assert not report.overlaps and report.beside("test") == []
    for other in (_report(project), _report(project, "run.evaluate=true", seconds=LOOK_SECONDS)):
        assert not [one for one in other.findings if one.level == "note"]


@pytest.mark.parametrize("split", ["train", "val"])
def test_shared_and_repeated_captions(project: Path, data: Path, split: str) -> None:
    same = ["A star.", "a star"]
    texts = [same, ["a star", "a ring"]] if split == "val" else ["A star.", "a star", "a star!"]
    _edit(data / f"{split}.json", *({"caption": text} for text in texts))
    report = _report(project)
    assert _counts(report, split)["shared_texts"] == 3 and _counts(report, split)["repeated_texts"] == 1
    said = " ".join(finding.text for finding in report.findings)
    assert "3 of 8 texts are those of several images, e.g. 'a star'; " in said
    assert "1 of 8 texts repeat another of the same image, e.g. 'a star'" in said
    assert {finding.level for finding in report.findings} == {"note"}
    assert len(report.beside(split)) == 2 and not report.beside("test")


def test_cut_texts_come_with_the_key_to_raise(project: Path, data: Path) -> None:
    _edit(data / "test.json", {"caption": ["a red circle " * 20, "a star " * 17, "a " * 33]})
    options = "datasets.coco_retrieval.text_processor.eval.max_words=40"
    report = _report(project, options)
    assert _counts(report, "test")["cut_words"] == 1 and _counts(report, "test")["cut_tokens"] == 2
    words, tokens = report.beside("test")
    assert "1 of 9 texts are cut at 40 words, e.g. 'a red circle a " in words and options.split("=")[0] in words
    assert "2 of 9 texts are cut at 35 tokens, e.g. 'a red circle a " in tokens
    assert "; raise model.max_txt_len" in tokens


def test_texts_of_unknown_words_alone(project: Path, data: Path) -> None:
    _edit(data / "val.json", {"caption": ["猫が", "a star"]}, {"caption": ["犬 Ω"]})
    _found(_report(project), "coco_retrieval val: 2 of 7 texts have no word that the vocabulary knows, e.g. '猫が'; ")


def test_html_entities_and_line_breaks_are_counted(project: Path, data: Path) -> None:
    texts = ["Tom &amp; Jerry", "it&#39;s\nred\n", "a & b; c\n"]
    _edit(data / "train.json", *({"caption": text} for text in texts))
    report = _report(project)
    _found(report, "coco_retrieval train: 2 of 8 texts hold HTML entities, e.g. 'Tom &amp; Jerry'; ", "html.unescape")
    _found(report, "train: 1 of 8 texts hold line breaks, e.g. 'it&#39;s\\nred\\n'; ", level="note")
    examples = _counts(report, "train")["examples"]
    assert examples == {"entities": "Tom &amp; Jerry", "line_breaks": "it&#39;s\nred\n"}


def test_html_entities_in_answers_are_counted(tmp_path: Path) -> None:
    yaml = vqa_project(tmp_path)
    _edit(tmp_path / "data/train.json", {"answer": ["yes", "b&amp;b"]})
    [said] = [finding.text for finding in _report(yaml).findings if "HTML" in finding.text]
    assert said.startswith("coco_vqa train: 1 of ") and " answers hold HTML entities, e.g. 'b&amp;b'; " in said


def test_a_text_of_which_a_processor_leaves_nothing_is_refused(project: Path) -> None:
    report = _report(project, "datasets.coco_retrieval.text_processor.eval.max_words=0", "run.valid_splits=[]")
    _found(report, "coco_retrieval test: nothing is left of 'a ", "a text of entry 0", level="refused")
    with pytest.raises(AuroraError, match="nothing is left"):
        report.check()


@pytest.mark.parametrize("ids", [("1", 1), (1, 2)])
def test_a_picture_of_several_ids(project: Path, data: Path, ids: tuple[Any, Any]) -> None:
    _edit(data / "train.json", {"image_id": ids[0]}, {"image_id": ids[1], "image": "./train//000.jpg"})
    report = _report(project)
    assert _counts(report, "train")["images"] == COUNT and _counts(report, "train")["several_ids"] == 1
    _found(report, f"1 images have several ids, e.g. {data / 'images/train/000.jpg'}: ", "; give each image one")


def test_an_id_of_several_pictures(project: Path, data: Path) -> None:
    _edit(data / "train.json", *[{"image_id": 7}] * 4)
    _found(_report(project), "1 ids are those of several images, e.g. 7: ", "000.jpg", "001.jpg")


def test_one_id_for_all_pictures_is_refused(project: Path, data: Path) -> None:
    _edit(data / "train.json", *[{"image_id": ""}] * 8)
    _found(_report(project), "all 4 images have the id ''", level="refused")


def test_a_video_named_in_two_ways_has_two_ids(tmp_path: Path) -> None:
    paths = write_videos(tmp_path / "data", COUNT, captions_each=2)
    _edit(paths["train"], {"video": "./train_0.mp4"})
    yaml = video_project(tmp_path, "msrvtt_ret", "msrvtt_retrieval", paths)
    _found(_report(yaml, "run.valid_splits=[]"), "1 videos have several ids", "'./train_0.mp4', 'train_0.mp4'")


@pytest.mark.parametrize("numbers", [[1, 1, 1, 1], [1, 2, 3, 4]])
def test_videos_go_by_their_names_whatever_their_image_id(tmp_path: Path, numbers: list[int]) -> None:
    paths = write_videos(tmp_path / "data", COUNT, captions_each=2)
    _edit(paths["train"], *({"image_id": number} for number in numbers * 2))
    report = _report(video_project(tmp_path, "msrvtt_ret", "msrvtt_retrieval", paths), "run.valid_splits=[]")
    assert not report.findings and _counts(report, "train")["ids"] == COUNT


@pytest.mark.parametrize("how", ["path", "symlink", "hardlink", "copy"])
def test_what_is_trained_on_and_evaluated(project: Path, data: Path, how: str) -> None:
    images = data / "images"
    ours, theirs = images / "test/000.jpg", images / "train/003.jpg"
    if how == "path":
        _edit(data / "test.json", {"image": "../images/train/003.jpg"})
    else:
        ours.unlink()
        {"symlink": os.symlink, "hardlink": os.link, "copy": shutil.copy}[how](theirs, ours)
    report = _report(project)
    _found(report, "coco_retrieval test: 1 of 4 images are in coco_retrieval train too", str(theirs), "trained on")
    [overlap] = report.overlaps
    assert (overlap["by_file"], overlap["by_content"]) == ((0, 1) if how == "copy" else (1, 0))
    assert report.beside("test") and not report.beside("val")


def test_the_middle_of_large_files_is_compared(project: Path, data: Path) -> None:
    """Of equal size; the first is a copy, the others differ in one block each."""
    content = bytearray(3 * 2**20)
    for i, place in enumerate((None, 5, len(content) // 2, len(content) - 5)):
        other = bytearray(content)
        if place is not None:
            other[place] = 1
        (data / f"images/test/00{i}.jpg").write_bytes(other)
    (data / "images/train/000.jpg").write_bytes(content)
    report = _report(project)
    assert [(one["by_file"], one["by_content"]) for one in report.overlaps] == [(0, 1)]
    assert str(data / "images/test/000.jpg") in report.overlaps[0]["examples"][0]


def test_validation_on_the_test_is_said(project: Path, data: Path) -> None:
    shutil.copy(data / "val.json", data / "test.json")
    _found(_report(project), "test: 4 of 4 images are in coco_retrieval val too", "set run.valid_splits=[]")


def test_copies_in_a_split_to_evaluate(project: Path, data: Path) -> None:
    shutil.copy(data / "images/val/000.jpg", data / "images/val/002.jpg")
    _found(_report(project), "coco_retrieval val: 1 images have the same content as another: ", "002.jpg", "000.jpg")


@pytest.mark.parametrize("split", ["val", "train"])
@pytest.mark.parametrize("how", ["through ..", "absolute"])
def test_a_picture_that_is_ranked_twice_is_refused_by_any_path(
    project: Path, data: Path, split: str, how: str
) -> None:
    again = {"through ..": f"../images/{split}/000.jpg", "absolute": str(data / f"images/{split}/000.jpg")}[how]
    _edit(data / f"{split}.json", {}, {}, {"image": again, **({"image_id": again} if split == "train" else {})})
    report = _report(project)
    if split == "train":
        assert not [finding for finding in report.findings if finding.level == "refused"]
        return
    said = f"coco_retrieval val: entries 0 ('val/000.jpg') and 2 ({shown(again)}) are one image, {data / 'images'}"
    _found(report, said, level="refused")


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("how", ["missing", "empty", "folder"])
def test_pictures_that_are_no_files_are_refused(project: Path, data: Path, split: str, how: str) -> None:
    why = {"missing": "No such file", "empty": "it is empty", "folder": "it is a folder"}[how]
    path = data / f"images/{split}/001.jpg"
    path.unlink()
    {"missing": lambda: None, "empty": path.touch, "folder": path.mkdir}[how]()
    said = f"coco_retrieval {split}: cannot read 1 of 4 images, which {2 if split == 'train' else 1} of"
    _found(_report(project), said, f"{path} ({why}", level="refused")


def test_a_missing_file_that_has_another_spelling_is_named(tmp_path: Path) -> None:
    """Archives packed on macOS hold accents as letters of their own (NFD); annotations rarely do."""
    here = tmp_path / "M\u00f6bel" / "Tisch.JPG"
    here.parent.mkdir()
    here.touch()
    asked = [str(tmp_path / name) for name in ("Mo\u0308bel/Tisch.JPG", "M\u00f6bel/tisch.jpg", "other/x.jpg")]
    missing = MediaFiles(asked, None).missing(asked)
    assert f"there is {here}: its name differs in how accents" in missing[asked[0]]
    assert f"there is {here}: its name differs in upper and lower case" in missing[asked[1]]
    assert missing[asked[2]] == "No such file or directory"


@pytest.mark.parametrize("how", ["cut off", "a text"])
def test_pictures_are_decoded_where_that_is_asked(project: Path, data: Path, how: str) -> None:
    path = data / "images/val/001.jpg"
    path.write_bytes(path.read_bytes()[:-200] if how == "cut off" else b"<html>not found</html>")
    report = _report(project)
    assert _counts(report, "val")["missing"] == 0 and not [one for one in report.findings if one.level == "refused"]
    report = _report(project, decode=True)
    _found(report, "coco_retrieval val: cannot read 1 of 4 images", f"{path} (", level="refused")
    assert report.files["looked"] == report.files["all"] == 3 * COUNT


def test_videos_are_decoded_where_that_is_asked(tmp_path: Path) -> None:
    paths = write_videos(tmp_path / "data", COUNT)
    broken = paths["videos"] / "test_2.mp4"
    broken.write_bytes(broken.read_bytes()[: broken.stat().st_size // 2])
    yaml = video_project(tmp_path, "msrvtt_ret", "msrvtt_retrieval", paths)
    assert not [one for one in _report(yaml).findings if one.level == "refused"]
    report = _report(yaml, decode=True)
    _found(report, "msrvtt_retrieval test: cannot read 1 of 4 videos", "test_2.mp4 (", level="refused")


@pytest.mark.parametrize(("share", "level"), [(0.3, "warning"), (0.2, "refused")])
def test_few_missing_videos_may_be_trained_without(tmp_path: Path, share: float, level: str) -> None:
    paths = write_videos(tmp_path / "data", COUNT)
    (paths["videos"] / "train_2.mp4").unlink()
    yaml = video_project(tmp_path, "msrvtt_ret", "msrvtt_retrieval", paths, run={"max_broken_share": share})
    _found(_report(yaml), "cannot read 1 of 4 videos", "train_2.mp4 (No such file", level=level)


def test_vqav2s_own_overlap_is_named(tmp_path: Path) -> None:
    yaml = vqa_project(tmp_path)
    config = OmegaConf.load(yaml)
    train = config.datasets.coco_vqa.build_info.annotations.train
    entries = json.loads(Path(config.datasets.coco_vqa.build_info.annotations.val.storage[0]).read_text())
    ours = [{"image": e["image"], "question": e["question"], "answer": ["yes"]} for e in entries]
    (tmp_path / "vqa_val.json").write_text(json.dumps(ours))
    files = [train.storage] if isinstance(train.storage, str) else list(train.storage)
    train.storage = train.url = [*files, str(tmp_path / "vqa_val.json")]
    OmegaConf.save(config, yaml)
    said = [finding.text for finding in _report(yaml).findings if "vqa_val.json" in finding.text]
    assert said and all("coco_vqa val: " in text and "LAVIS's own annotations of VQAv2" in text for text in said)


def test_a_large_set_is_looked_at_for_some_time_only(project: Path) -> None:
    report = _report(project, seconds=-1.0)
    _found(report, "0 of 12 files were looked at", "lavis-aurora check looks at all")


def test_data_json_holds_it_all(project: Path, data: Path, tmp_path: Path) -> None:
    shutil.copy(data / "images/val/000.jpg", data / "images/train/002.jpg")
    report = _report(project)
    report.write(tmp_path)
    found = json.loads((tmp_path / module.DATA_REPORT).read_text())
    assert [(one["dataset"], one["split"], one["trained"]) for one in found["splits"]] == [
        ("coco_retrieval", split, split == "train") for split in ("train", "val", "test")
    ]
    assert found["findings"] == [finding._asdict() for finding in report.findings] and found["overlaps"]
