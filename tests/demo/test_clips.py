"""What clips show: distinct, apart by split, in words of the tiny model, and not to be told from one frame."""

from __future__ import annotations

from collections import defaultdict
from itertools import islice
from pathlib import Path

import pytest

from lavis_aurora.common.paths import package_file
from lavis_aurora.demo import scenes
from lavis_aurora.demo.clips import FAMILY, Clip, Part, caption_of, iter_captions, iter_clips
from lavis_aurora.demo.scenes import DOMAINS, Shape


def _frames(clip: Clip) -> list[tuple]:
    """What each frame of a clip can show: a look in one end of its path, on a background."""
    return [(*part.shape[1:], cell, clip.background) for part in clip.parts for cell in (part.shape.cell, part.end)]


@pytest.mark.parametrize("domain", DOMAINS)
def test_no_frame_tells_its_caption(domain: str) -> None:
    clips = [*islice(iter_clips(domain, "test", 0), 100 * FAMILY)]
    fitting: dict[tuple, set[Clip]] = defaultdict(set)
    for clip in clips:
        for frame in _frames(clip):
            fitting[frame].add(clip)
    counts = [len(fitting[frame]) for clip in clips for frame in _frames(clip)]
    assert min(counts) >= 2
    # the chance of a perfect reader of one frame
    assert sum(1 / count for count in counts) / len(counts) < 0.3
    # while all that four frames show fits one clip
    assert len({frozenset(_frames(clip)) for clip in clips}) == len(clips)


@pytest.mark.parametrize("domain", DOMAINS)
def test_no_part_in_two_splits_and_no_clip_twice(domain: str) -> None:
    parts: dict[Part, str] = {}
    for seed, splits in ((0, ("train", "val", "test")), (1, ("train", "test"))):
        for split in splits:
            clips = [*islice(iter_clips(domain, split, seed), 400)]
            assert len({(frozenset(clip.parts), clip.background) for clip in clips}) == len(clips)
            assert len({caption_of(clip, domain) for clip in clips}) == len(clips)
            assert all(parts.setdefault(part, split) == split for clip in clips for part in clip.parts)


def test_every_word_comes_in_every_split() -> None:
    domain = DOMAINS["shifted"]
    words = {*domain.colors, *domain.shapes, *domain.sizes, *domain.backgrounds, *" ".join(domain.positions).split()}
    for split in ("train", "val", "test"):
        said = {word for caption in islice(iter_captions("shifted", 0, split), 250) for word in caption.split()}
        assert words | {"stays", "moves", "between", "then"} <= said


@pytest.mark.parametrize("domain", DOMAINS)
def test_captions_are_of_the_tiny_models_words(domain: str) -> None:
    known = Path(package_file("configs/models/tiny/vocab.txt")).read_text(encoding="utf-8").splitlines()
    for caption in islice(iter_captions(domain), 500):
        assert {*caption.split()} <= {*known} - {*scenes.SPECIAL_TOKENS}
        # BLIP cuts at 35 tokens, two of them special
        assert len(caption.split()) <= 33


def test_a_caption_tells_all_but_the_direction() -> None:
    parts = Part(Shape(0, "big", "red", "ring"), 0), Part(Shape(4, "small", "cyan", "star"), 8)
    assert caption_of(Clip(parts, "mint"), "shifted") == (
        "a big red ring stays at upper left then a small cyan star moves between center and lower right "
        "over a mint backdrop"
    )
    parts = Part(Shape(0, "large", "red", "cross"), 7), Part(Shape(4, "small", "blue", "star"), 4)
    assert caption_of(Clip(parts, "gray"), "clean") == (
        "a large red cross moves between the top left and the bottom then a small blue star stays at the center "
        "on a gray background"
    )


def test_longer_draw_begins_with_the_shorter_and_seeds_differ() -> None:
    short, long = ([*islice(iter_captions("shifted", 3, "val"), count)] for count in (7, 30))
    assert long[:7] == short
    assert not {*islice(iter_captions("shifted", 4, "val"), 7)} & {*short}


def test_errors_name_the_valid_values() -> None:
    with pytest.raises(ValueError, match="unknown split 'dev': choose from train, val, test"):
        next(iter_captions("clean", split="dev"))
    with pytest.raises(ValueError, match="unknown domain 'dirty': choose one of clean, shifted"):
        next(iter_captions("dirty"))
