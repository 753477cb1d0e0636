"""Check annotation files before LAVIS reads them, so that errors name file and entry."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable
from itertools import groupby
from operator import attrgetter
from typing import Any, NamedTuple

from lavis.common.registry import registry
from lavis.common.utils import get_cache_path
from lavis.datasets.builders.base_dataset_builder import BaseDatasetBuilder
from lavis.datasets.datasets import retrieval_datasets as retrieval
from lavis.datasets.datasets.coco_vqa_datasets import COCOVQADataset, COCOVQAEvalDataset
from lavis.datasets.datasets.gqa_datasets import GQADataset, GQAEvalDataset
from lavis.datasets.datasets.vg_vqa_datasets import VGVQADataset
from lavis.datasets.datasets.video_vqa_datasets import VideoQADataset
from lavis.datasets.datasets.vqa_datasets import VQAEvalDataset
from omegaconf import DictConfig
from torch.utils.data import Dataset

from lavis_aurora.common.errors import AuroraError, near_names, shown, some
from lavis_aurora.common.files import read_json
from lavis_aurora.config.dataset_keys import DATA_KINDS, SPLITS
from lavis_aurora.data.fetch import REMEDY, annotation_files, fetch, use_data_root
from lavis_aurora.data.raw import check_answers, check_vqa_files
from lavis_aurora.data.samples import CheckedDataset, ReplacingDataset


class Rule(NamedTuple):
    """What a value must be, and how to say so."""

    holds: Callable[[Any], bool]
    need: str


def _text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _texts(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(map(_text, value))


TEXT = Rule(_text, "one string, not empty")
TEXTS = Rule(_texts, 'a list of strings, none empty, e.g. ["a cat"]')
# Of a question, LAVIS's processor drops these.
QUESTION = Rule(lambda value: isinstance(value, str) and bool(value.strip(' .!"()*#:;~')), "a string with words")
# A list, null or NaN in its place would be no key, or the same one for all samples.
NUMBER_OR_TEXT = Rule(
    lambda value: isinstance(value, str) or type(value) is int and abs(value) < 2**63, "a whole number or a string"
)
FILE = Rule(_text, "the path of one file, a string")

# Keys that LAVIS's datasets read from each entry, and what they would misread.
ENTRIES: dict[type, dict[str, Rule]] = {
    retrieval.RetrievalDataset: {"image": FILE, "caption": TEXT, "image_id": NUMBER_OR_TEXT},
    retrieval.RetrievalEvalDataset: {"image": FILE, "caption": TEXTS},
    retrieval.VideoRetrievalDataset: {"video": FILE, "caption": TEXT},
    retrieval.VideoRetrievalEvalDataset: {"video": FILE, "caption": TEXTS},
    COCOVQADataset: {"image": FILE, "question": QUESTION, "answer": TEXTS},
    VGVQADataset: {"image": FILE, "question": QUESTION, "answer": TEXT},
    VideoQADataset: {"video": FILE, "question": QUESTION, "answer": TEXT, "question_id": NUMBER_OR_TEXT},
    COCOVQAEvalDataset: {"image": FILE, "question": QUESTION, "question_id": NUMBER_OR_TEXT},
    GQADataset: {"image": FILE, "question": QUESTION, "answer": TEXT},
    GQAEvalDataset: {"image": FILE, "question": QUESTION, "answer": TEXT, "question_id": NUMBER_OR_TEXT},
}
# What to write where a file is missing.
SAMPLES: dict[type, dict[str, Any]] = {
    retrieval.RetrievalDataset: {"image": "beach/1.jpg", "caption": "two dogs on a beach", "image_id": 1},
    retrieval.RetrievalEvalDataset: {"image": "beach/2.jpg", "caption": ["a dog in the sand", "a dog sleeps"]},
    retrieval.VideoRetrievalDataset: {"video": "beach/1.mp4", "caption": "two dogs run along a beach"},
    retrieval.VideoRetrievalEvalDataset: {"video": "beach/2.mp4", "caption": ["a dog digs", "a dog in the sand"]},
    GQADataset: {"image": "beach/1.jpg", "question": "how many dogs are there?", "answer": "two"},
    GQAEvalDataset: {"image": "beach/2.jpg", "question": "what lies here?", "answer": "a dog", "question_id": 1},
}
# Checks of the files of a split behind the first, where they are no further entries.
FURTHER_FILES: dict[type, Callable[[list[dict], list[str], str], None]] = {COCOVQAEvalDataset: check_vqa_files}
# Datasets in which each picture or video must have one entry.
RANKED = (retrieval.RetrievalEvalDataset, retrieval.VideoRetrievalEvalDataset)
# Retrieved by one paragraph for each video.
PARAGRAPHS = ("didemo_retrieval",)


def read_entries(path: str, key: str) -> list[dict]:
    """The entries of an annotation file, one for each sample."""
    entries = read_json(path, key)
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise AuroraError(f"{key}: {path} must hold a list of entries, one for each sample")
    if not entries:
        raise AuroraError(f"{key}: {path} is empty; a split needs at least one sample")
    return entries


def _sample(dataset_cls: type) -> str:
    """What a file for this class holds, by an example; nothing for one of which none is known."""
    entry = next((SAMPLES[cls] for cls in dataset_cls.__mro__ if cls in SAMPLES), None)
    return f"; it must hold a list of entries such as {json.dumps(entry)}" if entry else ""


def check_entries(entries: list[dict], dataset_cls: type, path: str, key: str) -> None:
    """Refuse entries that LAVIS's dataset class would misread.

    Raises:
        AuroraError: a key is missing, or a value is of the wrong kind (LAVIS would silently split a string in place
            of a list into letters).
    """
    rules = next((ENTRIES[cls] for cls in dataset_cls.__mro__ if cls in ENTRIES), {})
    for i, entry in enumerate(entries):
        for name, rule in rules.items():
            if name not in entry:
                raise AuroraError(f"{key}: entry {i} of {path} has no {name!r}; it has {some(map(shown, entry), 10)}")
            if not rule.holds(entry[name]):
                raise AuroraError(
                    f"{key}: the {name} of entry {i} of {path} must be {rule.need}, not {shown(entry[name])}"
                )


def check_paragraphs(entries: list[dict], path: str, key: str) -> None:
    """Refuse several captions of a video where all of its descriptions make one (paper, appendix C: DiDeMo)."""
    for i, entry in enumerate(entries):
        if len(entry["caption"]) > 1:
            raise AuroraError(
                f"{key}: entry {i} of {path} has {len(entry['caption'])} captions; for paragraph-to-video "
                f"retrieval they are one, as python -m lavis_aurora.data.convert didemo joins them"
            )


def check_unique(entries: list[dict], dataset_cls: type, path: str, key: str) -> None:
    """Refuse a picture or video that is to be ranked twice: each of its captions would have one right entry only."""
    if not issubclass(dataset_cls, RANKED):
        return
    kind = "video" if issubclass(dataset_cls, retrieval.VideoRetrievalEvalDataset) else "image"
    first: dict[Any, int] = {}
    for i, entry in enumerate(entries):
        before = first.setdefault(entry[kind], i)
        if before != i:
            raise AuroraError(
                f"{key}: entries {before} and {i} of {path} have the same {kind}, {shown(entry[kind])}; make them "
                f"one entry with all captions"
            )


def check_split(files: list[str], dataset_cls: type, key: str, paragraphs: bool = False) -> None:
    """Check all annotation files of a split; see :func:`check_entries`, and :func:`check_paragraphs` if asked for."""
    for path in files:
        if not os.path.isfile(path):
            raise AuroraError(f"{key}: {path} is missing; {REMEDY}{_sample(dataset_cls)}")
    further = FURTHER_FILES.get(dataset_cls)
    # Behind the questions to evaluate stands the list of answers, and VQAv2's own files.
    asked = issubclass(dataset_cls, VQAEvalDataset)
    for path in files[1:2] if asked else ():
        check_answers(path, key)
    for path in files[:1] if asked else files:
        entries = read_entries(path, key)
        check_entries(entries, dataset_cls, path, key)
        check_unique(entries, dataset_cls, path, key)
        if paragraphs:
            check_paragraphs(entries, path, key)
        if further:
            further(entries, files, key)


def build_checked(name: str, cfg: DictConfig) -> dict[str, Dataset]:
    """Build LAVIS's dataset ``name``; its annotation files are checked, its samples name their files.

    Args:
        name: registered name of the builder.
        cfg: its part of the YAML; a split that is null there is left out.

    Returns:
        Datasets by split.
    """
    use_data_root()
    prefix = f"datasets.{name}"
    data_type, info = cfg.get("data_type"), cfg.get("build_info") or {}
    kinds = [key for key in DATA_KINDS if key in info]
    if data_type not in info:
        raise AuroraError(
            f"{prefix}.data_type: {shown(data_type)} is no part of build_info{near_names(str(data_type), kinds)}"
        )
    for part in ("annotations", data_type):
        if not info.get(part):
            raise AuroraError(f"{prefix}.build_info.{part}: the section is missing")
    if not info[data_type].get("storage"):
        raise AuroraError(f"{prefix}.build_info.{data_type}.storage: missing; name the folder")
    cfg = copy.deepcopy(cfg)
    for split in [split for split, files in cfg.build_info.annotations.items() if files is None]:
        del cfg.build_info.annotations[split]
    builder: BaseDatasetBuilder = registry.get_builder_class(name)(cfg)
    files = annotation_files(name, cfg)
    fetch(builder, name, cfg, files)
    # What a builder reads besides the splits, it checks itself.
    for (split, key), group in groupby((f for f in files if f.split in SPLITS), key=attrgetter("split", "key")):
        cls = builder.train_dataset_cls if split == "train" else builder.eval_dataset_cls
        check_split([file.path for file in group], cls, key, paragraphs=name in PARAGRAPHS and split != "train")
    datasets = builder.build()
    vis_root = get_cache_path(cfg.build_info[cfg.data_type].storage)
    if not os.path.isdir(vis_root):
        key = f"datasets.{name}.build_info.{cfg.data_type}.storage"
        raise AuroraError(f"{key}: no such folder: {vis_root}; {REMEDY}")
    checked = {split: CheckedDataset(dataset, f"{name} {split}") for split, dataset in datasets.items()}
    if "train" in datasets and data_type == "videos":
        checked["train"] = ReplacingDataset(datasets["train"], f"{name} train")
    return checked
