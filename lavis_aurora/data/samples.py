"""Samples: errors name their files, and in training others stand in for broken videos."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from zlib import crc32

import torch
import torch.distributed as dist
from lavis.common.dist_utils import get_world_size, is_dist_avail_and_initialized, is_main_process
from PIL import Image
from torch.utils.data import Dataset

from lavis_aurora.common.errors import AuroraError, some
from lavis_aurora.data.frames import BrokenVideo

# PIL's modes of more than 8 bits a channel.
DEEP_MODES = ("I", "F", "I;16", "I;16B", "I;16L", "I;16N")
# Key of samples and batches: one text for each video that could not be read, with its path and the reason.
BROKEN = "broken"
# Key of samples where there are several training sets: which of them it is of.
SET = "dataset"
# Of as many videos in a row, one can be read unless something is wrong with all of them.
TRIES = 10
SHOWN = 10
# LAVIS counts the pictures of a dataset from 0; so many bits are left to that.
ID_BITS = 30


class CheckedDataset(Dataset):
    """A LAVIS dataset whose unreadable samples raise an error that names the file.

    Attributes:
        first_id: what is added to an ``image_id``, see :func:`set_ids_apart`; samples then name their dataset under
            :data:`SET`.
    """

    first_id = 0

    def __init__(self, inner: Dataset, name: str) -> None:
        self.inner = inner
        self.name = name

    def __len__(self) -> int:
        return len(self.inner)

    def __getitem__(self, index: int) -> dict:
        try:
            self._check_depth(index)
            sample = self.inner[index]
        except Exception as error:  # PIL, decord and the processors each have errors of their own
            raise AuroraError(
                f"{self.name}: cannot read {self.file(index)} ({type(error).__name__}: {error})"
            ) from error
        if not self.first_id:
            return sample
        sample = {**sample, SET: self.name}
        # Losses compare numbers; names are for messages.
        if not isinstance(sample.get("image_id", ""), str):
            sample["image_id"] = self.first_id + int(sample["image_id"])
        return sample

    def _check_depth(self, index: int) -> None:
        """Refuse pictures of more than 8 bits a channel, which PIL would turn white; a JPEG never has them."""
        path = os.path.join(self.inner.vis_root, str(self.inner.annotation[index].get("image", ".jpg")))
        # SNLI-VE's have no ending at all: LAVIS adds it.
        if not path.lower().endswith((".jpg", ".jpeg")) and os.path.isfile(path):
            with Image.open(path) as opened:
                if opened.mode in DEEP_MODES:
                    raise ValueError(f"its mode is {opened.mode}; convert it to 8 bits a channel")

    def file(self, index: int) -> str:
        """Path of the picture or video of a sample."""
        entry = self.inner.annotation[index]
        return os.path.join(self.inner.vis_root, str(entry.get("image", entry.get("video", "?"))))

    def __getattr__(self, name: str) -> Any:
        if name == "inner":  # not there yet while unpickling
            raise AttributeError(name)
        return getattr(self.inner, name)


class ReplacingDataset(CheckedDataset):
    """A LAVIS dataset of videos to train on: another sample, drawn at random, stands in for one that cannot be read.

    Samples name the videos that could not under :data:`BROKEN`.
    """

    def __getitem__(self, index: int) -> dict:
        broken: list[str] = []
        for _ in range(TRIES):
            try:
                return {**super().__getitem__(index), BROKEN: broken}
            except AuroraError as error:
                if not isinstance(error.__cause__, BrokenVideo):
                    raise
                broken.append(f"{self.file(index)} ({error.__cause__})")
            # Any other.
            index = (index + 1 + int(torch.randint(max(len(self) - 1, 1), ()))) % len(self)
        raise AuroraError(f"{self.name}: {TRIES} videos in a row cannot be read, the last {broken[-1]}")

    def collater(self, samples: list[dict]) -> dict:
        """LAVIS's, with the broken videos of all samples."""
        rest = [{key: value for key, value in sample.items() if key != BROKEN} for sample in samples]
        return {**self.inner.collater(rest), BROKEN: [text for sample in samples for text in sample[BROKEN]]}


def set_ids_apart(train: Mapping[str, CheckedDataset]) -> None:
    """Let pictures of different training sets, by name, have different ids; those of a single set stay LAVIS's.

    An id depends on its set's name and nothing else, so that a queue of features that was saved stays right when the
    run goes on, also with other sets.
    """
    if len(train) > 1:
        for name, dataset in train.items():
            dataset.first_id = crc32(name.encode()) << ID_BITS


def report_broken(broken: list[str], samples: int, allowed: float, path: Path) -> None:
    """Say which videos of an epoch could not be read, on all processes together.

    Args:
        broken: those of this process.
        samples: that this process trained on.
        allowed: largest share of samples that others may stand in for.
        path: where to write all of them, if there are any.

    Raises:
        AuroraError: there are more.
    """
    parts: list[list[str]] = [broken]
    if is_dist_avail_and_initialized():
        parts = [[] for _ in range(get_world_size())]
        dist.all_gather_object(parts, broken)
    videos = sorted({text for part in parts for text in part})
    if not videos:
        return
    count, total = sum(map(len, parts)), samples * get_world_size()
    shown = some(videos, SHOWN, "; ")
    said = f"videos could not be read {count} times in {total} samples, {len(videos)} different ones: {shown}"
    if is_main_process():
        path.write_text("\n".join(videos) + os.linesep, encoding="utf-8")
        logging.warning("%s; others were trained on in their place; all are named in %s", said, path)
    if count > allowed * total:
        raise AuroraError(
            f"{said}; that is more than run.max_broken_share, {allowed:g}; mend them (all are named in {path}), "
            f"leave them out of the annotations, or raise the share"
        )
