"""Generated pictures: LAVIS's format, one scene per picture, the same files for the same seed."""

from __future__ import annotations

import json
from collections import Counter
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lavis_aurora.demo import pictures, scenes
from lavis_aurora.demo.pictures import SIDE, contact_sheet, generate_pictures
from lavis_aurora.demo.scenes import DOMAINS, Scene, Shape, iter_captions

COUNTS = {"train": 12, "val": 6, "test": 5}
CELL = SIDE / 3


def _rows(path: Path) -> list[dict]:
    return json.loads(path.read_text(encoding="utf-8"))


def _captions(path: Path) -> list[str]:
    return [row["caption"] if isinstance(row["caption"], str) else row["caption"][0] for row in _rows(path)]


def _files(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("domain", DOMAINS)
def test_format_is_lavis_retrieval(tmp_path: Path, domain: str) -> None:
    paths = generate_pictures(tmp_path, domain, COUNTS)
    assert paths == {split: tmp_path / f"{domain}_{split}.json" for split in COUNTS}
    for split, path in paths.items():
        rows = _rows(path)
        assert len(rows) == COUNTS[split]
        for index, row in enumerate(rows):
            assert row["image_id"] == f"{domain}_{split}_{index:05d}"
            assert row["image"] == f"{domain}/{split}/{index:05d}.jpg"
            with Image.open(tmp_path / "images" / row["image"]) as picture:
                assert (picture.format, picture.mode, picture.size) == ("JPEG", "RGB", (SIDE, SIDE))
            if split == "train":
                assert isinstance(row["caption"], str)
            else:  # a plain string would be read letter by letter
                assert isinstance(row["caption"], list) and len(row["caption"]) == 1
    assert len([*tmp_path.rglob("*.jpg")]) == sum(COUNTS.values())


def test_same_seed_gives_the_same_files_and_another_seed_others(tmp_path: Path) -> None:
    for name, seed in (("one", 3), ("two", 3), ("other", 4)):
        generate_pictures(tmp_path / name, "shifted", COUNTS, seed)
    one, other = _files(tmp_path / "one"), _files(tmp_path / "other")
    assert one == _files(tmp_path / "two")
    assert one.keys() == other.keys()
    assert all(one[name] != other[name] for name in one)


def test_captions_do_not_change_from_release_to_release() -> None:
    # shipped weights are pretrained on them; a deliberate change here means pretraining again
    assert next(iter_captions("clean")) == "a large green diamond at the bottom left on a gray background"
    assert next(iter_captions("shifted")) == (
        "there is a big pink ring at lower center while a big red triangle sits at lower right over a white backdrop"
    )


def test_longer_split_begins_with_the_shorter(tmp_path: Path) -> None:
    short = generate_pictures(tmp_path / "short", "shifted", {"train": 4})["train"]
    long = generate_pictures(tmp_path / "long", "shifted", {"train": 9})["train"]
    assert _rows(long)[:4] == _rows(short)
    short_files, long_files = _files(tmp_path / "short" / "images"), _files(tmp_path / "long" / "images")
    assert short_files.items() <= long_files.items()


def test_iter_captions_gives_what_is_written(tmp_path: Path) -> None:
    for split, path in generate_pictures(tmp_path, "clean", COUNTS, seed=2).items():
        assert [*islice(iter_captions("clean", 2, split), COUNTS[split])] == _captions(path)


def test_number_of_shapes_follows_its_shares(tmp_path: Path) -> None:
    for shares in (scenes.SHAPE_COUNTS, (0.5, 0.3, 0.2)):
        drawn = Counter(len(scene.shapes) for scene in islice(scenes.iter_scenes("clean", "train", 0, shares), 1000))
        assert [drawn[n] / 1000 for n in (1, 2, 3)] == pytest.approx(shares, abs=0.05)
    path = generate_pictures(tmp_path, "clean", {"train": 9}, shape_counts=(0, 0, 1))["train"]
    assert all(caption.count(" and ") == 2 for caption in _captions(path))


@pytest.mark.parametrize("domain", DOMAINS)
def test_no_scene_twice_in_a_split_or_in_two(domain: str) -> None:
    def scene_of(caption: str) -> frozenset[str]:
        # the order of the shapes is free: cut the caption into its shapes and compare as a set
        for link in (" while ", " and ", " over ", " on a "):
            caption = caption.replace(link, "|").replace(" sits at ", " at ").replace(" rests at ", " at ")
        return frozenset(part.replace("there is ", "") for part in caption.split("|"))

    seen: dict[frozenset[str], str] = {}
    for seed, splits in ((0, ("train", "val", "test")), (1, ("train", "test"))):
        for split in splits:
            scenes = [scene_of(caption) for caption in islice(iter_captions(domain, seed, split), 800)]
            assert len({*scenes}) == len(scenes)
            assert all(seen.setdefault(scene, split) == split for scene in scenes)


@pytest.mark.parametrize("domain", DOMAINS)
def test_captions_use_the_domains_words_and_pass_lavis_processing(domain: str) -> None:
    words = DOMAINS[domain].words()
    for caption in islice(iter_captions(domain), 500):
        assert {*caption.split()} <= {*words}
        # LAVIS lower-cases, drops punctuation, cuts at 50 words; BLIP cuts at 35 tokens, two of them special
        assert caption.replace(" ", "").isalpha() and caption == caption.lower()
        assert len(caption.split()) <= 33


def test_domains_share_some_words_of_each_kind_but_not_all() -> None:
    clean, shifted = DOMAINS["clean"], DOMAINS["shifted"]
    for kind, shared in (("colors", 3), ("shapes", 3), ("backgrounds", 2)):
        assert len({*getattr(clean, kind)} & {*getattr(shifted, kind)}) == shared
    for name in ("colors", "backgrounds"):
        table = getattr(clean, name) | getattr(shifted, name)
        common = getattr(clean, name).keys() & getattr(shifted, name).keys()
        assert all(getattr(clean, name)[word] == table[word] for word in common)


@pytest.mark.parametrize("domain", DOMAINS)
def test_picture_shows_what_its_caption_says(domain: str) -> None:
    spec = DOMAINS[domain]
    small, large = spec.sizes
    for cell in range(9):
        for color, rgb in spec.colors.items():
            areas = []
            for size in (small, large):
                scene = Scene((Shape(cell, size, color, "circle"),), "white")
                empty = Scene((), "white")
                shape = np.asarray(pictures.render(scene, spec, np.random.default_rng(cell)), float)
                plain = np.asarray(pictures.render(empty, spec, np.random.default_rng(cell)), float)
                changed = np.abs(shape - plain).max(axis=2) > 80
                rows, columns = np.nonzero(changed)
                assert (int(rows.mean() // CELL), int(columns.mean() // CELL)) == divmod(cell, 3)
                painted = shape[changed].mean(axis=0)
                distance = {name: np.abs(painted - value).sum() for name, value in spec.colors.items()}
                assert min(distance, key=distance.get) == color, (color, rgb, painted)
                areas.append(changed.sum())
            assert areas[1] > 2 * areas[0]


def test_rerun_replaces_its_splits_and_leaves_the_others(tmp_path: Path) -> None:
    generate_pictures(tmp_path, "clean", COUNTS)
    before = _files(tmp_path)
    generate_pictures(tmp_path, "clean", {"train": 3}, seed=1)
    after = _files(tmp_path)
    assert len(_rows(tmp_path / "clean_train.json")) == 3
    assert len([*(tmp_path / "images/clean/train").iterdir()]) == 3
    others = [name for name in before if "train" not in name]
    assert others and all(after[name] == before[name] for name in others)


@pytest.mark.parametrize("earlier", [False, True])
def test_interrupted_run_leaves_nothing_that_looks_complete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, earlier: bool
) -> None:
    if earlier:
        generate_pictures(tmp_path, "shifted", {"train": 4})
    before = _files(tmp_path)
    real, drawn = pictures.render, []

    def interrupted(*args):
        drawn.append(args)
        if len(drawn) == 7:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(pictures, "render", interrupted)
    with pytest.raises(KeyboardInterrupt):
        generate_pictures(tmp_path, "shifted", {"train": 5, "val": 5}, seed=1)
    assert _files(tmp_path) == before  # what was complete still is; nothing was added


def test_run_killed_while_moving_leaves_no_json(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    generate_pictures(tmp_path, "shifted", {"train": 4})

    def killed(self, target):
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "rename", killed)
    with pytest.raises(KeyboardInterrupt):
        generate_pictures(tmp_path, "shifted", {"train": 5})
    assert not (tmp_path / "shifted_train.json").exists()


def test_errors_name_the_valid_values(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="unknown domain 'dirty': choose one of clean, shifted"):
        generate_pictures(tmp_path, "dirty", COUNTS)
    with pytest.raises(ValueError, match="unknown split 'dev': choose from train, val, test"):
        generate_pictures(tmp_path, "clean", {"train": 1, "dev": 1})
    with pytest.raises(ValueError, match="count of 'val' is -1: give 0 or more"):
        generate_pictures(tmp_path, "clean", {"train": 1, "val": -1})
    with pytest.raises(ValueError, match="unknown split 'dev'"):
        iter_captions("clean", split="dev")
    with pytest.raises(ValueError, match="unknown domain 'dirty'"):
        iter_captions("dirty")
    assert not [*tmp_path.iterdir()]


def test_command_line_writes_pictures_and_sheet(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    sheet = tmp_path / "sheets" / "out.png"
    argv = [str(tmp_path), "--domain", "shifted", "--train", "0", "--val", "3", "--test", "2", "--seed", "5"]
    pictures.main([*argv, "--contact-sheet", str(sheet)])
    assert [len(_rows(tmp_path / f"shifted_{split}.json")) for split in ("val", "test")] == [3, 2]
    assert not (tmp_path / "shifted_train.json").exists()
    assert sheet.read_bytes().startswith(b"\x89PNG")
    assert "val: 3 pictures" in capsys.readouterr().out


@pytest.mark.parametrize("argv, message", [(["--val", "-2"], "count of 'val' is -2"), ([], "nothing to do")])
def test_command_line_errors_are_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture, argv: list[str], message: str
) -> None:
    with pytest.raises(SystemExit):
        pictures.main([str(tmp_path), "--train", "0", "--val", "0", "--test", "0", *argv])
    assert message in capsys.readouterr().err


def test_contact_sheet_takes_more_cells_than_pictures(tmp_path: Path) -> None:
    paths = generate_pictures(tmp_path, "clean", {"train": 2})
    out = contact_sheet(paths["train"], tmp_path / "images", tmp_path / "sheet.png", rows=1, columns=3)
    with Image.open(out) as picture:
        assert picture.format == "PNG" and picture.width > picture.height
