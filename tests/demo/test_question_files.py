"""Files of questions: VQAv2's format as LAVIS reads it, complete or absent, the same for the same seed."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path

import pytest
from PIL import Image

from lavis_aurora.demo import question_files
from lavis_aurora.demo.question_files import generate_questions, split_files
from lavis_aurora.demo.questions import ANSWER_TYPES, answers_of, iter_questions
from lavis_aurora.demo.scenes import DOMAINS

COUNTS = {"train": 6, "val": 4, "test": 3}
EACH = 3


def _read(path: Path) -> object:
    return json.loads(path.read_text(encoding="utf-8"))


def _files(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture(scope="module", params=DOMAINS)
def made(request, tmp_path_factory) -> tuple[str, Path, dict[str, list[Path]]]:
    folder = tmp_path_factory.mktemp(request.param)
    return request.param, folder, generate_questions(folder, request.param, COUNTS, seed=3, each=EACH)


def test_files_of_a_split_are_those_of_vqav2(made) -> None:
    domain, folder, paths = made
    assert paths == {split: split_files(folder, domain, split) for split in COUNTS}
    assert [len(paths[split]) for split in COUNTS] == [1, 4, 4]
    assert not [*folder.rglob("*unfinished*"), *folder.rglob("*.partial")]


def test_entries_are_what_lavis_reads(made) -> None:
    domain, folder, paths = made
    for split, files in paths.items():
        entries = _read(files[0])
        assert len(entries) == COUNTS[split] * EACH
        assert len({entry["question_id"] for entry in entries}) == len(entries)
        for entry, (index, question, answers) in zip(entries, iter_questions(domain, split, 3, EACH)):
            assert entry["question"] == question.text
            assert entry["image"] == f"{domain}/{split}/{index:05d}.jpg"
            with Image.open(folder / "images" / entry["image"]) as picture:
                assert picture.size == (64, 64)
            assert entry.get("answer") == (answers if split == "train" else None)


@pytest.mark.parametrize("split", ["val", "test"])
def test_official_files_hold_the_same_questions_and_their_answers(made, split: str) -> None:
    domain, _, paths = made
    entries, answers, questions, annotations = map(_read, paths[split])
    assert answers == answers_of(domain)
    assert {"info", "license", "task_type", "data_type", "data_subtype"} <= questions.keys()
    asked = islice(iter_questions(domain, split, 3, EACH), len(entries))
    for entry, item, truth, (_, question, given) in zip(
        entries, questions["questions"], annotations["annotations"], asked
    ):
        assert entry["question_id"] == item["question_id"] == truth["question_id"]
        assert entry["question"] == item["question"]
        assert item["image_id"] == truth["image_id"]
        assert (truth["question_type"], truth["answer_type"]) == (question.kind, ANSWER_TYPES[question.kind])
        assert truth["multiple_choice_answer"] == question.answer
        assert [answer["answer"] for answer in truth["answers"]] == given
        # The official evaluator tells annotators apart by this.
        assert len({answer["answer_id"] for answer in truth["answers"]}) == 10


def test_same_seed_gives_the_same_files_and_another_seed_others(tmp_path: Path) -> None:
    for name, seed in (("one", 3), ("two", 3), ("other", 4)):
        generate_questions(tmp_path / name, "shifted", COUNTS, seed, EACH)
    one, other = _files(tmp_path / "one"), _files(tmp_path / "other")
    assert one == _files(tmp_path / "two")
    assert {name for name in one if one[name] == other[name]} == {"shifted_answers.json"}


def test_a_rerun_replaces_its_splits_and_leaves_the_others(tmp_path: Path) -> None:
    generate_questions(tmp_path, "shifted", COUNTS, each=EACH)
    before = _files(tmp_path)
    generate_questions(tmp_path, "shifted", {"train": 2}, seed=1, each=EACH)
    after = _files(tmp_path)
    assert len(_read(tmp_path / "shifted_vqa_train.json")) == 2 * EACH
    assert all(after[name] == before[name] for name in before if "train" not in name)


@pytest.mark.parametrize("fails_at", ["shifted_test_questions", "shifted_vqa_val"])
def test_interrupted_run_leaves_nothing_that_looks_complete(tmp_path: Path, monkeypatch, fails_at: str) -> None:
    real = Path.replace

    def interrupted(source, target):
        if fails_at in str(target):
            raise KeyboardInterrupt
        return real(source, target)

    generate_questions(tmp_path, "shifted", COUNTS, each=EACH)
    monkeypatch.setattr(Path, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        generate_questions(tmp_path, "shifted", COUNTS, seed=1, each=EACH)
    broken = "test" if "test" in fails_at else "val"
    assert not split_files(tmp_path, "shifted", broken)[0].exists()


def test_captions_are_answers_to_train_on(tmp_path: Path) -> None:
    """They come behind the questions, which stay the same; what is evaluated on stays too."""
    without = generate_questions(tmp_path / "without", "clean", COUNTS, each=EACH)
    paths = generate_questions(tmp_path / "with", "clean", COUNTS, each=EACH, captions=True)
    questions, entries = _read(without["train"][0]), _read(paths["train"][0])
    assert entries[: len(questions)] == questions
    shown = _read(tmp_path / "with" / "clean_train.json")
    # Words of a caption in any order: its shapes come row by row here.
    for entry, row in zip(entries[len(questions) :], shown):
        [caption] = entry["answer"]
        assert sorted(caption.split()) == sorted(row["caption"].split())
    assert [entry["image"] for entry in entries[len(questions) :]] == [row["image"] for row in shown]
    assert len({entry["question_id"] for entry in entries}) == len(entries)
    for split in ("val", "test"):
        assert [path.read_bytes() for path in paths[split]] == [path.read_bytes() for path in without[split]]


def test_errors_name_the_valid_values(tmp_path: Path) -> None:
    for wrong, message in (
        (("dirty", COUNTS), "unknown domain 'dirty': choose one of clean, shifted"),
        (("clean", {"dev": 1}), "unknown split 'dev': choose from train, val, test"),
        (("clean", {"val": -1}), "count of 'val' is -1"),
        (("clean", COUNTS, 0, 0), "0 questions about each picture: give 1 to 99"),
    ):
        with pytest.raises(ValueError, match=message):
            generate_questions(tmp_path, *wrong)
    assert not [*tmp_path.iterdir()]


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    question_files.main([str(tmp_path), "--train", "2", "--val", "0", "--test", "1", "--each", "2"])
    assert "train: 4 questions about 2 pictures" in capsys.readouterr().out
    assert not (tmp_path / "shifted_vqa_val.json").exists() and (tmp_path / "shifted_vqa_test.json").is_file()


@pytest.mark.parametrize("argv, message", [(["--val", "-2"], "count of 'val' is -2"), ([], "nothing to do")])
def test_command_line_errors_are_one_line(tmp_path: Path, capsys, argv: list[str], message: str) -> None:
    with pytest.raises(SystemExit):
        question_files.main([str(tmp_path), "--train", "0", "--val", "0", "--test", "0", *argv])
    assert message in capsys.readouterr().err
