"""Check annotation files and samples before and while LAVIS reads them, so that errors name the file."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from typing import Any

from lavis.common.registry import registry
from lavis.common.utils import get_cache_path
from lavis.datasets.builders.base_dataset_builder import BaseDatasetBuilder
from lavis.datasets.datasets import retrieval_datasets as retrieval
from omegaconf import DictConfig
from torch.utils.data import Dataset

from lavis_aurora.errors import AuroraError, near_names

# Keys that LAVIS's datasets read from each entry.
REQUIRED: dict[type, tuple[str, ...]] = {
    retrieval.RetrievalDataset: ("image", "caption", "image_id"),
    retrieval.RetrievalEvalDataset: ("image", "caption"),
    retrieval.VideoRetrievalDataset: ("video", "caption"),
    retrieval.VideoRetrievalEvalDataset: ("video", "caption"),
}
EVALUATION = (retrieval.RetrievalEvalDataset, retrieval.VideoRetrievalEvalDataset)
REMEDY = "put it there, or set AURORA_DATA or the key to where it is"


class CheckedDataset(Dataset):
    """A LAVIS dataset whose unreadable samples raise an error that names the file."""

    def __init__(self, inner: Dataset, name: str) -> None:
        self.inner = inner
        self.name = name

    def __len__(self) -> int:
        return len(self.inner)

    def __getitem__(self, index: int) -> dict:
        try:
            return self.inner[index]
        except Exception as error:  # PIL, decord and the processors each have errors of their own
            entry = self.inner.annotation[index]
            file = os.path.join(self.inner.vis_root, str(entry.get("image", entry.get("video", "?"))))
            raise AuroraError(f"{self.name}: cannot read {file} ({type(error).__name__}: {error})") from error

    def __getattr__(self, name: str) -> Any:
        if name == "inner":  # not there yet while unpickling
            raise AttributeError(name)
        return getattr(self.inner, name)


def annotation_files(name: str, cfg: DictConfig) -> Iterator[tuple[str, str, str]]:
    """(split, YAML key, absolute path) of the annotation files of a dataset."""
    for split, info in cfg.build_info.annotations.items():
        part = f"datasets.{name}.build_info.annotations.{split}"
        key = f"{part}.storage"
        storage, urls = ([v] if isinstance(v, str) else v for v in (info.get("storage"), info.get("url")))
        if not storage:
            raise AuroraError(f"{key}: missing; name the annotation file")
        if urls and len(urls) != len(storage):
            raise AuroraError(f"{part}: {len(urls)} url, but {len(storage)} storage; give one of each for a file")
        for path in storage:
            yield split, key, path if os.path.isabs(path) else get_cache_path(path)


def _read(path: str, key: str) -> list[dict]:
    try:
        with open(path, encoding="utf-8") as file:
            entries = json.load(file)
    except (OSError, ValueError) as error:
        raise AuroraError(f"{key}: {path} is not readable json ({error})") from error
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise AuroraError(f"{key}: {path} must hold a list of entries, one for each sample")
    if not entries:
        raise AuroraError(f"{key}: {path} is empty; a split needs at least one sample")
    return entries


def check_entries(entries: list[dict], dataset_cls: type, path: str, key: str) -> None:
    """Refuse entries that LAVIS's dataset class would misread.

    Raises:
        AuroraError: a key is missing, or a caption is of the wrong kind (LAVIS would silently split a string into
            letters at evaluation).
    """
    for i, entry in enumerate(entries):
        for required in REQUIRED.get(dataset_cls, ()):
            if required not in entry:
                raise AuroraError(f"{key}: entry {i} of {path} has no {required!r}{near_names(required, entry)}")
        caption = entry.get("caption")
        if dataset_cls in EVALUATION:
            good = isinstance(caption, list) and caption and all(isinstance(c, str) for c in caption)
            need = 'a list of strings, e.g. ["a cat"]'
        else:
            good, need = isinstance(caption, str), "one string"
        if dataset_cls in REQUIRED and not good:
            raise AuroraError(f"{key}: the caption of entry {i} of {path} must be {need}, not {caption!r}")


def build_checked(name: str, cfg: DictConfig) -> dict[str, Dataset]:
    """Build LAVIS's dataset ``name``; its annotation files are checked, its samples name their files.

    Args:
        name: registered name of the builder.
        cfg: its part of the YAML.

    Returns:
        Datasets by split.
    """
    prefix = f"datasets.{name}"
    data_type, info = cfg.get("data_type"), cfg.get("build_info") or {}
    kinds = [key for key in ("images", "videos", "features") if key in info]
    if data_type not in info:
        raise AuroraError(
            f"{prefix}.data_type: {data_type!r} is no part of build_info{near_names(str(data_type), kinds)}"
        )
    for part in ("annotations", data_type):
        if not info.get(part):
            raise AuroraError(f"{prefix}.build_info.{part}: the section is missing")
    if not info[data_type].get("storage"):
        raise AuroraError(f"{prefix}.build_info.{data_type}.storage: missing; name the folder")
    builder: BaseDatasetBuilder = registry.get_builder_class(name)(cfg)
    files = list(annotation_files(name, cfg))
    missing = [(key, path) for _, key, path in files if not os.path.isfile(path)]
    for split, key, path in files if not missing else ():
        cls = builder.train_dataset_cls if split == "train" else builder.eval_dataset_cls
        check_entries(_read(path, key), cls, path, key)
    try:
        datasets = builder.build_datasets()
    except (OSError, TypeError, ValueError) as error:
        if missing and not isinstance(error, AuroraError):
            key, path = missing[0]
            raise AuroraError(f"{key}: {path} is missing and could not be fetched ({error}); {REMEDY}") from error
        raise
    vis_root = cfg.build_info[cfg.data_type].storage
    vis_root = vis_root if os.path.isabs(vis_root) else get_cache_path(vis_root)
    if not os.path.isdir(vis_root):
        key = f"datasets.{name}.build_info.{cfg.data_type}.storage"
        raise AuroraError(f"{key}: no such folder: {vis_root}; {REMEDY}")
    return {split: CheckedDataset(dataset, f"{name} {split}") for split, dataset in datasets.items()}
