"""What the demo's clips show and their captions say: two shapes, one after the other, that stay or move.

One frame never suffices. It shows one shape alone; and clips come in families, in which each shape on its path is
shown together with several others, and one look once stays and once moves.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator, Mapping
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np

from lavis_aurora.demo.pictures import render, write_splits
from lavis_aurora.demo.questions import place_of
from lavis_aurora.demo.scenes import Domain, Scene, Shape, check_splits, domain_of

FAMILY = 5  # clips that are drawn together
# Of a shape that stays, and of one that moves. No direction is told: BLIP does not see the order of frames.
_PHRASES = {
    "clean": (
        "a {size} {color} {shape} stays at the {place}",
        "a {size} {color} {shape} moves between the {place} and the {end}",
    ),
    "shifted": (
        "a {size} {color} {shape} stays at {place}",
        "a {size} {color} {shape} moves between {place} and {end}",
    ),
}


class Part(NamedTuple):
    """A shape, and the other end of its path: a cell behind its own, or its own where it stays."""

    shape: Shape
    end: int

    @property
    def moves(self) -> bool:
        return self.end != self.shape.cell

    def split(self) -> str:
        """The split that has all clips with this part, by a checksum: eight in ten train, as of scenes."""
        # not crc32: its lowest bit is a sum of the text's bits, and would leave out whole colors or cells
        digest = hashlib.sha256(repr(self).encode()).digest()
        return {0: "val", 1: "test"}.get(int.from_bytes(digest[:4], "big") % 10, "train")


class Clip(NamedTuple):
    """What a caption tells and a clip shows: one part, then the other."""

    parts: tuple[Part, Part]
    background: str


def _look(domain: Domain, rng: random.Random) -> tuple[str, str, str]:
    return rng.choice([*domain.sizes]), rng.choice([*domain.colors]), rng.choice(domain.shapes)


def _still_and_moving(look: tuple[str, str, str], rng: random.Random) -> tuple[Part, Part]:
    """A shape that stays in a cell, and the same one that moves between there and another cell."""
    here, there = rng.sample(range(9), 2)
    return Part(Shape(here, *look), here), Part(Shape(min(here, there), *look), max(here, there))


def _family(domain: Domain, split: str, rng: random.Random) -> list[Clip]:
    """Clips of four parts on one background: one look that stays and that moves from there, and two others."""
    parts: list[Part] = []
    while len(parts) < 4:
        look = _look(domain, rng)
        if look in (part.shape[1:] for part in parts):
            continue
        drawn = _still_and_moving(look, rng)
        if parts:
            drawn = (rng.choice(drawn),)
        if all(part.split() == split for part in drawn):
            parts += drawn
    background = rng.choice([*domain.backgrounds])
    pairs = [pair for pair in combinations(parts, 2) if pair != (parts[0], parts[1])]
    return [Clip(tuple(rng.sample(pair, 2)), background) for pair in pairs]


def iter_clips(name: str, split: str, seed: int) -> Iterator[Clip]:
    """Endless distinct clips of a split, family by family; a longer draw begins with the shorter one.

    No part, and so no clip, is in two splits, even if these are drawn from other seeds.

    Raises:
        ValueError: for an unknown domain or split.
    """
    check_splits([split])
    domain, rng = domain_of(name), random.Random(f"{seed}/{name}/{split}/clips")
    seen = set()
    while True:
        clips = _family(domain, split, rng)
        # two orders of the same parts would be told apart by nothing but their order
        keys = {(frozenset(clip.parts), clip.background) for clip in clips}
        if seen.isdisjoint(keys):
            seen |= keys
            yield from clips


def caption_of(clip: Clip, name: str) -> str:
    """The caption, lower case without punctuation; it tells all but the direction of a move."""
    domain = domain_of(name)
    parts = [
        _PHRASES[name][part.moves].format(
            **part.shape._asdict(),
            place=place_of(domain.positions[part.shape.cell]),
            end=place_of(domain.positions[part.end]),
        )
        for part in clip.parts
    ]
    return " then ".join(parts) + domain.ending.format(background=clip.background)


def iter_captions(name: str, seed: int = 0, split: str = "train") -> Iterator[str]:
    """Endless distinct captions: those that `generate_clips` writes for the same seed, in the same order."""
    return (caption_of(clip, name) for clip in iter_clips(name, split, seed))


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
