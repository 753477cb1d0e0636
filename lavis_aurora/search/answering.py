"""Questions about pictures and clips, one by one or a file of them, answered by a model of answers."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import logging
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lavis_aurora.common.errors import AuroraError, abbreviated, shown
from lavis_aurora.common.files import appended, read_json, write_text
from lavis_aurora.evaluation.encode import progress
from lavis_aurora.evaluation.rerank import IMAGE_CHUNK
from lavis_aurora.search.files import kind_of
from lavis_aurora.search.model import SearchModel, Unreadable

ARCH = "blip_vqa_aurora"
FORMATS = (".json", ".csv")
FIELDS = ("question_id", "image", "question", "answer", "confidence")


class Question(NamedTuple):
    """A question about a picture or clip.

    Attributes:
        question_id: as the file has it.
        image: path.
        question: the words.
    """

    question_id: int | str
    image: Path
    question: str


@dataclass(frozen=True)
class Answer:
    """An answer to a question.

    Attributes:
        question_id, image, question: of the question.
        answer: the words; None if its picture cannot be read.
        confidence: from 0 to 1, see ``predict_answers``; None likewise.
        why: the picture cannot be read; empty if it can.
    """

    question_id: int | str
    image: str
    question: str
    answer: str | None
    confidence: float | None
    why: str = ""


def read_questions(file: str | Path, images: str | Path | None = None) -> list[Question]:
    """Questions of a file, VQAv2's (``questions``, with ``image_id``) or LAVIS's (a list, with ``image``).

    Args:
        file: json.
        images: the folder in which pictures are named; by default that of the file.

    Raises:
        AuroraError: it cannot be read, or a question lacks something, or two have one id.
    """
    content = read_json(file)
    entries = content.get("questions") if isinstance(content, dict) else content
    if not isinstance(entries, list) or not entries or not all(isinstance(entry, dict) for entry in entries):
        raise AuroraError(f"{file} holds no questions; it must be VQAv2's file, or a list of image and question")
    folder = Path(images or Path(file).parent).expanduser()
    numbered = _numbered(folder) if any("image" not in one and "image_id" in one for one in entries) else {}
    questions = [_question(f"{file}: question {i}", i, entry, folder, numbered) for i, entry in enumerate(entries)]
    [(twice, count)] = Counter(question.question_id for question in questions).most_common(1)
    if count > 1:
        raise AuroraError(f"{file}: two questions have the question_id {shown(twice)}; answers are told apart by it")
    return questions


def read_answer_list(file: str | Path) -> list[str]:
    """The answers to choose from: a json list.

    Raises:
        AuroraError: it is none of texts, or has none.
    """
    found = read_json(file)
    if not isinstance(found, list) or not found or not all(isinstance(one, str) and one.strip() for one in found):
        raise AuroraError(f'{file} holds {shown(found)}; it must be a list of answers, as ["yes", "no"]')
    return found


def _question(where: str, number: int, entry: dict[str, Any], folder: Path, numbered: dict[int, Path]) -> Question:
    words, name, given = entry.get("question"), entry.get("image"), entry.get("question_id", number)
    if not isinstance(words, str) or not words.strip():
        raise AuroraError(f"{where}: question is {shown(words)}; it must have words")
    if not isinstance(given, (int, str)):
        raise AuroraError(f"{where}: question_id is {shown(given)}; it must be a number or a string")
    if isinstance(name, str):
        return Question(given, folder / name, words)
    if "image_id" not in entry:
        raise AuroraError(f"{where}: image is {shown(name)}; it must name a file (the entry has {shown([*entry])})")
    image = numbered.get(entry["image_id"]) if isinstance(entry.get("image_id"), int) else None
    if image is None:
        raise AuroraError(
            f"{where}: no picture of {folder} is named by image_id {shown(entry.get('image_id'))}, as "
            f"COCO_val2014_000000000042.jpg is by 42; name their folder by --images, or the file under image"
        )
    return Question(given, image, words)


def _numbered(folder: Path) -> dict[int, Path]:
    """Pictures by the number at the end of their names, as COCO numbers them."""
    found: dict[int, Path] = {}
    for path in sorted(folder.glob("*")) if folder.is_dir() else ():
        number = re.search(r"(\d+)$", path.stem)
        if number is None or kind_of(path.name) is None:
            continue
        if int(number[1]) in found:
            raise AuroraError(f"{found[int(number[1])]} and {path} have one number; name files under image instead")
        found[int(number[1])] = path
    return found


def iter_answers(
    model: SearchModel, questions: Sequence[Question], answer_list: Sequence[str] | None = None
) -> Iterator[list[Answer]]:
    """Answers in the order of the questions, a batch at a time.

    Args:
        model: of :data:`ARCH`.
        questions: what to ask.
        answer_list: what to choose from; without one, answers are generated.
    """
    method = {"inference_method": "rank", "answer_list": answer_list} if answer_list else {}
    method = method or {"inference_method": "generate"}
    for batch in _batches(model, questions):
        asked = [(question, pixels) for question, pixels, _ in batch if pixels is not None]
        found: Iterator[tuple[str, float]] = iter(())
        if asked:
            pixels = torch.stack([pixels for _, pixels in asked])
            key = "image" if pixels.dim() == 4 else "video"
            words = [model.words(question.question, "question") for question, _ in asked]
            samples = {key: pixels.to(model.model.device), "text_input": words}
            found = zip(*model.model.predict_answers(samples, return_scores=True, **method))
        answers = []
        for question, read, why in batch:
            text, confidence = next(found) if read is not None else (None, None)
            rounded = None if confidence is None else float(f"{confidence:.4g}")
            image = str(question.image)
            answers.append(Answer(question.question_id, image, question.question, text, rounded, why))
        yield answers


def _batches(
    model: SearchModel, questions: Sequence[Question]
) -> Iterator[list[tuple[Question, Tensor | None, str]]]:
    """Neighbours of one shape, each with its pixels, or with why there are none."""
    batch: list[tuple[Question, Tensor | None, str]] = []
    shape: torch.Size | None = None
    for image, about in groupby(questions, key=lambda question: question.image):
        why, pixels = "", None
        try:
            pixels = model.read(image)
        except Unreadable as error:
            why = str(error)
        frames = 1 if pixels is None or pixels.dim() == 3 else pixels.shape[1]
        for question in about:
            full = (len(batch) + 1) * frames > IMAGE_CHUNK
            if batch and (full or (pixels is not None and shape not in (None, pixels.shape))):
                yield batch
                batch, shape = [], None
            shape = pixels.shape if pixels is not None else shape
            batch.append((question, pixels, why))
    if batch:
        yield batch


def answer_file(
    model: SearchModel, questions: Sequence[Question], out: str | Path, answer_list: Sequence[str] | None = None
) -> list[Answer]:
    """Answer questions and write a file of answers; killed anywhere, the next call goes on.

    Answers on the way are in ``OUT.answered.jsonl``. Questions about pictures that cannot be read are left out of the
    result, and are among what is returned.

    Args:
        model, questions, answer_list: as of :func:`iter_answers`.
        out: ``.json`` in VQAv2's format (``question_id``, ``answer``, and ``confidence``), or ``.csv``.

    Raises:
        AuroraError: the file is there already, what is there of it is of other questions or another model, or none
            of the pictures can be read.
    """
    out = Path(out).expanduser()
    if out.suffix.lower() not in FORMATS:
        raise AuroraError(f"{out}: a file of answers ends in .json, as VQAv2's, or in .csv")
    if out.exists():
        raise AuroraError(f"{out} is there already; name another file")
    asked = [[question.question_id, str(question.image.absolute()), question.question] for question in questions]
    said = json.dumps([model.identity, asked, list(answer_list or ())], sort_keys=True)
    unfinished = out.with_name(out.name + ".answered.jsonl")
    answers = _begun(unfinished, hashlib.sha256(said.encode()).hexdigest())
    if answers:
        logging.info("%s: %d of %d questions were answered before", unfinished, len(answers), len(questions))
    with progress(len(questions), "answering", "question") as bar:
        bar.update(len(answers))
        for batch in iter_answers(model, questions[len(answers) :], answer_list):
            _append(unfinished, [json.dumps(vars(answer)) for answer in batch])
            answers += batch
            bar.update(len(batch))
    broken = dict.fromkeys(f"{answer.image} ({answer.why})" for answer in answers if answer.why)
    if all(answer.why for answer in answers):
        unfinished.unlink()
        raise AuroraError(f"{out}: no picture can be read ({abbreviated(broken)}); name their folder by --images")
    write_text(out, _text(answers, out.suffix.lower()))
    unfinished.unlink()
    if broken:
        said = abbreviated(broken)
        logging.warning("%d pictures cannot be read, their questions are left out: %s", len(broken), said)
    return answers


def _begun(path: Path, said: str) -> list[Answer]:
    """The answers that an earlier call has left; a new file begins with what they are of."""
    try:
        lines = path.read_bytes().split(b"\n") if path.exists() else []
    except OSError as error:
        raise AuroraError(f"{path} cannot be read ({error.strerror}); remove it to begin anew") from error
    whole = lines[:-1]  # what was being written when it was killed has no end
    if not whole:
        path.unlink(missing_ok=True)
        _append(path, [json.dumps(said)])
        return []
    try:
        [first, *rest] = map(json.loads, whole)
        answers = [Answer(**one) for one in rest]
    except (ValueError, TypeError) as error:
        raise AuroraError(f"{path} is damaged ({error}); remove it to begin anew") from error
    if first != said:
        raise AuroraError(
            f"{path} holds answers to other questions, or of another model; remove it to begin anew, or name another "
            f"file of answers"
        )
    os.truncate(path, sum(len(line) + 1 for line in whole))
    return answers


def _append(path: Path, lines: Sequence[str]) -> None:
    with appended(path), path.open("ab") as file:
        file.write("".join(f"{line}\n" for line in lines).encode())


def _text(answers: Sequence[Answer], ending: str) -> str:
    given = [vars(answer) for answer in answers if not answer.why]
    if ending == ".json":
        keys = ("question_id", "answer", "confidence")
        return json.dumps([{key: answer[key] for key in keys} for answer in given])
    table = io.StringIO(newline="")
    writer = csv.DictWriter(table, FIELDS, extrasaction="ignore")
    writer.writeheader()
    writer.writerows(given)
    return table.getvalue()
