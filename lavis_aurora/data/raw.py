"""Annotation files as MSR-VTT, DiDeMo and Karpathy publish them, read as entries of LAVIS's datasets."""

from __future__ import annotations

import csv
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lavis_aurora.common.errors import AuroraError, did_you_mean, shown
from lavis_aurora.common.files import read_json, regular

Entries = list[dict[str, Any]]


def _get(item: Any, key: str, path: Path, what: str) -> Any:
    if not isinstance(item, dict) or key not in item:
        near = did_you_mean(key, map(str, item)) if isinstance(item, dict) and item else ""
        raise AuroraError(f"{path}: {what} has no {key!r}{near}")
    return item[key]


def _list(value: Any, path: Path, what: str) -> list:
    if not isinstance(value, list):
        raise AuroraError(f"{path}: {what} must be a list, not {shown(value)}")
    return value


def msrvtt(paths: Sequence[Path], split: str, test_csv: Path | None) -> dict[str, Entries]:
    """MSR-VTT's videodatainfo files as entries of LAVIS's msrvtt_retrieval.

    Args:
        paths: with ``videos`` (video_id, split) and ``sentences`` (video_id, caption).
        split: full (the authors'), 7k or 9k (with the 1,000 videos and sentences of ``test_csv`` as test). The last
            two have no validation videos: val is test there.
        test_csv: MSRVTT_JSFUSION_test.csv, with columns video_id and sentence.
    """
    parts: dict[str, str] = {}
    captions: dict[str, list[str]] = defaultdict(list)
    for path in paths:
        content = read_json(path)
        for i, video in enumerate(_list(_get(content, "videos", path, "the file"), path, "videos")):
            parts[_get(video, "video_id", path, f"video {i}")] = _get(video, "split", path, f"video {i}")
        for i, sentence in enumerate(_list(_get(content, "sentences", path, "the file"), path, "sentences")):
            text = _get(sentence, "caption", path, f"sentence {i}")
            if text.strip():
                captions[_get(sentence, "video_id", path, f"sentence {i}")].append(text)
    without = sorted(parts.keys() - captions.keys())
    if without:
        raise AuroraError(f"{paths[0]}: {len(without)} videos have no sentence, among them {without[0]}")
    if split == "full":
        names = {"train": "train", "val": "validate", "test": "test"}
        members = {ours: [v for v, part in parts.items() if part == theirs] for ours, theirs in names.items()}
        held_out = {ours: [(video, captions[video]) for video in members[ours]] for ours in ("val", "test")}
        train = members["train"]
    else:
        if test_csv is None:
            raise AuroraError(f"--test-csv: missing; split {split} is tested on MSRVTT_JSFUSION_test.csv")
        test = _read_test_csv(test_csv, parts)
        held_out = {"val": test, "test": test}
        tested = {video for video, _ in test}
        train = [v for v, part in parts.items() if v not in tested and (split == "9k" or part != "test")]
    entries = {part: [{"video": f"{v}.mp4", "caption": texts} for v, texts in held_out[part]] for part in held_out}
    return {"train": [{"video": f"{v}.mp4", "caption": text} for v in train for text in captions[v]], **entries}


def _read_test_csv(path: Path, known: dict[str, str]) -> list[tuple[str, list[str]]]:
    """Videos and their one sentence."""
    try:
        with regular(path).open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
    except (OSError, ValueError, csv.Error) as error:
        raise AuroraError(f"{path} is not a readable csv file ({error})") from error
    test = [(_get(row, "video_id", path, "the file"), [_get(row, "sentence", path, "the file")]) for row in rows]
    unknown = [video for video, _ in test if video not in known]
    if unknown:
        raise AuroraError(
            f"{path}: {len(unknown)} videos are in none of the annotation files, among them {unknown[0]}; give "
            f"train_val_videodatainfo.json and test_videodatainfo.json both"
        )
    return test


def didemo(folder: Path, videos: Path | None) -> tuple[dict[str, Entries], list[str]]:
    """DiDeMo's train_data.json, val_data.json and test_data.json as entries of LAVIS's didemo_retrieval.

    All descriptions of a video, in the file's order, make one paragraph.

    Args:
        folder: of the three files.
        videos: folder of the videos; a video is found under its name, or under it with another ending.

    Returns:
        The entries, and the names of videos that are not in ``videos``, which are left out of them.
    """
    found = None
    if videos is not None:
        if not videos.is_dir():
            raise AuroraError(f"--videos: no such folder: {videos}")
        names = sorted(file.name for file in videos.iterdir())
        found = {**{Path(name).stem: name for name in names}, **{name: name for name in names}}
    result: dict[str, Entries] = {}
    missing: list[str] = []
    for part in ("train", "val", "test"):
        path = folder / f"{part}_data.json"
        paragraphs: dict[str, list[str]] = defaultdict(list)
        for i, item in enumerate(_list(read_json(path), path, "the file")):
            text = _get(item, "description", path, f"entry {i}").strip()
            if text:
                paragraphs[_get(item, "video", path, f"entry {i}")].append(text)
        result[part] = []
        for video, texts in paragraphs.items():
            name = video if found is None else found.get(video) or found.get(Path(video).stem)
            if name is None:
                missing.append(video)
                continue
            paragraph = " ".join(texts)
            result[part].append({"video": name, "caption": paragraph if part == "train" else [paragraph]})
    return result, missing


def karpathy(path: Path) -> tuple[str, dict[str, Entries]]:
    """Karpathy's dataset_coco.json or dataset_flickr30k.json as entries of LAVIS's coco_retrieval or flickr30k.

    Returns:
        coco or flickr30k, and the entries.
    """
    content = read_json(path)
    name = _get(content, "dataset", path, "the file")
    if name not in ("coco", "flickr30k"):
        raise AuroraError(f"{path}: holds {shown(name)}; known: coco, flickr30k")
    parts: dict[str, Entries] = {"train": [], "val": [], "test": []}
    for i, image in enumerate(_list(_get(content, "images", path, "the file"), path, "images")):
        what = f"image {i}"
        # LAVIS's scripts put the pictures there.
        folder = _get(image, "filepath", path, what) if name == "coco" else "flickr30k-images"
        file = f"{folder}/{_get(image, 'filename', path, what)}"
        texts = [_get(sentence, "raw", path, what) for sentence in _get(image, "sentences", path, what)]
        texts = [text for text in texts if text.strip()]
        part = _get(image, "split", path, what)
        part = "train" if part == "restval" else part
        if part not in parts:
            raise AuroraError(f"{path}: the split of {what} is {shown(part)}{did_you_mean(str(part), parts)}")
        if part == "train":
            number = image.get("cocoid", image.get("imgid", i))
            parts[part] += [{"image": file, "caption": text, "image_id": f"{name}_{number}"} for text in texts]
        elif texts:
            parts[part].append({"image": file, "caption": texts})
    return name, parts


# Of VQAv2's official files: keys of the file, the list it holds, and keys of each item.
QUESTIONS = (("info", "task_type", "data_type", "data_subtype", "license"), "questions", ("question_id",))
TRUE_ANSWERS = ((), "annotations", ("question_id", "image_id", "question_type", "answer_type", "answers"))


def _read_official(path: str, key: str, form: tuple) -> set:
    """Question ids of an official file, whose keys are checked."""
    top, items, each = form
    content = read_json(path, key)
    for name in (*top, items):
        if not isinstance(content, dict) or name not in content:
            near = did_you_mean(name, content) if isinstance(content, dict) else ""
            raise AuroraError(f"{key}: {path} has no {name!r}, as VQAv2's own files have{near}")
    for i, item in enumerate(content[items]):
        for name in each:
            if name not in item:
                raise AuroraError(f"{key}: item {i} of {items!r} in {path} has no {name!r}{did_you_mean(name, item)}")
        if "answers" in each and not _annotators(item["answers"]):
            raise AuroraError(
                f"{key}: the answers of item {i} of {items!r} in {path} must be a list of those of its annotators, "
                f'e.g. [{{"answer": "red", "answer_id": 1}}]; leave questions out that have none'
            )
    return {item["question_id"] for item in content[items]}


def _annotators(answers: Any) -> bool:
    """Whether these are the answers to a question of VQAv2, of one annotator or more."""
    if not isinstance(answers, list) or not answers:
        return False
    return all(isinstance(one, dict) and isinstance(one.get("answer"), str) for one in answers)


def check_answers(path: str, key: str) -> None:
    """Refuse a file of answers to rank that is no list of them."""
    answers = read_json(path, key)
    if not isinstance(answers, list) or not answers or not all(isinstance(a, str) and a.strip() for a in answers):
        raise AuroraError(f'{key}: {path} must hold a list of answers, e.g. ["yes", "no"]')


def check_vqa_files(entries: list[dict], files: Sequence[str], key: str) -> None:
    """Check the files of a split to evaluate: entries, and if there are more, answers to rank, questions, truth.

    Args:
        entries: of the first file.
        files: all paths, in LAVIS's order.
        key: the YAML key that names them.

    Raises:
        AuroraError: a question is there twice, a file has another format, or they hold different questions (the
            official evaluator would stop, after the evaluation).
    """
    if len(files) not in (2, 4):
        raise AuroraError(
            f"{key}: {len(files)} files; it must be two, questions and a list of answers, or four, also VQAv2's own "
            f"questions and annotations"
        )
    ids = {entry["question_id"] for entry in entries}
    if len({type(i) for i in ids}) > 1:
        raise AuroraError(f"{key}: the question_id of {files[0]} must be all numbers or all strings")
    if len(ids) < len(entries):
        raise AuroraError(
            f"{key}: {files[0]} has {len(entries)} entries with {len(ids)} question_id; each needs its own"
        )
    for path, form in zip(files[2:], (QUESTIONS, TRUE_ANSWERS)):
        official = _read_official(path, key, form)
        if official != ids:
            some = next(iter(official ^ ids))
            raise AuroraError(
                f"{key}: {path} and {files[0]} must hold the same questions; {shown(some)} is in one of them only"
            )
