"""Annotations as their authors publish them, turned into the json that LAVIS reads.

    python -m lavis_aurora.data.convert msrvtt train_val_videodatainfo.json test_videodatainfo.json \\
        --split 9k --test-csv MSRVTT_JSFUSION_test.csv
    python -m lavis_aurora.data.convert didemo FOLDER_OF_TRAIN_VAL_TEST_DATA_JSON --videos didemo/videos
    python -m lavis_aurora.data.convert karpathy dataset_coco.json

Numbers of pictures and videos are compared with the published splits, :data:`PUBLISHED`, before anything is written;
empty sentences are left out.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lavis_aurora.errors import AuroraError, near_names
from lavis_aurora.paths import data_root

Entries = list[dict[str, Any]]
SHOWN = 5


class Published(NamedTuple):
    """A split as published: numbers of pictures or videos, where they are stated, and files as LAVIS names them."""

    counts: dict[str, int]
    source: str
    files: str  # below the data root, with {} for train, val and test


_EXPERTS = "github.com/albanie/collaborative-experts, misc/datasets"
_MSRVTT = "msrvtt/annotations/retrieval_{}.json"
PUBLISHED = {
    # Xu et al., CVPR 2016.
    "msrvtt full": Published({"train": 6513, "val": 497, "test": 2990}, f"{_EXPERTS}/msrvtt/README.md", _MSRVTT),
    # Train and val of the authors together; the 1k-A test of Yu et al. (JSFusion, ECCV 2018).
    "msrvtt 7k": Published({"train": 7010, "test": 1000}, "github.com/danieljf24/hybrid_space, dataset", _MSRVTT),
    # All but that test, as since Gabeur et al. (MMT, ECCV 2020).
    "msrvtt 9k": Published({"train": 9000, "test": 1000}, f"{_EXPERTS}/msrvtt/README.md", _MSRVTT),
    # Hendricks et al., ICCV 2017.
    "didemo": Published(
        {"train": 8395, "val": 1065, "test": 1004},
        f"{_EXPERTS}/didemo/README.md",
        "didemo/annotations/retrieval_{}.json",
    ),
    # Karpathy and Li, CVPR 2015; train is train (82,783) and restval (30,504).
    "coco": Published(
        {"train": 82783 + 30504, "val": 5000, "test": 5000},
        "tensorflow.org/datasets/catalog/coco_captions",
        "coco/annotations/coco_karpathy_{}.json",
    ),
    "flickr30k": Published(
        {"train": 29000, "val": 1014, "test": 1000},
        "huggingface.co/datasets/umaru97/flickr30k_train_val_test",
        "flickr30k/annotations/{}.json",
    ),
}


def read_file(path: Path) -> Any:
    """What a json file holds."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise AuroraError(f"{path} is not readable json ({error})") from error


def _get(item: Any, key: str, path: Path, what: str) -> Any:
    if not isinstance(item, dict) or key not in item:
        near = near_names(key, map(str, item)) if isinstance(item, dict) and item else ""
        raise AuroraError(f"{path}: {what} has no {key!r}{near}")
    return item[key]


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
        content = read_file(path)
        for i, video in enumerate(_get(content, "videos", path, "the file")):
            parts[_get(video, "video_id", path, f"video {i}")] = _get(video, "split", path, f"video {i}")
        for i, sentence in enumerate(_get(content, "sentences", path, "the file")):
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
        with path.open(encoding="utf-8", newline="") as file:
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
        for i, item in enumerate(read_file(path)):
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
    content = read_file(path)
    name = _get(content, "dataset", path, "the file")
    if name not in ("coco", "flickr30k"):
        raise AuroraError(f"{path}: holds {name!r}; known: coco, flickr30k")
    parts: dict[str, Entries] = {"train": [], "val": [], "test": []}
    for i, image in enumerate(_get(content, "images", path, "the file")):
        what = f"image {i}"
        # LAVIS's scripts put the pictures there.
        folder = _get(image, "filepath", path, what) if name == "coco" else "flickr30k-images"
        file = f"{folder}/{_get(image, 'filename', path, what)}"
        texts = [_get(sentence, "raw", path, what) for sentence in _get(image, "sentences", path, what)]
        texts = [text for text in texts if text.strip()]
        part = _get(image, "split", path, what)
        part = "train" if part == "restval" else part
        if part not in parts:
            raise AuroraError(f"{path}: the split of {what} is {part!r}{near_names(str(part), parts)}")
        if part == "train":
            number = image.get("cocoid", image.get("imgid", i))
            parts[part] += [{"image": file, "caption": text, "image_id": f"{name}_{number}"} for text in texts]
        elif texts:
            parts[part].append({"image": file, "caption": texts})
    return name, parts


def check_counts(name: str, entries: dict[str, Entries], allow_partial: bool) -> list[str]:
    """Compare numbers of pictures or videos with the published ones.

    Returns:
        A line on each split.

    Raises:
        AuroraError: a split is empty, or its number differs and ``allow_partial`` is not set.
    """
    published = PUBLISHED[name]
    lines, wrong = [], []
    for part, samples in entries.items():
        items = len({sample.get("video", sample.get("image")) for sample in samples})
        texts = sum(1 if isinstance(sample["caption"], str) else len(sample["caption"]) for sample in samples)
        expected = published.counts.get(part)
        lines.append(f"{part}: {items} with {texts} texts" + ("" if expected else ", those of test"))
        if not items:
            raise AuroraError(f"{name}: the {part} split is empty; check that all annotation files are given")
        if expected and items != expected:
            wrong.append(f"{part} has {items}, not {expected}")
    if wrong and not allow_partial:
        raise AuroraError(
            f"{name}: {'; '.join(wrong)} ({published.source}); results would not compare with published "
            f"ones: complete the files, or give --allow-partial to go on with these"
        )
    return lines + [f"not the published split: {line}" for line in wrong]


def write_entries(files: dict[Path, Entries]) -> None:
    """Write all files or none."""
    partial = {path: path.with_name(path.name + ".partial") for path in files}
    try:
        for path, entries in files.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            partial[path].write_text(json.dumps(entries), encoding="utf-8")
        for path in files:
            os.replace(partial[path], path)
    except OSError as error:
        raise AuroraError(
            f"--output: cannot write {error.filename} ({error.strerror}); name another folder"
        ) from error
    finally:
        for path in partial.values():
            path.unlink(missing_ok=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="convert", description="Published annotations to the json that LAVIS reads."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("msrvtt", help="MSR-VTT's videodatainfo json")
    one.add_argument("annotations", nargs="+", type=Path, help="train_val_videodatainfo.json test_videodatainfo.json")
    one.add_argument("--split", choices=("9k", "7k", "full"), default="9k", help="9k (the default), 7k: 1k-A test")
    one.add_argument("--test-csv", type=Path, help="MSRVTT_JSFUSION_test.csv, the 1k-A test")
    two = commands.add_parser("didemo", help="DiDeMo's train_data.json, val_data.json, test_data.json")
    two.add_argument("annotations", type=Path, help="folder of the three files")
    two.add_argument("--videos", type=Path, help="folder of the videos: finds names and missing ones")
    three = commands.add_parser("karpathy", help="dataset_coco.json or dataset_flickr30k.json")
    three.add_argument("annotations", type=Path, help="the file")
    for command in (one, two, three):
        command.add_argument("--output", type=Path, help="folder of the json files; where the YAMLs look by default")
        command.add_argument("--allow-partial", action="store_true", help="go on with other numbers than published")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """``python -m lavis_aurora.data.convert msrvtt|didemo|karpathy ...``.

    Raises:
        AuroraError: a file cannot be used, or its numbers are not the published ones; nothing is written then.
    """
    args = _parser().parse_args(argv)
    missing: list[str] = []
    if args.command == "msrvtt":
        name, entries = f"msrvtt {args.split}", msrvtt(args.annotations, args.split, args.test_csv)
    elif args.command == "didemo":
        name = "didemo"
        entries, missing = didemo(args.annotations, args.videos)
    else:
        name, entries = karpathy(args.annotations)
    if missing:
        shown = ", ".join(missing[:SHOWN]) + (f" and {len(missing) - SHOWN} more" if len(missing) > SHOWN else "")
        said = f"{len(missing)} videos are not in {args.videos}: {shown}"
        if not args.allow_partial:
            raise AuroraError(f"{said}; fetch them, or give --allow-partial to leave them out")
        print(f"left out: {said}")
    lines = check_counts(name, entries, args.allow_partial)
    pattern = PUBLISHED[name].files
    folder = args.output or (data_root() / pattern).parent
    files = {folder / Path(pattern.format(part)).name: samples for part, samples in entries.items()}
    write_entries(files)
    print(f"{name}: {folder}")
    for line in lines:
        print(f"  {line}")


if __name__ == "__main__":
    try:
        main()
    except AuroraError as error:
        sys.exit(f"error: {error}")
