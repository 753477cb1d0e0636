"""Files of question answering: every mistake is named before anything is trained, and good files pass."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from omegaconf import DictConfig
from tiny_vqa import vqa_project

from lavis_aurora.common.errors import AuroraError
from lavis_aurora.data.annotations import build_checked
from lavis_aurora.project import load_config


@pytest.fixture
def cfg(tmp_path: Path) -> DictConfig:
    """``datasets:`` of a project over files in ``tmp_path/data``."""
    return load_config(str(vqa_project(tmp_path, count=3))).datasets_cfg


@pytest.fixture
def edit(tmp_path: Path, cfg: DictConfig) -> Callable[..., Path]:
    """Change the content of a file and return its path."""

    def change(name: str, how: Callable[[Any], Any]) -> Path:
        path = tmp_path / "data" / name
        content = json.loads(path.read_text())
        changed = how(content)
        path.write_text(json.dumps(content if changed is None else changed))
        return path

    return change


def _refused(cfg: DictConfig, *parts: object, name: str = "coco_vqa") -> None:
    with pytest.raises(AuroraError) as caught:
        build_checked(name, cfg[name])
    for part in parts:
        assert str(part) in str(caught.value)


def test_good_files_are_lavis_datasets(cfg: DictConfig) -> None:
    coco, genome = build_checked("coco_vqa", cfg.coco_vqa), build_checked("vg_vqa", cfg.vg_vqa)
    assert set(coco) == {"train", "val", "test"} and set(genome) == {"train"}
    assert coco["train"][0]["answers"] == ["red", "no"] and genome["train"][1]["answers"] == ["2"]
    assert coco["val"].coco_fmt_anno_file.endswith("truth.json") and coco["test"].coco_fmt_anno_file is None
    assert coco["test"].answer_list == coco["val"].answer_list
    assert coco["val"][1]["text_input"] == "how many square number 1?"


@pytest.mark.parametrize(
    ("file", "name", "value", "need"),
    [
        ("train.json", "answer", [], 'must be a list of strings, none empty, e.g. ["a cat"], not []'),
        ("train.json", "answer", "red", "must be a list of strings"),
        ("train.json", "answer", ["red", 2], "must be a list of strings"),
        ("train.json", "question", "  ", "must be a string with words, not '  '"),
        ("vg.json", "question", "(...)", "must be a string with words, not '(...)'"),
        ("train.json", "question", None, "must be a string with words, not None"),
        ("val.json", "question", "", "must be a string with words, not ''"),
        ("val.json", "question_id", 1.5, "must be a whole number or a string, not 1.5"),
        ("test.json", "question_id", None, "must be a whole number or a string"),
        ("vg.json", "answer", ["red"], "must be one string, not empty, not ['red']"),
    ],
)
def test_value_that_lavis_would_misread(cfg: DictConfig, edit: Callable, file: str, name: str, value, need) -> None:
    path = edit(file, lambda entries: entries[1].update({name: value}))
    _refused(cfg, f"the {name} of entry 1 of {path} {need}", name="vg_vqa" if file == "vg.json" else "coco_vqa")


@pytest.mark.parametrize(
    ("file", "name", "dataset"),
    [
        ("train.json", "image", "coco_vqa"),
        ("train.json", "answer", "coco_vqa"),
        ("val.json", "question", "coco_vqa"),
        ("test.json", "question_id", "coco_vqa"),
        ("vg.json", "answer", "vg_vqa"),
    ],
)
def test_missing_key(cfg: DictConfig, edit: Callable, file: str, name: str, dataset: str) -> None:
    path = edit(file, lambda entries: entries[2].pop(name) and None)
    _refused(cfg, f"datasets.{dataset}.build_info.annotations.", f"entry 2 of {path} has no {name!r}", name=dataset)


def test_every_training_file_is_checked(cfg: DictConfig, edit: Callable, tmp_path: Path) -> None:
    files = [str(tmp_path / "data" / name) for name in ("train.json", "vg.json")]
    cfg.coco_vqa.build_info.annotations.train = {"url": files, "storage": files}
    _refused(cfg, f"the answer of entry 0 of {files[1]} must be a list of strings")


@pytest.mark.parametrize("split", ["val", "test"])
def test_question_that_is_there_twice(cfg: DictConfig, edit: Callable, split: str) -> None:
    path = edit(f"{split}.json", lambda entries: entries[2].update(question_id=entries[0]["question_id"]))
    _refused(cfg, f"entries 0 and 2 of {path} have the same question_id, ", "; give each its own")


def test_question_ids_of_two_kinds(cfg: DictConfig, edit: Callable) -> None:
    path = edit("test.json", lambda entries: entries[2].update(question_id="x"))
    _refused(cfg, f"the question_id of {path} must be all numbers or all strings")


@pytest.mark.parametrize("content", [[], {"yes": 1}, "yes", [1, 2]])
def test_list_of_answers_that_is_none(cfg: DictConfig, edit: Callable, content: object) -> None:
    path = edit("answers.json", lambda _: content)
    _refused(cfg, f'{path} must hold a list of answers, e.g. ["yes", "no"]')


def test_list_of_answers_is_missing(cfg: DictConfig, tmp_path: Path) -> None:
    path = tmp_path / "data" / "answers.json"
    path.unlink()
    _refused(cfg, "annotations.val.storage", f"{path} is missing")


@pytest.mark.parametrize("count", [1, 3])
def test_number_of_files(cfg: DictConfig, count: int) -> None:
    val = cfg.coco_vqa.build_info.annotations.val
    val.url, val.storage = val.url[:count], val.storage[:count]
    _refused(cfg, f"annotations.val.storage: {count} files; it must be two", "or four")


@pytest.mark.parametrize(
    ("file", "how", "need"),
    [
        ("questions.json", lambda content: content.pop("task_type") and None, "has no 'task_type'"),
        ("questions.json", lambda content: content["questions"], "has no 'info'"),
        ("truth.json", lambda content: {"annotation": content["annotations"]}, "has no 'annotations'"),
        (
            "truth.json",
            lambda content: content["annotations"][1].pop("answer_type") and None,
            "item 1 of 'annotations'",
        ),
    ],
)
def test_official_file_of_another_format(cfg: DictConfig, edit: Callable, file: str, how, need: str) -> None:
    edit(file, how)
    _refused(cfg, "annotations.val.storage", file, need)


@pytest.mark.parametrize(("file", "items"), [("questions.json", "questions"), ("truth.json", "annotations")])
def test_official_file_of_other_questions(cfg: DictConfig, edit: Callable, file: str, items: str) -> None:
    """The official evaluator would stop, after all questions were answered."""
    path = edit(file, lambda content: content[items].pop() and None)
    _refused(cfg, f"{path} and ", "must hold the same questions; 4000000002 is in one of them only")


@pytest.mark.parametrize("answers", [[], None, "red", ["red"], [{"answer": 2}], [{"text": "red"}]])
def test_answers_of_annotators(cfg: DictConfig, edit: Callable, answers: object) -> None:
    path = edit("truth.json", lambda content: content["annotations"][1].update(answers=answers))
    _refused(cfg, f"the answers of item 1 of 'annotations' in {path} must be a list of those of its annotators")
