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
import json
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

from lavis_aurora.common.errors import AuroraError, abbreviated
from lavis_aurora.common.files import atomic_write, writing
from lavis_aurora.common.paths import data_root
from lavis_aurora.data.raw import Entries, didemo, karpathy, msrvtt

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
    with ExitStack() as stack:
        for path, entries in files.items():
            with writing(path):
                path.parent.mkdir(parents=True, exist_ok=True)
            stack.enter_context(atomic_write(path)).write(json.dumps(entries).encode())


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
        said = f"{len(missing)} videos are not in {args.videos}: {abbreviated(missing, SHOWN)}"
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
