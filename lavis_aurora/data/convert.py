"""Annotations as they are published, in any of the usual layouts, turned into the json that LAVIS reads.

    python -m lavis_aurora.data.convert msrvtt train_val_videodatainfo.json test_videodatainfo.json \\
        --split 9k --test-csv MSRVTT_JSFUSION_test.csv
    python -m lavis_aurora.data.convert didemo FOLDER_OF_TRAIN_VAL_TEST_DATA_JSON --videos didemo/videos
    python -m lavis_aurora.data.convert auto FILE ...

Numbers of pictures, videos and questions are compared with the published splits, :data:`PUBLISHED`, before anything
is written; empty sentences are left out. A file that is there already stays, unless ``--overwrite`` is given.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

from lavis_aurora.common.errors import AuroraError, abbreviated
from lavis_aurora.common.files import atomic_write, use_utf8, writing
from lavis_aurora.common.media import VIDEO_ENDINGS
from lavis_aurora.common.paths import data_root
from lavis_aurora.data.layouts import Annotations, read_annotations
from lavis_aurora.data.raw import BENCHMARKS, PARTS, Entries, benchmark_of, entries_of, splits_of

SHOWN = 5
# Of videos; DiDeMo's names may end in a dot.
ENDINGS = {"", *VIDEO_ENDINGS}


class Published(NamedTuple):
    """A split as published: numbers of pictures or videos, where they are stated, and files as LAVIS names them."""

    counts: dict[str, int]
    source: str
    files: str  # below the data root, with {} for train, val and test
    questions: dict[str, int] = {}


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
    # Xu et al., ACM MM 2017: the videos of MSR-VTT's own splits, and their questions.
    "msrvtt_qa": Published(
        {"train": 6513, "val": 497, "test": 2990},
        "github.com/xudejing/video-question-answering",
        "msrvtt/annotations/qa_{}.json",
        {"train": 158_581, "val": 12_278, "test": 72_821},
    ),
    "flickr30k": Published(
        {"train": 29000, "val": 1014, "test": 1000},
        "huggingface.co/datasets/umaru97/flickr30k_train_val_test",
        "flickr30k/annotations/{}.json",
    ),
    "own": Published({}, "", "own/annotations/{}.json"),
    "own_video": Published({}, "", "own/annotations/video_{}.json"),
}
ANSWERS = 1500  # the most frequent of train, which LAVIS and ALPRO rank


def check_counts(name: str, entries: dict[str, Entries], allow_partial: bool) -> list[str]:
    """Compare numbers of pictures or videos, and of questions, with the published ones.

    Returns:
        A line on each split.

    Raises:
        AuroraError: a number differs and ``allow_partial`` is not set.
    """
    published = PUBLISHED[name]
    lines, wrong, numbers = [], [], {}
    for part in PARTS:
        if part not in entries:
            lines.append(f"{part}: no file of it was given, none is written")
            continue
        samples = entries[part]
        items = numbers[part] = len({sample.get("video", sample.get("image")) for sample in samples})
        texts = sum(len(s["caption"]) if isinstance(s.get("caption"), list) else 1 for s in samples)
        same = part == "val" and samples == entries.get("test")
        what = "questions" if name == "msrvtt_qa" else "texts"
        lines.append(f"{part}: {items} with {texts} {what}" + (", those of test" if same else ""))
        for found, stated, of in ((items, published.counts, ""), (texts, published.questions, " questions")):
            if part in stated and found != stated[part]:
                wrong.append(f"{part} has {found}{of}, not {stated[part]}")
        if name in ("msrvtt 9k", "msrvtt 7k") and part == "test" and texts != items:
            wrong.append(f"test has {texts} sentences, not one of each video, as MSRVTT_JSFUSION_test.csv has")
    if wrong and not allow_partial:
        other = [split for split in ("7k", "full") if numbers.items() >= PUBLISHED[f"msrvtt {split}"].counts.items()]
        hint = f"give --split {other[0]}, whose numbers these are" if other else "complete the files"
        raise AuroraError(
            f"{name}: {'; '.join(wrong)} ({published.source}); results would not compare with published "
            f"ones: {hint}, or give --allow-partial to go on with these"
        )
    return lines + [f"not the published split: {line}" for line in wrong]


def write_files(files: Mapping[Path, Any], overwrite: bool) -> list[str]:
    """Write all files as json, or none.

    Returns:
        The names of those that held something else before.

    Raises:
        AuroraError: one cannot be written; or holds something else already, unless it is to be overwritten.
    """
    contents = {path: json.dumps(content).encode() for path, content in files.items()}
    there = [path for path, content in contents.items() if path.exists() and path.read_bytes() != content]
    if there and not overwrite:
        raise AuroraError(
            f"{there[0]} is there already and holds something else; move it away, give another --output, or "
            f"--overwrite to replace {abbreviated([path.name for path in there])}"
        )
    with ExitStack() as stack:
        for path, content in contents.items():
            with writing(path):
                path.parent.mkdir(parents=True, exist_ok=True)
            stack.enter_context(atomic_write(path)).write(content)
    return [path.name for path in there]


COMMANDS = {
    "msrvtt": "MSR-VTT, captions",
    "msrvtt_qa": "MSRVTT-QA",
    "didemo": "DiDeMo; or the folder of its train_data.json, val_data.json, test_data.json",
    "coco": "COCO captions, Karpathy's split",
    "flickr30k": "Flickr30K, Karpathy's split",
    "karpathy": "dataset_coco.json or dataset_flickr30k.json",
    "own": "own pictures with captions",
    "own_video": "own videos with captions",
    "auto": "whichever of these it is",
}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="convert", description="Published annotations to the json that LAVIS reads; docs/data.md lists formats."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name, what in COMMANDS.items():
        command = commands.add_parser(name, help=what)
        command.set_defaults(split="", test_csv=None, videos=None)
        files = "train=FILE, val=FILE, test=FILE where its name does not say the split"
        command.add_argument("annotations", nargs="+", metavar="FILE", help=files)
        if name in ("msrvtt", "auto"):
            splits = ("9k", "7k", "full")
            command.add_argument("--split", choices=splits, default="9k", help="9k (the default), 7k: 1k-A test")
            command.add_argument("--test-csv", help="MSRVTT_JSFUSION_test.csv, the 1k-A test")
        if name in ("didemo", "own_video", "auto"):
            command.add_argument("--videos", type=Path, help="folder of the videos: finds names and missing ones")
        command.add_argument("--output", type=Path, help="folder of the json files; where the YAMLs look by default")
        command.add_argument("--allow-partial", action="store_true", help="go on with other numbers than published")
        command.add_argument("--overwrite", action="store_true", help="replace files that are there already")
    return parser


def _sources(args: argparse.Namespace) -> list[tuple[str, Annotations]]:
    """The files, each with the split that the command line gives it."""
    named = [*args.annotations, *([f"test={args.test_csv}"] if args.test_csv and args.split != "full" else [])]
    sources = []
    for argument in named:
        given = re.fullmatch(r"(train|val|test)=(.+)", argument, re.DOTALL)
        path = Path(given[2] if given else argument)
        files = [file for part in PARTS if (file := path / f"{part}_data.json").exists()] if path.is_dir() else [path]
        if not files:
            raise AuroraError(f"{path}: a folder without train_data.json, val_data.json, test_data.json; name files")
        sources += [(given[1] if given else "", read_annotations(file)) for file in files]
    return sources


def _name(command: str, sources: Sequence[tuple[str, Annotations]]) -> str:
    """The benchmark; which it is, is said of each file where it was not told."""
    if command not in ("auto", "karpathy"):
        return command
    names = {}
    for _, found in sources:
        if name := benchmark_of(found):
            names[name] = found.path
        if command == "auto":
            print(f"{found.path}: {found.layout.name}, {len(found.rows)} entries, {name or 'of no benchmark'}")
    if len(names) != 1:
        which = "of no benchmark" if not names else f"of several benchmarks, {', '.join(names)}"
        known = ", ".join(BENCHMARKS)
        raise AuroraError(f"{sources[0][1].path}: files {which}; in place of {command} say of which: {known}")
    return next(iter(names))


def videos_in(folder: Path) -> dict[str, str]:
    """The names of the videos in a folder, by name and by name without ending.

    Raises:
        AuroraError: there is no such folder.
    """
    if not folder.is_dir():
        raise AuroraError(f"--videos: no such folder: {folder}")
    names = sorted(file.name for file in folder.iterdir() if file.suffix.lower() in ENDINGS and file.is_file())
    return {**{Path(name).stem: name for name in names}, **{name: name for name in names}}


def main(argv: Sequence[str] | None = None) -> None:
    """``python -m lavis_aurora.data.convert COMMAND FILE ...``.

    Raises:
        AuroraError: a file cannot be used, or its numbers are not the published ones; nothing is written then.
    """
    args = _parser().parse_args(argv)
    sources = _sources(args)
    name = _name(args.command, sources)
    protocol = args.split if name == "msrvtt" else ""
    files = videos_in(args.videos) if args.videos else None
    entries: dict[str, Entries] = {}
    missing: list[str] = []
    for part, groups in splits_of(name, sources, protocol).items():
        entries[part], lost, silent = entries_of(name, part, groups, files)
        missing += lost
        if silent:
            of = sorted({str(found.path) for _, found in sources for row in found.rows if row.item in silent})
            said = f"{len(silent)} {BENCHMARKS[name].media}s of {part} have no text: {abbreviated(silent)}"
            if not args.allow_partial or not entries[part]:
                remedy = ", or give --allow-partial to go on without" if entries[part] else "; none is left"
                raise AuroraError(f"{' and '.join(of)}: {said}; leave {'them' if silent[1:] else 'it'} out{remedy}")
            print(f"left out: {said}")
    if missing:
        said = f"{len(missing)} videos are not in {args.videos}: {abbreviated(missing, SHOWN)}"
        if not args.allow_partial:
            raise AuroraError(f"{said}; fetch them, or give --allow-partial to leave them out")
        print(f"left out: {said}")
    title = f"{name} {protocol}".rstrip()
    lines = check_counts(title, entries, args.allow_partial)
    pattern = PUBLISHED[title].files
    folder = args.output or (data_root() / pattern).parent
    written: dict[Path, Any] = {folder / Path(pattern.format(part)).name: made for part, made in entries.items()}
    if name == "msrvtt_qa" and "train" in entries:
        common = Counter(entry["answer"] for entry in entries["train"]).most_common(ANSWERS)
        written[folder / "qa_ans2label.json"] = {answer: i for i, (answer, _) in enumerate(common)}
    replaced = write_files(written, args.overwrite)
    print(f"{title}: {folder}")
    for line in lines + [f"replaced: {name}" for name in replaced]:
        print(f"  {line}")


if __name__ == "__main__":
    use_utf8()
    try:
        main()
    except AuroraError as error:
        sys.exit(f"error: {error}")
