"""Captioned mp4s of shapes that stay or move, so that the demo of videos needs no download.

Files are in the format of LAVIS's datasets for video retrieval; :mod:`lavis_aurora.demo.clips` says what they show.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import cv2
import numpy as np

from lavis_aurora.demo.clips import Clip, Part, caption_of, iter_clips
from lavis_aurora.demo.pictures import render
from lavis_aurora.demo.scenes import Domain, Scene, domain_of
from lavis_aurora.demo.split_files import write_splits

FRAMES_PER_SECOND = 8
# Share of its way that a moving shape has gone, frame by frame. It rests at both ends, so that the middle frames of
# four equal parts of a clip show both ends of both paths.
_PROGRESS = (0.0, 0.0, 0.0, 1 / 3, 2 / 3, 1.0, 1.0, 1.0)
FRAMES = 2 * len(_PROGRESS)


def _frames_of_part(part: Part, background: str, domain: Domain, look: int, backwards: bool) -> list[np.ndarray]:
    """The frames of one part; `look` seeds what stays the same in all frames of a clip."""
    scene = Scene((part.shape,), background)
    way = np.subtract(divmod(part.end, 3), divmod(part.shape.cell, 3))
    steps = [1 - step for step in _PROGRESS] if backwards else _PROGRESS
    drawn = {}
    for step in steps if part.moves else (0.0,):
        if step not in drawn:
            drawn[step] = np.asarray(render(scene, domain, np.random.default_rng(look), tuple(step * way)))
    return [drawn[step] if part.moves else drawn[0.0] for step in steps]


def frames_of(clip: Clip, domain: Domain, rng: np.random.Generator) -> np.ndarray:
    """Draws a clip: uint8 RGB, (FRAMES, 64, 64, 3). `rng` decides what the caption does not tell."""
    look = int(rng.integers(2**32))
    frames: list[np.ndarray] = []
    for part in clip.parts:
        frames += _frames_of_part(part, clip.background, domain, look, bool(rng.integers(2)))
    return np.stack(frames)


def write_mp4(path: Path, frames: np.ndarray) -> None:
    """Writes uint8 RGB frames, (frames, height, width, 3), as MPEG-4.

    Raises:
        OSError: it cannot be written.
    """
    height, width = frames.shape[1:3]
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"mp4v"), FRAMES_PER_SECOND, (width, height))
    if not writer.isOpened():
        raise OSError(f"cannot write {path}")
    for frame in frames:
        writer.write(cv2.cvtColor(frame, cv2.COLOR_RGB2BGR))
    writer.release()


def generate_clips(folder: str | Path, domain: str, counts: Mapping[str, int], seed: int = 0) -> dict[str, Path]:
    """Writes captioned clips of one domain in the format of LAVIS's datasets for video retrieval.

    Mp4s of FRAMES frames of 64 x 64 pixels in `folder/videos`, and json files as `write_splits` has them. No caption
    comes twice, in a split or in two splits.

    Args:
        folder: made if missing.
        domain: "clean" or "shifted".
        counts: split ("train", "val", "test") -> number of clips; a multiple of
            `clips.FAMILY`, or the last family is not whole.
        seed: the same seed gives the same files.

    Returns:
        The path of each split's json.

    Raises:
        ValueError: for an unknown domain, an unknown split, or a negative count.
    """

    def samples(place: Path, split: str, rng: np.random.Generator) -> Iterator[tuple[str, str]]:
        spec = domain_of(domain)
        for index, clip in enumerate(iter_clips(domain, split, seed)):
            name = f"{index:05d}.mp4"
            write_mp4(place / name, frames_of(clip, spec, rng))
            yield name, caption_of(clip, domain)

    return write_splits(folder, domain, counts, seed, "video", samples)
