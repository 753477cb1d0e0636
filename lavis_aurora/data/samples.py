"""Samples: errors name their files, and in training others stand in for broken videos."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from copy import copy
from functools import partial
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np
import torch
import torch.distributed as dist
from lavis.common.dist_utils import get_world_size, is_dist_avail_and_initialized, is_main_process
from lavis.common.registry import registry
from lavis.datasets.datasets.base_dataset import BaseDataset
from lavis.processors.base_processor import BaseProcessor
from lavis.processors.blip_processors import BlipImageBaseProcessor
from omegaconf import DictConfig
from torch import Tensor
from torch.utils.data import Dataset, default_collate
from torchvision.transforms import v2

from lavis_aurora.common.errors import AuroraError, abbreviated
from lavis_aurora.common.files import regular, write_text
from lavis_aurora.common.media import (
    VIDEO_ENDINGS,
    BrokenVideo,
    as_shown,
    load_picture,
    read_frames,
    whole_pictures,
)
from lavis_aurora.config.check import parse_config
from lavis_aurora.config.run import VideoProcessorConfig
from lavis_aurora.data.features import FeatureCache
from lavis_aurora.data.media import with_ending


def random_indices(length: int, count: int) -> Tensor:
    """``count`` of ``length`` frames at random, in order; repeated ones only where there are too few (paper D.3).

    Drawn by torch's global generator.
    """
    drawn = torch.randint(length, (count,)) if length < count else torch.randperm(length)[:count]
    return drawn.sort().values


def uniform_indices(length: int, count: int) -> Tensor:
    """The middle frames of ``count`` equal parts of a video of ``length`` frames, floor((i + 1/2) length / count)."""
    return (2 * torch.arange(count) + 1) * length // (2 * count)


CHOICES = {"random": random_indices, "middle": uniform_indices}


def resizing(cfg: VideoProcessorConfig, crop: str) -> v2.Transform:
    """Makes frames (frames, 3, height, width), all in the same way, ``image_size`` high and wide."""
    size, how = cfg.image_size, {"interpolation": v2.InterpolationMode.BICUBIC, "antialias": True}
    if crop == "random":
        return v2.RandomResizedCrop(size, (cfg.min_scale, cfg.max_scale), **how)
    if crop == "center":
        return v2.Compose([v2.Resize(size, **how), v2.CenterCrop(size)])
    return v2.Resize([size, size], **how)


class VideoProcessor(BaseProcessor):
    """A path to exactly ``n_frms`` frames, (3, n_frms, image_size, image_size), normalised as BLIP's pictures.

    Args:
        cfg: sizes and numbers.

    Attributes:
        FRAMES, CROP: which frames, and what of each, unless the configuration says it.
    """

    CONFIG_CLASS = VideoProcessorConfig
    FRAMES: str
    CROP: str

    def __init__(self, cfg: VideoProcessorConfig) -> None:
        self.choose = partial(CHOICES[cfg.frames or self.FRAMES], count=cfg.n_frms)
        blip = BlipImageBaseProcessor(mean=cfg.mean, std=cfg.std)
        crop = cfg.crop or self.CROP
        for key in ("min_scale", "max_scale"):
            if crop != "random" and getattr(cfg, key) != getattr(VideoProcessorConfig, key):
                words = f"it is of a random crop alone, and crop is {crop}; leave it out, or set crop: random"
                raise AuroraError(f"vis_processor.{key}: {words}")
        resize = resizing(cfg, crop)
        self.transform = v2.Compose([resize, v2.ToDtype(torch.float32, scale=True), blip.normalize])

    def __call__(self, path: str) -> Tensor:
        return self.transform(read_frames(path, self.choose)).transpose(0, 1)

    @classmethod
    def from_config(cls, cfg: DictConfig | None = None) -> VideoProcessor:
        """Build from the part of a YAML, every key checked; see :class:`VideoProcessorConfig`."""
        return cls(parse_config(cls.CONFIG_CLASS, cfg or {}, "vis_processor"))


def read_visual(path: str | Path) -> np.ndarray:
    """A picture, or the middle frame of a video: (height, width, 3), uint8.

    Raises:
        AuroraError: it cannot be read.
    """
    if Path(path).suffix.lower() not in VIDEO_ENDINGS:
        return np.asarray(load_picture(path))
    try:
        [frame] = read_frames(str(path), partial(uniform_indices, count=1))
    except BrokenVideo as error:
        raise AuroraError(f"cannot read {path} ({error})") from error
    return frame.permute(1, 2, 0).numpy()


@registry.register_processor("aurora_video_train")
class VideoTrainProcessor(VideoProcessor):
    """Frames at random, with BLIP's random crop, the same one for all frames of a video.

    BLIP's flips and changes of colour are left out: captions name directions, colours, and what moves.
    """

    FRAMES = CROP = "random"


@registry.register_processor("aurora_video_eval")
class VideoEvalProcessor(VideoProcessor):
    """The middle frames of equal parts, resized as BLIP's pictures."""

    FRAMES, CROP = "middle", "none"


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
        features: tokens that stand in for pictures; batches then hold ``tokens`` and no ``image``.
    """

    first_id = 0
    features: FeatureCache | None = None

    def __init__(self, inner: Dataset, name: str) -> None:
        self.inner = inner
        self.name = name

    def __len__(self) -> int:
        return len(self.inner)

    def __getitem__(self, index: int) -> dict:
        try:
            with whole_pictures():
                sample = self._read(index)
            if sample is None:  # LAVIS's main branch drops its error
                raise (BrokenVideo if "video" in self.inner.annotation[index] else OSError)("LAVIS could not read it")
        except Exception as error:  # PIL, ffmpeg and the processors each have errors of their own
            remedy = "; replace it, or leave its entries out; lavis-aurora check --decode finds all such files"
            raise AuroraError(
                f"{self.name}: cannot read {self.file(index)} ({type(error).__name__}: {error})"
                f"{remedy * isinstance(error, (OSError, BrokenVideo))}"
            ) from error
        if not self.first_id:
            return sample
        sample = {**sample, SET: self.name}
        # Losses compare numbers; names are for messages.
        if not isinstance(sample.get("image_id", ""), str):
            sample["image_id"] = self.first_id + int(sample["image_id"])
        return sample

    def _read(self, index: int) -> dict:
        """LAVIS's sample, of pictures as a viewer shows them: what it hands to its processor is put right.

        Where a dataset finds its pictures in a way of its own, orientation alone can be.
        """
        entry, files = self.inner.annotation[index], self._files(index)
        for path in files:
            try:
                if os.path.exists(path):  # else LAVIS knows better where it should be
                    regular(path)
            except OSError as error:
                raise (BrokenVideo(error) if "video" in entry else error) from None
        if not {"image", "images"} & set(entry):
            return self.inner[index]
        opened = iter(files)
        reading, processor = copy(self.inner), self.inner.vis_processor
        if self.features is not None:
            # LAVIS opens a picture of one pixel and hands on the tokens of the one that it stands for.
            tokens = self.features.read(files[0])
            reading.annotation = {index: {**entry, "image": self.features.pixel}}
            reading.vis_processor = lambda _pixel: tokens
            return reading[index]
        reading.vis_processor = lambda picture: processor(as_shown(picture, next(opened)))
        return reading[index]

    def _files(self, index: int) -> list[str]:
        """Paths of the pictures of a sample, in the order in which LAVIS opens them, or of its video."""
        entry = self.inner.annotation[index]
        names = entry.get("images") or [entry.get("image", entry.get("video", "?"))]
        return [with_ending(os.path.join(self.inner.vis_root, str(name))) for name in names]

    def file(self, index: int) -> str:
        """Path of the picture or video of a sample, or of several."""
        return ", ".join(self._files(index))

    def collater(self, samples: list[dict]) -> dict:
        """A batch, with tensors as LAVIS 1.0.2 makes them; its main branch leaves numbers in lists."""
        if getattr(type(self.inner), "collater", BaseDataset.collater) is BaseDataset.collater:
            batch = default_collate(samples)
        else:
            batch = self.inner.collater(samples)
        if self.features is not None:
            batch["tokens"] = batch.pop("image")
        if isinstance(batch.get("weight"), list):  # of answers to train on
            batch["weight"] = torch.Tensor(batch["weight"])
        return batch

    def __getattr__(self, name: str) -> Any:
        if name == "inner":  # not there yet while unpickling
            raise AttributeError(name)
        return getattr(self.inner, name)


class ResamplingDataset(CheckedDataset):
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
        return {**super().collater(rest), BROKEN: [text for sample in samples for text in sample[BROKEN]]}


def set_ids_apart(train: Mapping[str, CheckedDataset]) -> None:
    """Let pictures of different training sets, by name, have different ids; those of a single set stay LAVIS's.

    An id depends on its set's name and nothing else, so that a queue of features that was saved stays right when the
    run goes on, also with other sets.
    """
    if len(train) > 1:
        for name, dataset in train.items():
            dataset.first_id = crc32(name.encode()) << ID_BITS


def report_undecodable(broken: list[str], samples: int, allowed: float, path: Path) -> None:
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
    shown = abbreviated(videos, SHOWN, "; ")
    said = f"videos could not be read {count} times in {total} samples, {len(videos)} different ones: {shown}"
    if is_main_process():
        write_text(path, "\n".join(videos) + os.linesep)
        logging.warning("%s; others were trained on in their place; all are named in %s", said, path)
    if count > allowed * total:
        raise AuroraError(
            f"{said}; that is more than run.max_broken_share, {allowed:g}; mend them (all are named in {path}), "
            f"leave them out of the annotations, or raise the share"
        )
