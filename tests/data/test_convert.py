"""The converter: entries that LAVIS reads, numbers held against the published splits, nothing half-written."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from lavis.common.registry import registry
from lavis.datasets.datasets.retrieval_datasets import (
    RetrievalDataset,
    RetrievalEvalDataset,
    VideoRetrievalDataset,
    VideoRetrievalEvalDataset,
)
from omegaconf import OmegaConf
from runs import patch_open

from lavis_aurora.common.errors import AuroraError
from lavis_aurora.common.paths import package_file
from lavis_aurora.data.annotations import check_entries, check_split
from lavis_aurora.data.checks import checks_of
from lavis_aurora.data.convert import PUBLISHED, main, videos_in

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
        (lambda a: [*a[:2], *a[3:]], "2 videos of the test are in none of the annotation files, among them video9"),
        (lambda a: [*a[:3], *a[5:]], "--test-csv: missing; split 9k is tested on .* as test=FILE"),
        (lambda a: [a[0], "absent.json", *a[3:]], "absent.json is not a readable file of annotations"),
        (lambda a: [*a[:3], "--test-csv", "absent.csv", *a[5:]], "absent.csv is not a readable file of annotations"),
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
        (lambda c: c.update(sentences=[{"video_id": "video0"}]), "sentence 0 has no 'caption'"),
    ],
)
def test_msrvtt_files_of_another_format(msrvtt, edit, message):
    path = Path(msrvtt[1])
    content = read(path)
    edit(content)
    path.write_text(json.dumps(content))
    with pytest.raises(AuroraError, match=message):
        main([*msrvtt, "--allow-partial"])


@pytest.mark.parametrize("command", ["msrvtt", "auto"])
def test_msrvtt_train_alone(tmp_path, published, command):
    published("msrvtt 9k", train=1, test=2)
    (tmp_path / "train.jsonl").write_text('{"clip_name": "video1", "caption": "a dog"}\n')
    main([command, str(tmp_path / "train.jsonl"), "--output", str(tmp_path / "out")])
    [path] = (tmp_path / "out").iterdir()
    assert (path.name, read(path)) == ("retrieval_train.json", [{"video": "video1.mp4", "caption": "a dog"}])


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


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("3", "of the names listed for val, 1 have captions in none of the files, among them 3"),
        ('["a"]', "of the names listed for val, 1 have captions in none"),
        ('{"video": "a"}', "val_data.json: no known layout of annotations has 'video'; docs/data.md"),
        ('[{"video": "a", "text": 3}]', "val_data.json: a text of entry 0 must be a string, not 3"),
        ('[{"video": "a", "text": "b"}, {}]', "val_data.json: entry 1 has none of video, clip_name"),
        ("[]", "val_data.json: it is empty"),
    ],
)
def test_didemo_files_of_another_format(didemo_files, content, message):
    (didemo_files / "val_data.json").write_text(content)
    with pytest.raises(AuroraError, match=message):
        main(["didemo", str(didemo_files), "--allow-partial"])
    assert not (didemo_files / "out").exists()


def test_one_video_has_several_endings_or_a_dot(tmp_path, published, capsys):
    """As 29 videos of the published val and 33 of test: their annotations name them .mov here and .mp4 there."""
    names = ["1@N00_1_a.mov", "2@N00_2_b.", "1@N00_1_a.mp4", "3@N00_3_c.m2ts", "2@N00_2_b."]
    entries = [
        {"annotation_id": i, "video": v, "description": f"{i}.", "times": [[0, 1]]} for i, v in enumerate(names)
    ]
    for part in ("train", "val", "test"):
        (tmp_path / f"{part}_data.json").write_text(json.dumps(entries))
    published("didemo", train=3, val=3, test=3)
    argv = ["didemo", str(tmp_path), "--output", str(tmp_path / "out")]
    main(argv)
    texts = ["0. 2.", "1. 4.", "3."]
    expected = list(zip(["1@N00_1_a.mov", "2@N00_2_b.", "3@N00_3_c.m2ts"], texts))
    assert [(e["video"], e["caption"]) for e in read(tmp_path / "out" / "retrieval_train.json")] == expected
    assert [(e["video"], *e["caption"]) for e in read(tmp_path / "out" / "retrieval_val.json")] == expected

    # Files named by another of their names, as published, and by the name with .mp4 at its end.
    for files in (
        ["1@N00_1_a.mp4", "2@N00_2_b.", "3@N00_3_c.m2ts", "3@N00_3_c.txt"],
        ["1@N00_1_a.mp4", "2@N00_2_b.mp4", "3@N00_3_c.mp4"],
        ["1@N00_1_a.mov.mp4", "2@N00_2_b..mp4", "3@N00_3_c.mp4"],
    ):
        folder = tmp_path / files[1]
        folder.mkdir()
        for name in files:
            (folder / name).touch()
        main([*argv, "--videos", str(folder), "--overwrite"])
        assert [e["video"] for e in read(tmp_path / "out" / "retrieval_test.json")] == files[:3]


def test_paragraphs_of_one_video_under_two_names_are_refused_with_a_command_that_helps(tmp_path, published, capsys):
    entries = [{"video": f"1@N00_1_a.{end}", "caption": [f"a {end}"]} for end in ("mov", "mp4")]
    path = tmp_path / "retrieval_val.json"
    path.write_text(json.dumps(entries))
    checks = list(checks_of("didemo_retrieval", "videos", VideoRetrievalEvalDataset))
    expected = "entries 0 and 1 of .* are one video under two names, '1@N00_1_a.mov' and '1@N00_1_a.mp4'"
    with pytest.raises(AuroraError, match=expected) as caught:
        check_split([str(path)], checks, "val", "datasets.didemo_retrieval.build_info.annotations.val.storage")
    command = re.search("`python -m lavis_aurora.data.convert (.*)`", str(caught.value))[1]
    published("didemo", val=1)
    main([*command.split(), "--output", str(tmp_path / "out")])
    assert read(tmp_path / "out" / "retrieval_val.json") == [{"video": "1@N00_1_a.mov", "caption": ["a mov a mp4"]}]
    check_split([str(tmp_path / "out" / "retrieval_val.json")], checks, "val", "datasets.didemo_retrieval")


@pytest.mark.parametrize(
    ("dataset", "split", "name", "text", "command"),
    [
        (
            "msrvtt_retrieval",
            "train",
            "a.jsonl",
            '{"clip_name": "video1", "caption": "b"}\n' * 2,
            "msrvtt train=a.jsonl",
        ),
        ("msrvtt_retrieval", "test", "t.csv", "key,video_id,sentence\nr,video2,b\n", "msrvtt test=t.csv"),
        (
            "msrvtt_retrieval",
            "test",
            "v.json",
            '{"videos": [{"video_id": "video1", "split": "test"}], "sentences": []}',
            "msrvtt v.json",
        ),
        (
            "msrvtt_qa_aurora",
            "train",
            "q.json",
            '[{"video_id": 1, "question": "a", "answer": "b", "id": 1}]',
            "msrvtt_qa train=q.json",
        ),
        ("didemo_retrieval", "val", "d.json", '[{"video": "1@N00_1_a.", "description": "b"}]', "didemo val=d.json"),
        ("flickr30k", "train", "f.csv", 'raw,filename\n"[""a""]",1000092795.jpg\n', "flickr30k train=f.csv"),
        (
            "coco_retrieval",
            "val",
            "c v.json",
            '{"images": [], "annotations": [{"image_id": 1, "caption": "a"}]}',
            "coco 'c v.json'",
        ),
        (
            "own_retrieval",
            "train",
            "o.json",
            '\ufeff[{"image": "a.jpg", "caption": "b", "image_id": 1}]',
            "own train=o.json",
        ),
        ("own_retrieval", "train", "x.json", "not json", None),
        ("own_retrieval", "train", "o.json", '[{"image": "20231124.jpg", "caption": "b"}]', "own train=o.json"),
        ("coco_retrieval", "train", "c.json", '[{"image": "a/1.jpg", "caption": "b", "image_id": null}]', None),
        ("coco_retrieval", "train", "c.json", '[{"image": "a.jpg", "caption": "b"}]', None),
        ("coco_retrieval", "val", "c.json", '{"images": [{"id": 1, "file_name": "a.jpg"}], "annotations": []}', None),
        ("flickr30k", "val", "c.json", '[{"image": "val2014/COCO_val2014_000000000009.jpg", "caption": "b"}]', None),
        # Converted, they would be refused again.
        (
            "own_retrieval",
            "val",
            "o.json",
            '[{"image": "a.jpg", "caption": ["b"]}, {"image": "./a.jpg", "caption": ["c"]}]',
            None,
        ),
        (
            "msrvtt_qa_aurora",
            "train",
            "q.json",
            '[{"video_id": "video1", "question": "?...", "answer": "b"}, {"video_id": "video1", "question": "...", '
            '"answer": "b"}]',
            None,
        ),
    ],
)
def test_a_file_in_the_layout_of_others_names_the_command(tmp_path, monkeypatch, dataset, split, name, text, command):
    monkeypatch.chdir(tmp_path)
    Path(name).write_text(text, encoding="utf-8")
    builder = registry.get_builder_class(dataset)
    cls = builder.train_dataset_cls if split == "train" else builder.eval_dataset_cls
    checks = list(checks_of(dataset, None, cls))
    key = f"datasets.{dataset}.build_info.annotations.{split}.storage"
    with pytest.raises(AuroraError, match=f"^{key}: ") as caught:
        check_split([name], checks, split, key)
    found = re.search(
        "; `python -m lavis_aurora.data.convert (.*)` makes a file of it that LAVIS reads", str(caught.value)
    )
    assert (found and found[1]) == command


# Karpathy's


def karpathy_file(folder: Path, name: str) -> Path:
    images = [
        {
            "filename": f"COCO_val2014_{70 + i:012}.jpg" if name == "coco" else f"{i}.jpg",
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

    def file(i: int) -> str:
        return f"COCO_val2014_{70 + i:012}.jpg" if name == "coco" else f"{i}.jpg"

    main(["karpathy", str(karpathy_file(tmp_path, name)), "--output", str(tmp_path / "out")])
    parts = readable(tmp_path / "out", pattern, RetrievalDataset, RetrievalEvalDataset)
    assert parts["train"] == [
        {"image": f"{folders[i]}/{file(i)}", "caption": f"Sentence {s} of {i}.", "image_id": f"{name}_{number + i}"}
        for i in range(2)
        for s in range(2)
    ]
    texts = [f"Sentence {s} of 2." for s in range(2)]
    assert parts["val"] == [{"image": f"{folders[1]}/{file(2)}", "caption": texts}]
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


def test_the_1k_test_has_one_sentence_of_each_video(tmp_path, published):
    """Frozen-in-time's list alone would make all sentences of a video right, another test."""
    annotations = [{"image_id": f"video{i}", "caption": f"{i} {s}"} for i in range(3) for s in range(2)]
    (tmp_path / "MSR_VTT.json").write_text(json.dumps({"annotations": annotations}))
    (tmp_path / "val_list_jsfusion.txt").write_text("video0\n")
    published("msrvtt 9k", train=2, test=1)
    files = [str(tmp_path / name) for name in ("MSR_VTT.json", "val_list_jsfusion.txt")]
    with pytest.raises(AuroraError, match="test has 2 sentences, not one of each video, as MSRVTT_JSFUSION_test.csv"):
        main(["msrvtt", *files, "--output", str(tmp_path / "out")])


def test_numbers_of_another_split_name_it(tmp_path, msrvtt, published):
    published("msrvtt 9k", train=9, test=2)
    published("msrvtt 7k", train=10, test=2)
    with pytest.raises(
        AuroraError, match="train has 10, not 9 .*: give --split 7k, whose numbers these are, or give --allow"
    ):
        main(msrvtt)


# One's own


@pytest.mark.parametrize("command", ["coco", "flickr30k"])
def test_the_same_number_in_two_folders_is_not_one_picture(tmp_path, command):
    entries = [{"image": "beach/1.jpg", "caption": "a dog"}, {"image": "city/1.jpg", "caption": "a tram"}]
    (tmp_path / "train.json").write_text(json.dumps(entries))
    argv = [str(tmp_path / "train.json"), "--output", str(tmp_path / "out"), "--allow-partial"]
    expected = "train.json: 'beach/1.jpg' is no name .* of this benchmark; .*`convert own`"
    with pytest.raises(AuroraError, match=expected):
        main([command, *argv])
    assert not (tmp_path / "out").exists()
    main(["own", *argv])
    assert [entry["image"] for entry in read(tmp_path / "out" / "train.json")] == ["beach/1.jpg", "city/1.jpg"]


@pytest.mark.parametrize(
    ("command", "names"),
    [
        ("coco", ["train2014/COCO_train2014_000000000009.jpg", "a/COCO_train2014_000000000009.jpg"]),
        ("coco", ["train2017/000000000009.jpg", "images/train2017/000000000009.jpg"]),
        ("flickr30k", ["flickr30k-images/1000092795.jpg", "a/flickr30k_images/1000092795.jpg", "1000092795.jpg#0"]),
    ],
)
def test_published_names_of_one_picture(tmp_path, command, names):
    entries = [{"image": name, "caption": name} for name in names]
    (tmp_path / "train.json").write_text(json.dumps(entries))
    main(["auto", str(tmp_path / "train.json"), "--output", str(tmp_path / command), "--allow-partial"])
    [path] = (tmp_path / command).iterdir()
    assert len({entry["image"] for entry in read(path)}) == 1


@pytest.mark.parametrize("role", ["", "train="])
@pytest.mark.parametrize(
    ("name", "text"), [("a.json", '[{"image": "a.jpg", "title": "x"}]'), ("a.csv", "image,title\na.jpg,x\n")]
)
def test_an_unknown_key_of_captions(tmp_path, name, text, role):
    (tmp_path / name).write_text(text)
    expected = f"^{tmp_path}/{name}: entries have 'image', 'title', none of caption, captions, .*; rename"
    with pytest.raises(AuroraError, match=expected):
        main(["own", f"{role}{tmp_path}/{name}", "--output", str(tmp_path / "out")])


def test_kaggles_row_without_a_bar(tmp_path):
    (tmp_path / "results.csv").write_text(
        "image_name| comment_number| comment\n2199200615.jpg| 3| A dog .\n"
        "2199200615.jpg| 4   A dog runs across the grass .\n"
    )
    (tmp_path / "train.txt").write_text("2199200615.jpg\n")
    files = [str(tmp_path / name) for name in ("results.csv", "train.txt")]
    main(["flickr30k", *files, "--output", str(tmp_path / "out"), "--allow-partial"])
    captions = [entry["caption"] for entry in read(tmp_path / "out" / "train.json")]
    assert captions == ["A dog .", "A dog runs across the grass ."]


def test_a_picture_without_a_text(tmp_path, capsys):
    path = tmp_path / "train.csv"
    path.write_text("image,caption\na.jpg,a dog\nb.jpg,\n")
    argv = ["own", str(path), "--output", str(tmp_path / "out")]
    expected = f"^{path}: 1 images of train have no text: b.jpg; leave it out, or give --allow-partial to go on"
    with pytest.raises(AuroraError, match=expected):
        main(argv)
    main([*argv, "--allow-partial"])
    assert "left out: 1 images of train have no text: b.jpg\n" in capsys.readouterr().out
    assert [entry["image"] for entry in read(tmp_path / "out" / "train.json")] == ["a.jpg"]
    path.write_text("image,caption\nb.jpg,\n")
    with pytest.raises(AuroraError, match="have no text: b.jpg; leave it out; none is left"):
        main([*argv, "--allow-partial"])


def test_excels_line_of_the_separator(tmp_path):
    path = tmp_path / "train.csv"
    path.write_text("\ufeffsep=;\r\nimage;caption\r\na.jpg;a dog, an old, grey one\r\n", encoding="utf-8")
    main(["own", str(path), "--output", str(tmp_path / "out")])
    assert read(tmp_path / "out" / "train.json")[0]["caption"] == "a dog, an old, grey one"
    path.write_text("sep=;\nimage;caption\na.jpg\n")
    with pytest.raises(AuroraError, match="line 3 has 1 columns"):
        main(["own", str(path)])


@pytest.mark.parametrize(
    "content",
    [
        {"images": ["a.jpg"], "captions": ["a dog"]},
        {"image": ["a.jpg"], "caption": [["a dog", "it runs"]]},
        {"image": {"0": "a.jpg"}, "caption": {"0": "a dog"}},
    ],
)
def test_json_of_columns_is_named(tmp_path, content):
    path = tmp_path / "train.json"
    path.write_text(json.dumps(content))
    with pytest.raises(AuroraError, match=f"^{path}: it holds columns, 'images?', 'captions?'; save it as a list of"):
        main(["own", str(path)])


def test_a_folder_is_no_video(tmp_path):
    (tmp_path / "a.mp4").mkdir()
    (tmp_path / "b.mp4").touch()
    assert set(videos_in(tmp_path)) == {"b", "b.mp4"}


# All


def test_a_locale_without_utf_8(tmp_path):
    encoding = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    (tmp_path / "train.csv").write_text("image;caption\ncafé.jpg;ein großer Hund\n", encoding="utf-8-sig")
    (tmp_path / "é.jsonl").write_text('{"image": "é.jpg", "caption": "ä"}\n', encoding="utf-8")
    files = [str(tmp_path / "train.csv"), f"val={tmp_path}/é.jsonl"]
    command = [sys.executable, "-m", "lavis_aurora.data.convert", "own", *files, "--output", str(tmp_path / "é")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, check=False, env={**os.environ, **encoding})
    assert done.returncode == 0, done.stderr
    [entry] = read(tmp_path / "é" / "train.json")
    assert (entry["image"], entry["caption"]) == ("café.jpg", "ein großer Hund")
    assert (tmp_path / "é" / "train.json").read_bytes().isascii()


def test_what_is_there_stays(tmp_path, msrvtt, published, capsys):
    published("msrvtt 9k", train=10, test=2)
    published("msrvtt 7k", train=8, test=2)
    main(msrvtt)
    before = read(tmp_path / "out" / "retrieval_train.json")
    main(msrvtt)  # the same again
    with pytest.raises(
        AuroraError, match="retrieval_train.json is there already and holds something else; .*--overwrite"
    ):
        main([*msrvtt, "--split", "7k"])
    assert read(tmp_path / "out" / "retrieval_train.json") == before
    capsys.readouterr()
    main([*msrvtt, "--split", "7k", "--overwrite"])
    assert len(read(tmp_path / "out" / "retrieval_train.json")) == 24 < len(before)
    assert "  replaced: retrieval_train.json\n" in capsys.readouterr().out


def test_files_lie_where_the_yamls_look():
    """Names below the data root are those of LAVIS's own YAMLs."""
    import lavis

    configs = Path(lavis.__file__).parent / "configs/datasets"
    for name, yaml in (
        ("msrvtt full", "msrvtt/defaults_ret.yaml"),
        ("didemo", "didemo/defaults_ret.yaml"),
        ("coco", "coco/defaults_ret.yaml"),
        ("flickr30k", "flickr30k/defaults.yaml"),
        ("msrvtt_qa", "msrvtt/defaults_qa.yaml"),
    ):
        [section] = OmegaConf.load(configs / yaml).datasets.values()
        for part, info in section.build_info.annotations.items():
            assert info.storage == PUBLISHED[name].files.format(part)
    for name in ("own_retrieval", "own_video_retrieval"):
        annotations = (
            OmegaConf.load(package_file(f"configs/datasets/{name}.yaml")).datasets[name].build_info.annotations
        )
        for part, info in annotations.items():
            assert info.storage == PUBLISHED[name[: -len("_retrieval")]].files.format(part)
    assert len({split.files for name, split in PUBLISHED.items() if name.startswith("msrvtt ")}) == 1


def test_published_numbers():
    counts = {name: split.counts for name, split in PUBLISHED.items()}
    assert counts["coco"] == {"train": 113_287, "val": 5000, "test": 5000}
    assert sum(counts["msrvtt full"].values()) == sum(counts["msrvtt 9k"].values()) == 10_000
    assert counts["msrvtt full"]["train"] + counts["msrvtt full"]["val"] == counts["msrvtt 7k"]["train"]
    assert sum(PUBLISHED["msrvtt_qa"].questions.values()) == 243_680
    assert counts["msrvtt_qa"] == counts["msrvtt full"]
    assert all(split.source or name.startswith("own") for name, split in PUBLISHED.items())


def test_nothing_is_half_written(tmp_path, msrvtt, published, monkeypatch):
    published("msrvtt 9k", train=10, test=2)
    published("msrvtt 7k", train=8, test=2)
    main(msrvtt)
    before = {path.name: path.read_text() for path in (tmp_path / "out").iterdir()}

    # Whatever is written there meets a full disk.
    original = io.open

    def no_space(path, mode="r", *args, **kwargs):
        full = str(path).endswith("retrieval_val.json.partial")
        if full:
            kwargs.pop("opener", None)  # that of Path.open before Python 3.10 opens its own path
        return original("/dev/full" if full else path, "wb" if full else mode, *args, **kwargs)

    patch_open(monkeypatch, no_space)
    with pytest.raises(AuroraError, match="cannot write .*retrieval_val.json .No space left"):
        main([*msrvtt, "--split", "7k", "--overwrite"])
    assert {path.name: path.read_text() for path in (tmp_path / "out").iterdir()} == before


@pytest.mark.filterwarnings("ignore:.*found in sys.modules")
def test_the_module_reports_an_error_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["convert", "karpathy", str(tmp_path / "absent.json")])
    with pytest.raises(SystemExit, match=f"^error: {tmp_path}/absent.json is not a readable file.*$") as ended:
        runpy.run_module("lavis_aurora.data.convert", run_name="__main__")
    assert "\n" not in str(ended.value)
