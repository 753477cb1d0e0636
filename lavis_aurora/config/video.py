"""Processors of videos, a part of ``datasets:``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Optional

from lavis_aurora.config.rules import require


@dataclass
class VideoProcessorConfig:
    """``vis_processor.train`` or ``.eval`` of a dataset of videos: aurora_video_train, aurora_video_eval.

    Attributes:
        name: aurora_video_train (random frames, a random crop) or aurora_video_eval (middle frames of equal parts).
        n_frms: T, frames of a video (LAVIS's name; the paper has 8 in training and 16 at test, D.3).
        image_size: pixels of a side.
        mean, std: of the three colours; BLIP's by default.
        min_scale, max_scale: share of a frame's area that a random crop keeps; in training only.
    """

    name: Optional[str] = None
    n_frms: int = 8
    image_size: int = 224
    mean: Optional[list[float]] = None
    std: Optional[list[float]] = None
    min_scale: float = 0.5
    max_scale: float = 1.0

    def __post_init__(self) -> None:
        for key in ("n_frms", "image_size"):
            require(getattr(self, key) >= 1, key, getattr(self, key), "1 or more")
        require(0 < self.min_scale <= 1, "min_scale", self.min_scale, "above 0, and at most 1")
        require(self.min_scale <= self.max_scale <= 1, "max_scale", self.max_scale, "min_scale to 1")
        for key in ("mean", "std"):
            value = getattr(self, key)
            require(value is None or len(value) == 3, key, value, "three numbers, of red, green and blue")
