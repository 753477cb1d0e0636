"""What the demo's clips show and their captions say: two shapes, one after the other, that stay or move.

One frame never suffices. It shows one shape alone; and clips come in families, in which each shape on its path is
shown together with several others, and one look once stays and once moves.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from itertools import combinations
from typing import NamedTuple

from lavis_aurora.demo.questions import place_of
from lavis_aurora.demo.scenes import Domain, Shape, check_splits, domain_of

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
