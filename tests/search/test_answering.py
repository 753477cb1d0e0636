"""Questions of files and about one picture: answers are the model's, nothing is answered twice."""

from __future__ import annotations

import csv
import json
import shutil

import pytest
import torch

from lavis_aurora import AuroraError, load_picture
from lavis_aurora.search import answering as module
from lavis_aurora.search.answering import Question, answer_file, iter_answers, read_questions

WORDS = ("What color is the star?", "How many shapes are there?", "Is there a circle?")
CHOICE = ["red", "blue", "two", "yes", "no"]


@pytest.fixture
def questions(gallery):
    """Two about each of 10 pictures and a clip, and one about a file that is broken."""
    images = [*sorted((gallery / "shapes").iterdir())[:10], gallery / "clips/0.mp4"]
    asked = [(image, WORDS[(i + j) % 3]) for i, image in enumerate(images) for j in range(2)]
    asked.insert(5, (gallery / "broken.jpg", WORDS[0]))
    return [Question(100 + i, image, words) for i, (image, words) in enumerate(asked)]


@pytest.mark.parametrize("choice", [None, CHOICE])
def test_answers_are_the_models(answering, questions, choice):
    found = [answer for batch in iter_answers(answering, questions, choice) for answer in batch]
    assert [answer.question_id for answer in found] == [question.question_id for question in questions]
    method = {"inference_method": "rank", "answer_list": choice} if choice else {"inference_method": "generate"}
    for question, answer in zip(questions, found):
        if question.image.name == "broken.jpg":
            assert answer.answer is None and answer.confidence is None and "cannot identify" in answer.why
            continue
        pixels = answering.read(question.image).unsqueeze(0)
        words = [answering.words(question.question)]
        samples = {"image" if pixels.dim() == 4 else "video": pixels, "text_input": words}
        [text], [confidence] = answering.model.predict_answers(samples, return_scores=True, **method)
        assert answer.answer == text and answer.confidence == pytest.approx(confidence, rel=1e-2)


def test_the_formats_of_answers(answering, questions, tmp_path, caplog):
    found = answer_file(answering, questions, tmp_path / "a.json", CHOICE)
    assert "1 pictures cannot be read, their questions are left out" in caplog.text and "broken.jpg" in caplog.text
    right = [answer for answer in found if not answer.why]
    rows = [{"question_id": a.question_id, "answer": a.answer, "confidence": a.confidence} for a in right]
    assert json.loads((tmp_path / "a.json").read_text()) == rows and len(rows) == 22
    answer_file(answering, questions, tmp_path / "a.csv", CHOICE)
    with (tmp_path / "a.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    assert [(int(row["question_id"]), row["answer"], float(row["confidence"])) for row in table] == [
        tuple(row.values()) for row in rows
    ]
    assert table[0]["question"] == WORDS[0] and table[0]["image"] == str(questions[0].image)
    assert {path.name for path in tmp_path.iterdir()} == {"a.json", "a.csv", "gallery"}
    with pytest.raises(AuroraError, match="is there already"):
        answer_file(answering, questions, tmp_path / "a.json")
    with pytest.raises(AuroraError, match="ends in .json"):
        answer_file(answering, questions, tmp_path / "a.txt")


def test_killed_it_goes_on(answering, questions, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "IMAGE_CHUNK", 4)
    whole = answer_file(answering, questions, tmp_path / "whole.json")
    append, calls = module._append, []

    def dying(path, lines):
        calls.append(lines)
        if len(calls) == 4:
            with path.open("ab") as file:
                file.write(b'{"question_id": 10')
            raise KeyboardInterrupt
        append(path, lines)

    with monkeypatch.context() as patch:
        patch.setattr(module, "_append", dying)
        with pytest.raises(KeyboardInterrupt):
            answer_file(answering, questions, tmp_path / "a.json")
    done = sum(map(len, calls[1:3]))
    assert 0 < done < len(questions) and not (tmp_path / "a.json").exists()
    with pytest.raises(AuroraError, match="holds answers to other questions, or of another model; remove it"):
        answer_file(answering, questions[1:], tmp_path / "a.json")
    with pytest.raises(AuroraError, match="holds answers to other questions, or of another model; remove it"):
        answer_file(answering, questions, tmp_path / "a.json", CHOICE)
    asked = []
    iterate = module.iter_answers
    monkeypatch.setattr(module, "iter_answers", lambda m, qs, c: asked.extend(qs) or iterate(m, qs, c))
    assert answer_file(answering, questions, tmp_path / "a.json") == whole
    assert len(asked) == len(questions) - done
    assert (tmp_path / "a.json").read_text() == (tmp_path / "whole.json").read_text()
    (tmp_path / "b.json.answered.jsonl").write_text("{}x\n")
    with pytest.raises(AuroraError, match="is damaged"):
        answer_file(answering, questions, tmp_path / "b.json")


def write(path, content):
    path.write_text(json.dumps(content))
    return path


def test_the_formats_of_questions(gallery, tmp_path):
    listed = [{"image": "shapes/00000.jpg", "question": "how many?", "question_id": "a", "answer": ["two"]}]
    expected = [Question("a", gallery / "shapes/00000.jpg", "how many?")]
    assert read_questions(write(gallery / "q.json", listed)) == expected
    assert read_questions(write(tmp_path / "q.json", listed), gallery) == expected
    vqav2 = {"info": {}, "questions": [{"image_id": 42, "question": "how many?", "question_id": 420}]}
    images = tmp_path / "val2014"
    images.mkdir()
    shutil.copy(gallery / "shapes/00000.jpg", images / "COCO_val2014_000000000042.jpg")
    asked = write(tmp_path / "v2.json", vqav2)
    assert read_questions(asked, images) == [Question(420, images / "COCO_val2014_000000000042.jpg", "how many?")]
    with pytest.raises(AuroraError, match="question 0: no picture of .* is named by image_id 42.*--images"):
        read_questions(asked)
    shutil.copy(gallery / "shapes/00000.jpg", images / "42.jpg")
    with pytest.raises(AuroraError, match="have one number"):
        read_questions(asked, images)
    mistyped = write(tmp_path / "typo.json", [*listed, {"img": "42.jpg", "question": "how many?"}])
    with pytest.raises(AuroraError, match="typo.json: question 1: image is None; it must name a file .*'img'"):
        read_questions(mistyped, images)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([], "holds no questions"),
        ({"annotations": []}, "holds no questions"),
        ([{"image": "a.jpg", "question": " "}], "question 0: question is ' '; it must have words"),
        ([{"image": "a.jpg", "question": "who?", "question_id": [1]}], r"question_id is \[1\]"),
        ([{"image": "a.jpg", "question": "who?", "question_id": 1}] * 2, "two questions have the question_id 1"),
    ],
)
def test_files_that_hold_no_questions(tmp_path, content, message):
    with pytest.raises(AuroraError, match=message):
        read_questions(write(tmp_path / "q.json", content))


def test_pixels_are_those_of_the_processor(answering, gallery):
    path = gallery / "shapes/00000.jpg"
    assert torch.equal(answering.read(path), answering._picture(load_picture(path)))
