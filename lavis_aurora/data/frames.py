"""Frames of a video: which ones, and as BLIP's pictures."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial

import decord
import torch
from decord import DECORDError, VideoReader
from lavis.common.registry import registry
from lavis.processors.base_processor import BaseProcessor
from lavis.processors.blip_processors import BlipImageBaseProcessor
from omegaconf import DictConfig
from torch import Tensor
from torchvision.transforms import v2

from lavis_aurora.config.check import parse_config
from lavis_aurora.config.run import VideoProcessorConfig


class BrokenVideo(Exception):
    """A video that is missing or cannot be decoded; the message says why, not which."""


def random_indices(length: int, count: int) -> Tensor:
    """``count`` of ``length`` frames at random, in order; repeated ones only where there are too few (paper D.3).

    Drawn by torch's global generator.
    """
    drawn = torch.randint(length, (count,)) if length < count else torch.randperm(length)[:count]
    return drawn.sort().values


def uniform_indices(length: int, count: int) -> Tensor:
    """The middle frames of ``count`` equal parts of a video of ``length`` frames, floor((i + 1/2) length / count)."""
    return (2 * torch.arange(count) + 1) * length // (2 * count)


def read_frames(path: str, choose: Callable[[int], Tensor]) -> Tensor:
    """Decode some frames of a video.

    Args:
        path: the video.
        choose: the frames of a video of a given length.

    Returns:
        uint8 RGB, (frames, 3, height, width).

    Raises:
        BrokenVideo: it is missing, or a chosen frame cannot be decoded.
    """
    if not os.path.isfile(path):
        raise BrokenVideo("no such file")
    # What decord and ffmpeg print about broken files says nothing that the exception does not.
    decord.logging.set_level(decord.logging.QUIET)
    try:
        # Loaders have processes of their own: one thread each.
        reader = VideoReader(path, num_threads=1)
        if len(reader) == 0:
            raise BrokenVideo("no frames")
        with decord.bridge.use_torch():
            frames = reader.get_batch(choose(len(reader)).tolist())
    except (DECORDError, RuntimeError, IndexError) as error:
        reason = " ".join(str(error).replace(path, "it").split())[:200]
        # It takes the padding of short lines for a fourth colour.
        narrow = "decord cannot read videos less than 64 pixels wide: " if "from_size == to_size" in reason else ""
        raise BrokenVideo(narrow + reason) from error
    return frames.permute(0, 3, 1, 2)


class VideoProcessor(BaseProcessor):
    """A path to exactly ``n_frms`` frames, (3, n_frms, image_size, image_size), normalised as BLIP's pictures.

    Args:
        cfg: sizes and numbers.
        choose: ``n_frms`` frames of a video, given its length and ``count``.
        resize: makes frames (frames, 3, height, width), all in the same way, ``image_size`` high and wide.
    """

    CONFIG_CLASS = VideoProcessorConfig

    def __init__(
        self, cfg: VideoProcessorConfig, choose: Callable[[int, int], Tensor], resize: Callable[[Tensor], Tensor]
    ) -> None:
        self.choose = partial(choose, count=cfg.n_frms)
        blip = BlipImageBaseProcessor(mean=cfg.mean, std=cfg.std)
        self.transform = v2.Compose([resize, v2.ToDtype(torch.float32, scale=True), blip.normalize])

    def __call__(self, path: str) -> Tensor:
        return self.transform(read_frames(path, self.choose)).transpose(0, 1)

    @classmethod
    def from_config(cls, cfg: DictConfig | None = None) -> VideoProcessor:
        """Build from the part of a YAML, every key checked; see :class:`VideoProcessorConfig`."""
        return cls(parse_config(cls.CONFIG_CLASS, cfg or {}, "vis_processor"))


@registry.register_processor("aurora_video_train")
class VideoTrainProcessor(VideoProcessor):
    """Frames at random, with BLIP's random crop, the same one for all frames of a video.

    BLIP's flips and changes of colour are left out: captions name directions, colours, and what moves.
    """

    def __init__(self, cfg: VideoProcessorConfig) -> None:
        scale = (cfg.min_scale, cfg.max_scale)
        crop = v2.RandomResizedCrop(cfg.image_size, scale, interpolation=v2.InterpolationMode.BICUBIC, antialias=True)
        super().__init__(cfg, random_indices, crop)


@registry.register_processor("aurora_video_eval")
class VideoEvalProcessor(VideoProcessor):
    """The middle frames of equal parts, resized as BLIP's pictures."""

    def __init__(self, cfg: VideoProcessorConfig) -> None:
        size = [cfg.image_size, cfg.image_size]
        super().__init__(cfg, uniform_indices, v2.Resize(size, v2.InterpolationMode.BICUBIC, antialias=True))
