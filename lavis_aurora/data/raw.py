"""Rows of published annotations as entries of LAVIS's datasets, by benchmark; the checks of VQAv2's files."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lavis_aurora.common.errors import AuroraError, did_you_mean, shown
from lavis_aurora.common.files import read_json
from lavis_aurora.data.layouts import SPLITS, TEXTS, Annotations, Row, has_words, read_annotations

Entries = list[dict[str, Any]]
Groups = dict[str, list[Row]]  # rows of each picture or video, by what all its names have in common
PARTS = ("train", "val", "test")
DATASETS = {
    "coco_retrieval": "coco",
    "flickr30k": "flickr30k",
    "msrvtt_retrieval": "msrvtt",
    "didemo_retrieval": "didemo",
    "msrvtt_qa": "msrvtt_qa",
    "msrvtt_qa_aurora": "msrvtt_qa",
    "own_retrieval": "own",
    "own_video_retrieval": "own_video",
}
COMMAND = "python -m lavis_aurora.data.convert"


class Benchmark(NamedTuple):
    """How the pictures or videos of a benchmark are named.

    Attributes:
        media: image or video.
        name: pattern of a name; its group is the same for all names of one picture or video.
        sure: pattern of names that no other benchmark has.
        file: below LAVIS's folder of pictures or videos, from that group and one of the names.
        paragraphs: all texts of a video make one.
    """

    media: str
    name: str
    sure: str
    file: Callable[[str, str], str] = lambda key, item: item
    paragraphs: bool = False

    def key(self, item: str, path: Path) -> str:
        """What all names of the same picture or video have in common."""
        found = re.fullmatch(self.name, item)
        if found is None:
            own = "own" if self.media == "image" else "own_video"
            what = f"{shown(item)} is no name of {'an' if own == 'own' else 'a'} {self.media} of this benchmark"
            raise AuroraError(f"{path}: {what}; files of your own are for `convert {own}`")
        return found[1]


def _coco_file(key: str, item: str) -> str:
    if "/" in item:
        return item
    folder = re.match(r"COCO_((?:train|val)20\d\d)_", item)
    if folder is None:
        raise AuroraError(f"coco: {shown(item)} does not say its folder, as COCO_val2014_000000000042.jpg does")
    return f"{folder[1]}/{item}"


_NUMBERED = r"(?:video)?(\d+)(?:\.\w+)?"
# Of published names alone the number is enough; in other folders it may be another picture's.
_COCO = r"(?:(?:.*/)?(?:COCO_[a-z]+20\d\d_|(?:train|val|test)20\d\d/)|(?=\d+$|\d{12}\.jpg$))0*(\d+)(?:\.jpg)?"
BENCHMARKS = {
    "msrvtt": Benchmark("video", _NUMBERED, r"video\d+(\.\w+)?", lambda key, item: f"video{key}.mp4"),
    "msrvtt_qa": Benchmark("video", _NUMBERED, _NUMBERED, lambda key, item: f"video{key}.mp4"),
    # The same video has several endings in different annotations, or a dot without one.
    "didemo": Benchmark("video", r"(.+?)(?:\.\w*)?", r"\d+@N\d\d_\d+.*", paragraphs=True),
    "coco": Benchmark("image", _COCO, r"(.*/)?(COCO_[a-z]+|(train|val)(?=20\d\d/))20\d\d[_/]\d+\.jpg", _coco_file),
    "flickr30k": Benchmark(
        "image",
        r"(?:(?:.*/)?flickr30k.images/|(?=\d{4}))(\d+)(?:\.jpg)?(?:#\d)?",
        r"(.*/)?flickr30k.images/\d+\.jpg(#\d)?|\d{4,}\.jpg(#\d)?",
        lambda key, item: f"flickr30k-images/{key}.jpg",
    ),
    "own": Benchmark("image", "(.+)", "(?!)"),
    "own_video": Benchmark("video", "(.+)", "(?!)"),
}


def benchmark_of(annotations: Annotations) -> str:
    """The benchmark whose names a file has; empty if they are no benchmark's."""
    rows = annotations.rows[:20]
    for name, benchmark in BENCHMARKS.items():
        asked = name == "msrvtt_qa"
        if all(bool(row.question) == asked and re.fullmatch(benchmark.sure, row.item) for row in rows):
            return name
    return ""


def role_of(path: Path) -> str:
    """The split that the name of a file says, if it says one."""
    named = {SPLITS[word] for word in re.split("[^a-z]+", path.name.lower()) if word in SPLITS}
    return named.pop() if len(named) == 1 else ""


class Given(NamedTuple):
    """What files of a benchmark hold.

    Attributes:
        parts: rows of files, or of rows, that say their split.
        whole: rows of files that hold any split.
        lists: the names that lists give to a split.
    """

    parts: dict[str, Groups]
    whole: Groups
    lists: dict[str, dict[str, str]]


def _refuse_texts_unknown(found: Annotations) -> None:
    """Refuse a file that holds more than names, but no caption under a known key."""
    if found.layout.kind == "list" and len(found.keys) > 1:
        keys = ", ".join(map(shown, found.keys))
        raise AuroraError(f"{found.path}: entries have {keys}, none of {', '.join(TEXTS)}; rename the caption's key")


def _gather(name: str, sources: Sequence[tuple[str, Annotations]]) -> Given:
    given = Given({}, {}, {})
    files: dict[tuple[str, str], Path] = {}
    for role, found in sources:
        path, layout, rows, _ = found
        if layout.kind != "list" and bool(rows[0].question) != (name == "msrvtt_qa"):
            raise AuroraError(f"{path}: it holds {layout.name}, which {name} has not")
        named = "" if layout.kind == "whole" else role_of(path)
        for row in rows:
            key, split = BENCHMARKS[name].key(row.item, path), role or row.split or named
            if layout.kind == "list":
                if not split:
                    _refuse_texts_unknown(found)
                    raise AuroraError(f"{path}: the names of which split? Give it as train={path}, or val, or test")
                given.lists.setdefault(split, {})[key] = row.item
                continue
            split = "" if layout.kind == "whole" and not role else split
            before = files.setdefault((split, key), path)
            if before != path and not row.question:
                raise AuroraError(f"{path}: {shown(row.item)} is in {before} too; give one of these files")
            groups = given.parts.setdefault(split, {}) if split else given.whole
            groups.setdefault(key, []).append(row)
    return given


def splits_of(name: str, sources: Sequence[tuple[str, Annotations]], protocol: str = "") -> dict[str, Groups]:
    """The pictures or videos of each split, with their rows.

    Args:
        name: of :data:`BENCHMARKS`.
        sources: the split that a file holds where its user has said it, else "", and the file.
        protocol: of MSR-VTT: 9k or 7k, which have no validation videos (val is test there), or full.

    Raises:
        AuroraError: it cannot be told what belongs to a split, or a list names what no file has.
    """
    parts, whole, lists = _gather(name, sources)
    first = sources[0][1].path
    for part, keys in lists.items():
        lost = [item for key, item in keys.items() if key not in whole]
        if lost and part not in parts:
            for _, found in sources:
                _refuse_texts_unknown(found)
            raise AuroraError(
                f"{name}: of the names listed for {part}, {len(lost)} have captions in none of the files, among them "
                f"{lost[0]}; give all files of captions"
            )
        parts.setdefault(part, {key: rows for key, rows in whole.items() if key in keys})
    if protocol in ("9k", "7k"):
        held_out = parts.get("test", parts.get("val"))
        if held_out is None and whole:
            raise AuroraError(
                f"--test-csv: missing; split {protocol} is tested on MSRVTT_JSFUSION_test.csv, without which {first} "
                f"cannot be divided; give it so, or a file of the test as test=FILE"
            )
        held_out = held_out or {}
        unknown = [rows[0].item for key, rows in held_out.items() if key not in whole]
        if whole and unknown:
            raise AuroraError(
                f"{name}: {len(unknown)} videos of the test are in none of the annotation files, among them "
                f"{unknown[0]}; give train_val_videodatainfo.json and test_videodatainfo.json both"
            )
        left = {k: r for k, r in whole.items() if k not in held_out and (protocol == "9k" or r[0].split != "test")}
        if left:
            parts.setdefault("train", left)
        parts = ({"val": held_out, "test": held_out} if held_out else {}) | parts
    else:
        for key, rows in whole.items():
            if rows[0].split and rows[0].split not in lists:
                parts.setdefault(rows[0].split, {}).setdefault(key, []).extend(rows)
    if not parts:
        raise AuroraError(
            f"{name}: of which split is {first}? Give it as train={first}, or val, or test; or give lists of the "
            f"names of each split too"
        )
    return {part: parts[part] for part in PARTS if part in parts}


def entries_of(
    name: str, part: str, groups: Groups, files: Mapping[str, str] | None = None
) -> tuple[Entries, list[str], list[str]]:
    """The entries of a split.

    Args:
        name: of :data:`BENCHMARKS`.
        part: train, val or test.
        groups: of :func:`splits_of`.
        files: names of the files that are there, by name and by name without ending.

    Returns:
        Entries as LAVIS reads them; names of which ``files`` has none, and names without a text, both left out.
    """
    benchmark = BENCHMARKS[name]
    made: Entries = []
    missing, silent = [], []
    for key, rows in groups.items():
        names = [row.item for row in rows]
        file = benchmark.file(key, names[0])
        if files is not None:
            found = next((files[one] for one in (*names, key) if one in files), None)
            if found is None:
                missing.append(names[0])
                continue
            file = found
        texts = [text for row in rows for text in row.texts]
        if name == "msrvtt_qa":
            for row in rows:
                asked = {"question": row.question, "answer": row.answer, "question_id": row.number}
                made.append({"video": file, **asked})
        elif not texts:
            silent.append(names[0])
        elif part == "train":
            number = {"image_id": f"{name}_{key}"} if benchmark.media == "image" else {}
            texts = [" ".join(texts)] if benchmark.paragraphs else texts
            made += [{benchmark.media: file, "caption": text, **number} for text in texts]
        else:
            made.append({benchmark.media: file, "caption": [" ".join(texts)] if benchmark.paragraphs else texts})
    if name == "msrvtt_qa" and len({entry["question_id"] for entry in made}) < len(made):
        made = [{**entry, "question_id": i} for i, entry in enumerate(made)]
    return made, missing, silent


def advice(path: str, split: str, dataset: str) -> str:
    """What to type where LAVIS cannot read a dataset's file that the converter can; else nothing."""
    try:
        found = read_annotations(Path(path))
        name = DATASETS.get(dataset, "")
        own = name.startswith("own")
        whole = found.layout.kind == "whole" and not own
        if not name or not (own or whole or benchmark_of(found) == name):
            return ""
        named = all(BENCHMARKS[name].key(row.item, found.path) for row in found.rows)  # or it raises
        if not (named and whole or _would_pass(name, split, found)):
            return ""
    except (AuroraError, KeyError):
        return ""
    command = shlex.join([*COMMAND.split(), name, path if whole else f"{split}={path}"])
    return f"; `{command}` makes a file of it that LAVIS reads (docs/data.md)"


def _would_pass(name: str, split: str, found: Annotations) -> bool:
    """Whether the entries made of a file are others than it holds, and such as a run takes."""
    made, _, silent = entries_of(name, split, splits_of(name, [(split, found)])[split])
    items = {os.path.normpath(entry[BENCHMARKS[name].media]) for entry in made}
    twice = split != "train" and name != "msrvtt_qa" and len(items) < len(made)
    if not made or silent or twice or not all(has_words(entry.get("question", "a")) for entry in made):
        return False
    try:
        held = read_json(found.path)
    except AuroraError:
        return True
    same = isinstance(held, list) and len(held) == len(made)
    return not same or any(not entry.items() <= before.items() for entry, before in zip(made, held))


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
        AuroraError: a file has another format, or they hold different questions (the
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
    for path, form in zip(files[2:], (QUESTIONS, TRUE_ANSWERS)):
        official = _read_official(path, key, form)
        if official != ids:
            some = next(iter(official ^ ids))
            raise AuroraError(
                f"{key}: {path} and {files[0]} must hold the same questions; {shown(some)} is in one of them only"
            )
