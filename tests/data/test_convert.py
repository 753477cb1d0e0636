"""The converter: entries that LAVIS reads, numbers held against the published splits, nothing half-written."""

from __future__ import annotations

import csv
import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
from lavis.datasets.datasets.retrieval_datasets import (
    RetrievalDataset,
    RetrievalEvalDataset,
    VideoRetrievalDataset,
    VideoRetrievalEvalDataset,
)
from omegaconf import OmegaConf

from lavis_aurora.common.errors import AuroraError
from lavis_aurora.data.annotations import check_entries
from lavis_aurora.data.checks import checks_of
from lavis_aurora.data.convert import PUBLISHED, Published, main

ROOT = Path(__file__).resolve().parents[2]


def read(path: Path) -> list[dict]:
    return json.loads(path.read_text())


def readable(folder: Path, pattern: str, train_cls: type, eval_cls: type) -> dict[str, list[dict]]:
    """The entries written, by split, after the checks that a run makes."""
    parts = {part: read(folder / pattern.format(part)) for part in ("train", "val", "test")}
    for part, entries in parts.items():
        [checks] = checks_of("", None, train_cls if part == "train" else eval_cls)
        check_entries(entries, checks.entries, part, "key")
    assert not list(folder.glob("*.partial"))
    return parts


@pytest.fixture
def published(monkeypatch: pytest.MonkeyPatch):
    """Set the published numbers of a split to those of a small one."""

    def change(name: str, **counts: int) -> None:
        monkeypatch.setitem(PUBLISHED, name, PUBLISHED[name]._replace(counts=counts))

    return change


# MSR-VTT


@pytest.fixture
def msrvtt(tmp_path: Path) -> list[str]:
    """Arguments: both files of a set of 6 + 2 + 4 videos with 3 sentences each, and a csv of two test videos."""
    splits = ["train"] * 6 + ["validate"] * 2 + ["test"] * 4
    for name, chosen in (("train_val", range(8)), ("test", range(8, 12))):
        videos = [{"video_id": f"video{i}", "split": splits[i], "url": "u", "category": 1, "id": i} for i in chosen]
        sentences = [
            {"caption": f"sentence {s} of {i}", "video_id": f"video{i}", "sen_id": 3 * i + s}
            for s in range(3)
            for i in chosen
        ] + [{"caption": " ", "video_id": f"video{i}", "sen_id": 900 + i} for i in chosen]
        content = {"info": {"year": "2016"}, "videos": videos, "sentences": sentences}
        (tmp_path / f"{name}_videodatainfo.json").write_text(json.dumps(content))
    with (tmp_path / "test.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["key", "vid_key", "video_id", "sentence"])
        writer.writerow(["ret0", "msr9", "video9", "one, with a comma"])
        writer.writerow(["ret1", "msr11", "video11", "another"])
    files = [str(tmp_path / f"{name}_videodatainfo.json") for name in ("train_val", "test")]
    return ["msrvtt", *files, "--test-csv", str(tmp_path / "test.csv"), "--output", str(tmp_path / "out")]


@pytest.mark.parametrize(
    ("split", "train", "val", "test"),
    [
        ("9k", [0, 1, 2, 3, 4, 5, 6, 7, 8, 10], [9, 11], [9, 11]),
        ("7k", range(8), [9, 11], [9, 11]),
        ("full", range(6), [6, 7], range(8, 12)),
    ],
)
def test_msrvtt(tmp_path, msrvtt, published, capsys, split, train, val, test):
    counts = {"train": len(train), "test": len(test)} | ({"val": 2} if split == "full" else {})
    published(f"msrvtt {split}", **counts)
    main([*msrvtt, "--split", split])
    parts = readable(tmp_path / "out", "retrieval_{}.json", VideoRetrievalDataset, VideoRetrievalEvalDataset)
    for part, numbers in (("val", val), ("test", test)):
        assert [entry["video"] for entry in parts[part]] == [f"video{i}.mp4" for i in numbers]
    expected = [{"video": f"video{i}.mp4", "caption": f"sentence {s} of {i}"} for i in train for s in range(3)]
    assert parts["train"] == expected
    if split == "full":
        assert parts["test"][0]["caption"] == [f"sentence {s} of 8" for s in range(3)]
    else:
        assert [entry["caption"] for entry in parts["test"]] == [["one, with a comma"], ["another"]]
    out = capsys.readouterr().out
    assert f"train: {len(train)} with {3 * len(train)} texts" in out
    assert ("val: 2 with 2 texts, those of test" in out) == (split != "full")


def test_msrvtt_may_be_one_file_with_all_videos(tmp_path, msrvtt, published):
    one, two = (read(Path(path)) for path in msrvtt[1:3])
    joined = {key: one[key] + two[key] for key in ("videos", "sentences")}
    (tmp_path / "all.json").write_text(json.dumps(joined))
    published("msrvtt 9k", train=10, test=2)
    main(["msrvtt", str(tmp_path / "all.json"), *msrvtt[3:]])
    assert len(read(tmp_path / "out" / "retrieval_train.json")) == 30


def test_other_numbers_than_published_are_refused(tmp_path, msrvtt, capsys):
    expected = r"msrvtt 9k: train has 10, not 9000; test has 2, not 1000 \(github.com/albanie/.*--allow-partial"
    with pytest.raises(AuroraError, match=expected):
        main(msrvtt)
    assert not (tmp_path / "out").exists()
    main([*msrvtt, "--allow-partial"])
    assert "not the published split: train has 10, not 9000" in capsys.readouterr().out
    assert len(read(tmp_path / "out" / "retrieval_train.json")) == 30


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: [*a[:2], *a[3:]], "2 videos are in none of the annotation files, among them video9"),
        (lambda a: [*a[:3], *a[5:]], "--test-csv: missing; split 9k is tested on"),
        (lambda a: [a[0], "absent.json", *a[3:]], "absent.json is not readable json"),
        (lambda a: [*a[:3], "--test-csv", "absent.csv", *a[5:]], "absent.csv is not a readable csv"),
    ],
)
def test_msrvtt_files_that_cannot_be_used(tmp_path, msrvtt, change, message):
    with pytest.raises(AuroraError, match=message):
        main([*change(msrvtt), "--allow-partial"])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda c: c.pop("sentences"), "the file has no 'sentences'"),
        (lambda c: c.update(videos={}), "videos must be a list, not {}"),
        (lambda c: c["videos"][1].pop("video_id"), "video 1 has no 'video_id'"),
        (lambda c: c["sentences"][0].pop("caption"), "sentence 0 has no 'caption'"),
        (lambda c: c["sentences"].clear(), "8 videos have no sentence, among them video0"),
    ],
)
def test_msrvtt_files_of_another_format(msrvtt, edit, message):
    path = Path(msrvtt[1])
    content = read(path)
    edit(content)
    path.write_text(json.dumps(content))
    with pytest.raises(AuroraError, match=message):
        main([*msrvtt, "--allow-partial"])


# DiDeMo


@pytest.fixture
def didemo_files(tmp_path: Path) -> Path:
    """2, 1 and 1 videos; the first has three descriptions, not one after the other."""
    files = {
        "train": [("a.mov", "a dog runs."), ("b.avi", "rain "), ("a.mov", ""), ("a.mov", "it jumps")],
        "val": [("c.mp4", "a car")],
        "test": [("d.3gp", "a tree"), ("d.3gp", "a bird")],
    }
    for part, items in files.items():
        entries = [
            {"annotation_id": i, "video": v, "description": d, "times": [[0, 0]]} for i, (v, d) in enumerate(items)
        ]
        (tmp_path / f"{part}_data.json").write_text(json.dumps(entries))
    return tmp_path


def test_didemo_descriptions_make_one_paragraph(didemo_files, published):
    published("didemo", train=2, val=1, test=1)
    main(["didemo", str(didemo_files), "--output", str(didemo_files / "out")])
    parts = readable(didemo_files / "out", "retrieval_{}.json", VideoRetrievalDataset, VideoRetrievalEvalDataset)
    assert parts["train"] == [
        {"video": "a.mov", "caption": "a dog runs. it jumps"},
        {"video": "b.avi", "caption": "rain"},
    ]
    assert parts["val"] == [{"video": "c.mp4", "caption": ["a car"]}]
    assert parts["test"] == [{"video": "d.3gp", "caption": ["a tree a bird"]}]


def test_didemo_videos_are_found_under_other_endings_and_missing_ones_are_named(didemo_files, published, capsys):
    videos = didemo_files / "videos"
    videos.mkdir()
    for name in ("a.mov.mp4", "c.mp4", "d.mp4"):
        (videos / name).touch()
    argv = ["didemo", str(didemo_files), "--videos", str(videos), "--output", str(didemo_files / "out")]
    published("didemo", train=1, val=1, test=1)
    with pytest.raises(AuroraError, match=r"^1 videos are not in .*: b.avi; fetch them, or give --allow-partial"):
        main(argv)
    assert not (didemo_files / "out").exists()
    main([*argv, "--allow-partial"])
    assert "left out: 1 videos are not in" in capsys.readouterr().out
    names = [read(didemo_files / "out" / f"retrieval_{part}.json")[0]["video"] for part in ("train", "val", "test")]
    assert names == ["a.mov.mp4", "c.mp4", "d.mp4"]


def test_didemo_without_its_folder_of_videos(didemo_files):
    with pytest.raises(AuroraError, match="--videos: no such folder"):
        main(["didemo", str(didemo_files), "--videos", str(didemo_files / "absent")])


@pytest.mark.parametrize("content", ["3", '{"video": "a"}', "[3]", '["a"]'])
def test_didemo_files_of_another_format(didemo_files, content):
    (didemo_files / "val_data.json").write_text(content)
    with pytest.raises(AuroraError, match="val_data.json: (the file must be a list|entry 0 has no 'description')"):
        main(["didemo", str(didemo_files), "--allow-partial"])


def test_empty_split(didemo_files):
    (didemo_files / "val_data.json").write_text("[]")
    with pytest.raises(AuroraError, match="didemo: the val split is empty"):
        main(["didemo", str(didemo_files), "--output", str(didemo_files / "out"), "--allow-partial"])


# Karpathy's


def karpathy_file(folder: Path, name: str) -> Path:
    images = [
        {
            "filename": f"{i}.jpg",
            "split": split,
            "sentences": [{"raw": text, "tokens": []} for text in (f"Sentence 0 of {i}.", "", f"Sentence 1 of {i}.")],
            **(
                {"filepath": f"{'train' if split == 'train' else 'val'}2014", "cocoid": 70 + i}
                if name == "coco"
                else {}
            ),
            "imgid": i,
        }
        for i, split in enumerate(["train", "restval", "val", "test", "test"])
    ]
    path = folder / f"dataset_{name}.json"
    path.write_text(json.dumps({"images": images, "dataset": name}))
    return path


@pytest.mark.parametrize(
    ("name", "pattern", "folders", "number"),
    [
        ("coco", "coco_karpathy_{}.json", ["train2014", "val2014"], 70),
        ("flickr30k", "{}.json", ["flickr30k-images"] * 2, 0),
    ],
)
def test_karpathy(tmp_path, published, name, pattern, folders, number):
    published(name, train=2, val=1, test=2)
    main(["karpathy", str(karpathy_file(tmp_path, name)), "--output", str(tmp_path / "out")])
    parts = readable(tmp_path / "out", pattern, RetrievalDataset, RetrievalEvalDataset)
    assert parts["train"] == [
        {"image": f"{folders[i]}/{i}.jpg", "caption": f"Sentence {s} of {i}.", "image_id": f"{name}_{number + i}"}
        for i in range(2)
        for s in range(2)
    ]
    texts = [f"Sentence {s} of 2." for s in range(2)]
    assert parts["val"] == [{"image": f"{folders[1]}/2.jpg", "caption": texts}]
    assert len(parts["test"]) == 2


def test_karpathys_other_files_are_refused(tmp_path):
    path = karpathy_file(tmp_path, "flickr8k")
    with pytest.raises(AuroraError, match="holds 'flickr8k'; known: coco, flickr30k"):
        main(["karpathy", str(path)])
    content = read(karpathy_file(tmp_path, "coco"))
    content["images"][1]["split"] = "tset"
    (tmp_path / "dataset_coco.json").write_text(json.dumps(content))
    with pytest.raises(AuroraError, match="the split of image 1 is 'tset'; did you mean 'test'"):
        main(["karpathy", str(tmp_path / "dataset_coco.json")])


# All


def test_files_lie_where_the_yamls_look():
    """Names below the data root are those of LAVIS's own YAMLs."""
    import lavis

    configs = Path(lavis.__file__).parent / "configs/datasets"
    for name, yaml in (
        ("msrvtt full", "msrvtt/defaults_ret.yaml"),
        ("didemo", "didemo/defaults_ret.yaml"),
        ("coco", "coco/defaults_ret.yaml"),
        ("flickr30k", "flickr30k/defaults.yaml"),
    ):
        [section] = OmegaConf.load(configs / yaml).datasets.values()
        for part, info in section.build_info.annotations.items():
            assert info.storage == PUBLISHED[name].files.format(part)
    assert len({split.files for name, split in PUBLISHED.items() if name.startswith("msrvtt")}) == 1


def test_published_numbers():
    counts = {name: split.counts for name, split in PUBLISHED.items()}
    assert counts["coco"] == {"train": 113_287, "val": 5000, "test": 5000}
    assert sum(counts["msrvtt full"].values()) == sum(counts["msrvtt 9k"].values()) == 10_000
    assert counts["msrvtt full"]["train"] + counts["msrvtt full"]["val"] == counts["msrvtt 7k"]["train"]
    assert all(isinstance(split, Published) and split.source for split in PUBLISHED.values())


def test_nothing_is_half_written(tmp_path, msrvtt, published, monkeypatch):
    published("msrvtt 9k", train=10, test=2)
    main(msrvtt)
    before = {path.name: path.read_text() for path in (tmp_path / "out").iterdir()}

    # Whatever is written there meets a full disk.
    original = io.open

    def no_space(path, mode="r", *args, **kwargs):
        full = str(path).endswith("retrieval_val.json.partial")
        if full:
            kwargs.pop("opener", None)  # that of Path.open before Python 3.10 opens its own path
        return original("/dev/full" if full else path, "wb" if full else mode, *args, **kwargs)

    monkeypatch.setattr(io, "open", no_space)
    with pytest.raises(AuroraError, match="cannot write .*retrieval_val.json .No space left"):
        main(msrvtt)
    assert {path.name: path.read_text() for path in (tmp_path / "out").iterdir()} == before


def test_the_command_reports_an_error_in_one_line(tmp_path):
    command = [sys.executable, "-m", "lavis_aurora.data.convert", "karpathy", str(tmp_path / "absent.json")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    [line] = done.stderr.splitlines()
    assert done.returncode == 1 and line.startswith(f"error: {tmp_path}/absent.json is not readable json")
