"""Check annotation files before LAVIS reads them, so that errors name file and entry."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Collection, Mapping, Sequence
from itertools import groupby
from operator import attrgetter
from typing import Any

from lavis.common.registry import registry
from lavis.common.utils import get_cache_path
from lavis.datasets.builders.base_dataset_builder import BaseDatasetBuilder
from omegaconf import DictConfig, OmegaConf

from lavis_aurora.common.errors import AuroraError, abbreviated, did_you_mean, shown
from lavis_aurora.common.files import read_json
from lavis_aurora.config.dataset_keys import DATA_KINDS, SPLITS, named_splits
from lavis_aurora.data.checks import FILE, NUMBER_OR_TEXT, DatasetChecks, Rule, checks_of
from lavis_aurora.data.fetch import REMEDY, annotation_files, fetch, use_data_root
from lavis_aurora.data.raw import advice
from lavis_aurora.data.samples import CheckedDataset, ResamplingDataset


def read_entries(path: str, key: str) -> list[dict[str, Any]]:
    """The entries of an annotation file, one for each sample."""
    entries = read_json(path, key)
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise AuroraError(f"{key}: {path} must hold a list of entries, one for each sample")
    if not entries:
        raise AuroraError(f"{key}: {path} is empty; a split needs at least one sample")
    return entries


def check_entries(entries: list[dict[str, Any]], rules: Mapping[str, Rule], path: str, key: str) -> None:
    """Refuse entries that LAVIS's dataset class would misread.

    Raises:
        AuroraError: a key is missing, or a value is of the wrong kind (LAVIS would silently split a string in place
            of a list into letters).
    """
    for i, entry in enumerate(entries):
        for name, rule in rules.items():
            if name not in entry:
                names = abbreviated(map(shown, entry), 10)
                raise AuroraError(f"{key}: entry {i} of {path} has no {name!r}; it has {names}")
            if not rule.holds(entry[name]):
                each = entry[name] if isinstance(entry[name], list) else [entry[name]]
                numbers = (one for one in each if type(one) in (int, float) and math.isfinite(one))
                # Paths and ids are no texts, of which a file may hold the number.
                number = None if rule in (FILE, NUMBER_OR_TEXT) else next(numbers, None)
                quotes = "" if number is None else f'; put numbers in quotes, "{number}"'
                raise AuroraError(
                    f"{key}: the {name} of entry {i} of {path} must be {rule.need}, not {shown(entry[name])}{quotes}"
                )


def check_unique(entries: list[dict[str, Any]], name: str, path: str, key: str) -> None:
    """Refuse entries that share what tells them apart: of a picture that is to be ranked twice, each caption would
    have one right entry only; of a question_id, one answer would count for several questions."""
    is_file = name in ("image", "video")
    first: dict[Any, int] = {}
    for i, entry in enumerate(entries):
        before = first.setdefault(os.path.normpath(entry[name]) if is_file else entry[name], i)  # ./0.png is 0.png
        if before != i:
            remedy = "make them one entry with all captions" if is_file else "give each its own"
            raise AuroraError(
                f"{key}: entries {before} and {i} of {path} have the same {name}, {shown(entry[name])}; {remedy}"
            )


def check_split(files: Sequence[str], checks: Sequence[DatasetChecks], split: str, key: str) -> None:
    """Check all annotation files of a split as the dataset's checks say."""
    for path in files:
        if not os.path.isfile(path):
            example = next((one.example for one in checks if one.example), None)
            hint = f"; it must hold a list of entries such as {json.dumps(example)}" if example else ""
            raise AuroraError(f"{key}: {path} is missing; {REMEDY}{hint}")
    first_only = any(one.answers_follow for one in checks)
    first = None
    for path in files[:1] if first_only else files:
        try:
            entries = read_entries(path, key)
            first = first or entries
            for one in checks:
                check_entries(entries, one.entries, path, key)
                if one.unique:
                    check_unique(entries, one.unique, path, key)
                one.check_entries(entries, split, path, key)
        except AuroraError as error:
            raise AuroraError(f"{error}{advice(path, split, ''.join(key.split('.')[1:2]))}") from error
    for one in checks:
        one.check_files(first or [], files, key)


def build_checked(name: str, cfg: DictConfig, splits: Collection[str] = SPLITS) -> dict[str, CheckedDataset]:
    """Build LAVIS's dataset ``name``; its annotation files are checked, its samples name their files.

    Args:
        name: registered name of the builder.
        cfg: its part of the YAML; a split that is null there is left out.
        splits: to build; files of the others are neither needed nor fetched.

    Returns:
        Datasets by split.
    """
    use_data_root()
    prefix = f"datasets.{name}"
    data_type, info = cfg.get("data_type"), cfg.get("build_info") or {}
    kinds = [key for key in DATA_KINDS if key in info]
    if data_type not in info:
        raise AuroraError(
            f"{prefix}.data_type: {shown(data_type)} is no part of build_info{did_you_mean(str(data_type), kinds)}"
        )
    for part in ("annotations", data_type):
        if not info.get(part):
            raise AuroraError(f"{prefix}.build_info.{part}: the section is missing")
    if not info[data_type].get("storage"):
        raise AuroraError(f"{prefix}.build_info.{data_type}.storage: missing; name the folder")
    # Resolved, as what is left out may be referred to.
    cfg = OmegaConf.create(OmegaConf.to_container(cfg, resolve=True))
    files_of = cfg.build_info.annotations
    for split in [one for one in files_of if files_of[one] is None or (one in SPLITS and one not in splits)]:
        del files_of[split]
    if not named_splits(cfg):
        return {}
    builder: BaseDatasetBuilder = registry.get_builder_class(name)(cfg)
    files = annotation_files(name, cfg)
    fetch(builder, name, cfg, files)
    # What a builder reads besides the splits, it checks itself.
    for (split, key), group in groupby((f for f in files if f.split in SPLITS), key=attrgetter("split", "key")):
        cls = builder.train_dataset_cls if split == "train" else builder.eval_dataset_cls
        check_split([file.path for file in group], list(checks_of(name, data_type, cls)), split, key)
    datasets = builder.build()
    vis_root = get_cache_path(cfg.build_info[cfg.data_type].storage)
    if not os.path.isdir(vis_root):
        key = f"datasets.{name}.build_info.{cfg.data_type}.storage"
        raise AuroraError(f"{key}: no such folder: {vis_root}; {REMEDY}")
    checked = {split: CheckedDataset(dataset, f"{name} {split}") for split, dataset in datasets.items()}
    if "train" in datasets and data_type == "videos":
        checked["train"] = ResamplingDataset(datasets["train"], f"{name} train")
    return checked
