"""Generated clips: LAVIS's format, frames as their captions say, the same files for the same seed."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from lavis_aurora.common.media import read_frames
from lavis_aurora.data.samples import uniform_indices
from lavis_aurora.demo import clips
from lavis_aurora.demo.clips import FRAMES, Clip, Part, frames_of, generate_clips, iter_captions, iter_clips
from lavis_aurora.demo.pictures import SIDE, render
from lavis_aurora.demo.scenes import DOMAINS, Scene, Shape

COUNTS = {"train": 3, "val": 2, "test": 5}
STAYS = Part(Shape(0, "big", "red", "circle"), 0)
MOVES = Part(Shape(4, "big", "blue", "circle"), 8)
OTHER = Part(Shape(2, "big", "brown", "star"), 6)


def _rows(path: Path) -> list[dict]:
    return json.loads(path.read_text(encoding="utf-8"))


def _files(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def _cells(clip: Clip, seed: int) -> list[tuple[str, int]]:
    """Color and cell of the one shape that each frame shows."""
    domain = DOMAINS["shifted"]
    frames = frames_of(clip, domain, np.random.default_rng(seed)).astype(float)
    look = int(np.random.default_rng(seed).integers(2**32))
    empty = np.asarray(render(Scene((), clip.background), domain, np.random.default_rng(look)), float)
    found = []
    for frame in frames:
        # without noise: its window depends on what was drawn before
        rows, columns = np.nonzero(np.abs(frame - empty).max(axis=2) > 100)
        color = frame[rows, columns].mean(axis=0)
        distance = {name: np.abs(color - rgb).sum() for name, rgb in domain.colors.items()}
        row, column = (int(places.mean() // (SIDE / 3)) for places in (rows, columns))
        # of one shape only: two would be far apart
        assert rows.std() < 8 and columns.std() < 8
        found.append((min(distance, key=distance.get), 3 * row + column))
    return found


def test_frames_show_one_shape_after_the_other_and_both_ends_of_a_move() -> None:
    ways = set()
    for seed in range(6):
        cells = _cells(Clip((STAYS, MOVES), "white"), seed)
        assert len(cells) == FRAMES and cells[: FRAMES // 2] == [("red", 0)] * (FRAMES // 2)
        seen = [cells[i] for i in uniform_indices(FRAMES, 4)]
        assert {*seen} == {("red", 0), ("blue", 4), ("blue", 8)}
        ways.add((seen[2][1], seen[3][1]))
    assert ways == {(4, 8), (8, 4)}


@pytest.mark.parametrize("frame", range(FRAMES))
def test_a_frame_is_the_same_in_clips_of_other_captions(frame: int) -> None:
    half = frame // (FRAMES // 2)
    clips = [Clip((MOVES, other) if half == 0 else (other, MOVES), "white") for other in (STAYS, OTHER)]
    one, two = (frames_of(clip, DOMAINS["shifted"], _SameWays()) for clip in clips)
    assert (one[frame] == two[frame]).all() and (one != two).any()


class _SameWays:
    """Draws the least of all numbers: all moves forwards, one look."""

    def integers(self, _high: int) -> int:
        return 0


@pytest.mark.parametrize("domain", DOMAINS)
def test_format_is_lavis_video_retrieval(tmp_path: Path, domain: str) -> None:
    paths = generate_clips(tmp_path, domain, COUNTS, seed=2)
    assert paths == {split: tmp_path / f"{domain}_{split}.json" for split in COUNTS}
    for split, path in paths.items():
        captions = []
        for index, row in enumerate(_rows(path)):
            assert row["video"] == f"{domain}/{split}/{index:05d}.mp4"
            # a plain string would be read letter by letter
            captions.append(row["caption"] if split == "train" else row["caption"][0])
        assert captions == [*islice(iter_captions(domain, 2, split), COUNTS[split])]
    assert len([*tmp_path.rglob("*.mp4")]) == sum(COUNTS.values())


def test_files_hold_the_frames(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn, real = [], clips.frames_of

    def kept(*args):
        drawn.append(real(*args))
        return drawn[-1]

    monkeypatch.setattr(clips, "frames_of", kept)
    [path] = generate_clips(tmp_path, "shifted", {"test": 3}).values()
    for row, clip, frames in zip(_rows(path), iter_clips("shifted", "test", 0), drawn):
        read = read_frames(str(tmp_path / "videos" / row["video"]), torch.arange)
        assert read.shape == (FRAMES, 3, SIDE, SIDE)
        error = read.permute(0, 2, 3, 1).numpy().astype(float) - frames
        # in blocks of 4 x 4: video codecs smooth noise away, above all its colors
        blocks = np.abs(error.reshape(FRAMES, SIDE // 4, 4, SIDE // 4, 4, 3).mean(axis=(2, 4)))
        assert blocks.mean() < 4 and blocks.max() < 60, (clip, blocks.mean(), blocks.max())


def test_same_seed_gives_the_same_files_and_another_seed_others(tmp_path: Path) -> None:
    for name, seed in (("one", 3), ("two", 3), ("other", 4)):
        generate_clips(tmp_path / name, "shifted", COUNTS, seed)
    one, other = _files(tmp_path / "one"), _files(tmp_path / "other")
    assert one == _files(tmp_path / "two")
    assert one.keys() == other.keys()
    assert all(one[name] != other[name] for name in one)


def test_interrupted_run_leaves_what_was_complete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    generate_clips(tmp_path, "shifted", {"train": 2})
    before = _files(tmp_path)

    def interrupted(*_args):
        raise KeyboardInterrupt

    monkeypatch.setattr(clips, "write_mp4", interrupted)
    with pytest.raises(KeyboardInterrupt):
        generate_clips(tmp_path, "shifted", {"train": 3, "val": 2})
    assert _files(tmp_path) == before


def test_errors_name_what_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="unknown domain 'dirty': choose one of clean, shifted"):
        generate_clips(tmp_path, "dirty", COUNTS)
    with pytest.raises(ValueError, match="unknown split 'dev': choose from train, val, test"):
        generate_clips(tmp_path, "clean", {"dev": 1})
    with pytest.raises(ValueError, match="count of 'val' is -1: give 0 or more"):
        generate_clips(tmp_path, "clean", {"val": -1})
    with pytest.raises(OSError, match="cannot write .*missing"):
        clips.write_mp4(tmp_path / "missing" / "clip.mp4", np.zeros((2, 64, 64, 3), np.uint8))
    assert not [*tmp_path.iterdir()]
