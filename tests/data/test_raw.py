"""Published annotations of the benchmarks become entries that LAVIS reads, of the published splits."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from lavis.common.registry import registry
from lavis.datasets.datasets.retrieval_datasets import (
    RetrievalDataset,
    RetrievalEvalDataset,
    VideoRetrievalDataset,
    VideoRetrievalEvalDataset,
)

from lavis_aurora.common.errors import AuroraError
from lavis_aurora.common.files import read_json as read
from lavis_aurora.data.annotations import check_entries, check_split
from lavis_aurora.data.checks import checks_of
from lavis_aurora.data.convert import main


def readable(folder: Path, pattern: str, train_cls: type, eval_cls: type) -> dict[str, list[dict]]:
    """The entries written, by split, after the checks that a run makes."""
    parts = {part: read(folder / pattern.format(part)) for part in ("train", "val", "test")}
    for part, entries in parts.items():
        [checks] = checks_of("", None, train_cls if part == "train" else eval_cls)
        check_entries(entries, checks.entries, part, "key")
    assert not list(folder.glob("*.partial"))
    return parts


# MSR-VTT


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
