"""Annotations in the layouts of others become LAVIS's entries, whatever the names of their keys and files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from lavis.datasets.datasets.video_vqa_datasets import VideoQADataset

from lavis_aurora.common.errors import AuroraError
from lavis_aurora.data.annotations import check_entries
from lavis_aurora.data.checks import checks_of
from lavis_aurora.data.convert import PUBLISHED, main
from lavis_aurora.data.layouts import read_annotations


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def jsonl(*entries: dict) -> str:
    return "".join(json.dumps(entry) + "\n" for entry in entries)


ONE = {"train": [("video1.mp4", "a dog"), ("video1.mp4", "it runs")], "test": [("video2.mp4", ["a cat"])]}
# Of each layout: the command, the files, and what is written (for msrvtt, val is test).
CAPTIONS = {
    "ALPRO, ClipBERT, Aurora: json lines": (
        ["msrvtt", "train.jsonl", "test.jsonl"],
        {
            "train.jsonl": jsonl(
                {"caption": "a dog", "clip_name": "video1", "sen_id": 1},
                {"caption": "it runs", "clip_name": "video1", "sen_id": 2},
            ),
            "test.jsonl": jsonl({"caption": "a cat", "clip_name": "video2", "retrieval_key": "ret0"}),
        },
        ONE,
    ),
    "UniAdapter, Aurora: json lines named json": (
        ["msrvtt", "train_videodatainfo.json", "msrvtt_test.jsonl"],
        {
            "train_videodatainfo.json": jsonl(
                {"clip_name": "video1", "caption": "a dog"}, {"clip_name": "video1", "caption": "it runs"}
            ),
            "msrvtt_test.jsonl": jsonl({"clip_name": "video2", "retrieval_key": "ret0", "caption": "a cat"}),
        },
        ONE,
    ),
    "VindLU, UMT": (
        ["msrvtt", "msrvtt_ret_train9k.json", "msrvtt_ret_test1k.json"],
        {
            "msrvtt_ret_train9k.json": json.dumps([{"video": "video1.mp4", "caption": ["a dog", "it runs"]}]),
            "msrvtt_ret_test1k.json": json.dumps([{"video": "video2.mp4", "caption": "a cat"}]),
        },
        ONE,
    ),
    "hubs' json of MSR-VTT": (
        ["msrvtt", "msrvtt_train_9k.json", "msrvtt_test_1k.json"],
        {
            "msrvtt_train_9k.json": json.dumps(
                [
                    {
                        "video_id": "video1",
                        "video": "video1.mp4",
                        "caption": ["a dog", "it runs"],
                        "category": 9,
                        "id": 1,
                    }
                ]
            ),
            "msrvtt_test_1k.json": json.dumps([{"video_id": "video2", "video": "video2.mp4", "caption": "a cat"}]),
        },
        ONE,
    ),
    "Frozen-in-time": (
        ["msrvtt", "MSR_VTT.json", "train_list_jsfusion.txt", "MSRVTT_JSFUSION_test.csv"],
        {
            "MSR_VTT.json": json.dumps(
                {
                    "info": {},
                    "images": [{"id": f"video{i}"} for i in (1, 2, 3)],
                    "annotations": [
                        {"image_id": f"video{i}", "caption": caption, "id": i}
                        for i, caption in ((1, "a dog"), (1, "it runs"), (2, "not this one"), (3, "nor this"))
                    ],
                }
            ),
            "train_list_jsfusion.txt": "video1\n",
            "MSRVTT_JSFUSION_test.csv": "key,vid_key,video_id,sentence\nret0,msr2,video2,a cat\n",
        },
        ONE,
    ),
    "CLIP4Clip": (
        ["msrvtt", "MSRVTT_data.json", "MSRVTT_train.9k.csv", "MSRVTT_JSFUSION_test.csv"],
        {
            "MSRVTT_data.json": json.dumps(
                {
                    "videos": [
                        {"video_id": f"video{i}", "split": s} for i, s in ((1, "train"), (2, "test"), (3, "test"))
                    ],
                    "sentences": [
                        {"video_id": f"video{i}", "caption": caption, "sen_id": i}
                        for i, caption in ((1, "a dog"), (1, "it runs"), (2, "not this one"), (3, "nor this"))
                    ],
                }
            ),
            "MSRVTT_train.9k.csv": "video_id\nvideo1\n",
            "MSRVTT_JSFUSION_test.csv": "\ufeffkey;vid_key;video_id;sentence\r\nret0;msr2;video2;a cat\r\n",
        },
        ONE,
    ),
    "VindLU's DiDeMo": (
        ["didemo", "didemo_ret_train.json", "didemo_ret_test.json"],
        {
            "didemo_ret_train.json": json.dumps([{"video": "1@N00_1_a.mp4", "caption": ["a dog", "it runs"]}]),
            "didemo_ret_test.json": json.dumps([{"video": "2@N00_2_b.mp4", "caption": ["a cat", "it sits"]}]),
        },
        {"train": [("1@N00_1_a.mp4", "a dog it runs")], "test": [("2@N00_2_b.mp4", ["a cat it sits"])]},
    ),
    "ALPRO's DiDeMo": (
        ["didemo", "train.jsonl"],
        {"train.jsonl": jsonl({"clip_name": "1@N00_1_a.mov", "caption": "a dog. it runs.", "retrieval_key": "x"})},
        {"train": [("1@N00_1_a.mov", "a dog. it runs.")]},
    ),
    "Flickr30K, nlphuji": (
        ["flickr30k", "flickr_annotations_30k.csv"],
        {
            "flickr_annotations_30k.csv": "raw,sentids,split,filename,img_id\n"
            '"[""Two men, outside."", ""They\'re \\""friends\\""""]","[0, 1]",train,1000092795.jpg,0\n'
            '"[""A cat.""]",[2],val,10002456.jpg,1\n"[""A tree.""]",[3],test,1000268201.jpg,2\n'
        },
        {
            "train": [
                ("flickr30k-images/1000092795.jpg", "Two men, outside."),
                ("flickr30k-images/1000092795.jpg", 'They\'re "friends"'),
            ],
            "val": [("flickr30k-images/10002456.jpg", ["A cat."])],
            "test": [("flickr30k-images/1000268201.jpg", ["A tree."])],
        },
    ),
    "Flickr30K, Kaggle's results.csv with lists": (
        ["flickr30k", "results.csv", "train.txt", "test.txt"],
        {
            "results.csv": "image_name| comment_number| comment\n1000092795.jpg| 0| Two men , outside .\n"
            "1000092795.jpg| 1| Friends .\n10002456.jpg| 0| A cat .\n",
            "train.txt": "1000092795\n",
            "test.txt": "10002456.jpg\n",
        },
        {
            "train": [
                ("flickr30k-images/1000092795.jpg", "Two men , outside ."),
                ("flickr30k-images/1000092795.jpg", "Friends ."),
            ],
            "test": [("flickr30k-images/10002456.jpg", ["A cat ."])],
        },
    ),
    "Flickr30K's own token file with a list": (
        ["flickr30k", "results_20130124.token", "test=names"],
        {"results_20130124.token": "10002456.jpg#0\tA cat , it sits .\n", "names": "10002456\n"},
        {"test": [("flickr30k-images/10002456.jpg", ["A cat , it sits ."])]},
    ),
    "COCO's captions with Karpathy's lists": (
        ["coco", "captions_train2014.json", "captions_val2014.json", "karpathy_train_images.txt", "ids.json"],
        {
            f"captions_{part}2014.json": json.dumps(
                {
                    "info": {},
                    "images": [{"id": i, "file_name": f"COCO_{part}2014_{i:012}.jpg"} for i in numbers],
                    "licenses": [],
                    "annotations": [{"image_id": i, "id": 9 * i, "caption": f"A picture, {i}.\n"} for i in numbers],
                }
            )
            for part, numbers in (("train", [9]), ("val", [42, 73, 74]))
        }
        | {
            "karpathy_train_images.txt": "train2014/COCO_train2014_000000000009.jpg 9\n"
            "COCO_val2014_000000000042.jpg 42\n",
            "ids.json": json.dumps({"val": [73], "test": [74]}),
        },
        {
            "train": [
                ("train2014/COCO_train2014_000000000009.jpg", "A picture, 9."),
                ("val2014/COCO_val2014_000000000042.jpg", "A picture, 42."),
            ],
            "val": [("val2014/COCO_val2014_000000000073.jpg", ["A picture, 73."])],
            "test": [("val2014/COCO_val2014_000000000074.jpg", ["A picture, 74."])],
        },
    ),
    "own captions": (
        ["own", "train.tsv", "val=Café.csv"],
        {"train.tsv": "\ufeffimage\tcaption\nÄ/1.jpg\tein Hund, groß\n", "Café.csv": 'image;caption\nb.png;"a; b"\n'},
        {"train": [("Ä/1.jpg", "ein Hund, groß")], "val": [("b.png", ["a; b"])]},
    ),
}


@pytest.mark.parametrize("auto", [False, True], ids=["named", "auto"])
@pytest.mark.parametrize("layout", CAPTIONS)
def test_captions(tmp_path, capsys, layout, auto):
    (command, *names), files, expected = CAPTIONS[layout]
    for name, text in files.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    paths = [f"{tmp_path}/{name}" if "=" not in name else name.replace("=", f"={tmp_path}/") for name in names]
    argv = ["auto" if auto else command, *paths, "--output", str(tmp_path / "out"), "--allow-partial"]
    if auto and command == "own":
        with pytest.raises(AuroraError, match="files of no benchmark; in place of auto say of which: msrvtt, "):
            main(argv)
        return
    main(argv)
    out = capsys.readouterr().out
    if auto:
        assert f"{tmp_path}/{names[0].split('=')[-1]}: " in out and f", {command}\n" in out
    media = "image" if command in ("coco", "flickr30k", "own") else "video"
    if command == "msrvtt":
        expected = {**expected, "val": expected["test"]}
    pattern = Path(PUBLISHED[{"msrvtt": "msrvtt 9k"}.get(command, command)].files).name
    assert {path.name for path in (tmp_path / "out").iterdir()} == {pattern.format(part) for part in expected}
    for part, entries in expected.items():
        written = read(tmp_path / "out" / pattern.format(part))
        assert [(entry[media], entry["caption"]) for entry in written] == entries
        assert ("image_id" in written[0]) == (media == "image" and part == "train")
    for part in {"train", "val", "test"} - expected.keys():
        assert f"{part}: no file of it was given, none is written" in out


QA = {
    "of its authors": (
        "train_qa.json",
        [{"answer": "couch", "category_id": 14, "id": 158, "question": "what?", "video_id": 7}],
    ),
    "ClipBERT, ALPRO": (
        "train.jsonl",
        {"answer": "couch", "question": "what?", "video_id": "video7", "answer_type": "what"},
    ),
    "VindLU, UMT": (
        "msrvtt_qa_train.json",
        [{"question_id": 158, "question": "what?", "answer": "couch", "video": "video7.mp4"}],
    ),
    "csv": ("train.csv", "video_id,question,answer,id\nvideo7,what?,couch,158\n"),
}


@pytest.mark.parametrize("command", ["msrvtt_qa", "auto"])
@pytest.mark.parametrize("layout", QA)
def test_questions(tmp_path, layout, command):
    name, content = QA[layout]
    (tmp_path / name).write_text(content if isinstance(content, str) else json.dumps(content) + "\n")
    main([command, str(tmp_path / name), "--output", str(tmp_path / "out"), "--allow-partial"])
    [entry] = read(tmp_path / "out" / "qa_train.json")
    number = entry.pop("question_id")
    assert entry == {"video": "video7.mp4", "question": "what?", "answer": "couch"}
    assert str(number) == ("0" if layout.startswith("Clip") else "158")
    [checks] = checks_of("", None, VideoQADataset)
    check_entries([{**entry, "question_id": number}], checks.entries, "train", "key")
    assert read(tmp_path / "out" / "qa_ans2label.json") == {"couch": 0}


def test_the_most_frequent_answers_are_ranked(tmp_path, monkeypatch):
    monkeypatch.setattr("lavis_aurora.data.convert.ANSWERS", 2)
    answers = ["a", "b", "b", "c", "c", "c"]
    entries = [{"video_id": i % 2, "question": "what?", "answer": answer} for i, answer in enumerate(answers)]
    (tmp_path / "train_qa.json").write_text(json.dumps(entries))
    argv = ["msrvtt_qa", str(tmp_path / "train_qa.json"), "--output", str(tmp_path / "out")]
    with pytest.raises(AuroraError, match="train has 2, not 6513; train has 6 questions, not 158581 .*xudejing"):
        main(argv)
    main([*argv, "--allow-partial"])
    assert read(tmp_path / "out" / "qa_ans2label.json") == {"c": 0, "b": 1}
    assert sorted(entry["question_id"] for entry in read(tmp_path / "out" / "qa_train.json")) == list(range(6))


@pytest.mark.parametrize(
    ("command", "files", "message"),
    [
        (
            "msrvtt",
            {"train_qa.json": '[{"video_id": 1, "question": "a", "answer": "b"}]'},
            "holds questions about videos",
        ),
        ("msrvtt_qa", {"train.json": '[{"video_id": 1, "caption": "a"}]'}, "holds captions, which msrvtt_qa has not"),
        (
            "msrvtt_qa",
            {"a.json": '[{"video_id": 1, "question": "a", "answer": "b"}]'},
            "of which split is .*train=.*a.json",
        ),
        ("msrvtt", {"train.json": '[{"video": "dog.mp4", "caption": "a"}]'}, "'dog.mp4' is no name of a video"),
        ("coco", {"train.csv": "image_id,caption\n42,a\n"}, "'42' does not say its folder"),
        (
            "coco",
            {"captions_val2014.json": '{"images": [], "annotations": [{"image_id": 1, "caption": "a"}]}'},
            "which split",
        ),
        ("own", {"list.txt": "a.jpg\n"}, "list.txt: the names of which split"),
        (
            "own",
            {"train.json": '[{"image": "a", "caption": "b"}]', "train.csv": "image,caption\na,c\n"},
            "'a' is in .* too",
        ),
        ("own", {"train.csv": "image,caption\na.jpg,\"['two men' 'outside']\"\n"}, "a list without commas"),
    ],
)
def test_what_cannot_be_told_is_refused(tmp_path, command, files, message):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    argv = [command, *(str(tmp_path / name) for name in files), "--output", str(tmp_path / "out"), "--allow-partial"]
    with pytest.raises(AuroraError, match=message):
        main(argv)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("text", "texts"),
    [
        ('[{"image": "a", "sentences": [{"raw": "b", "tokens": ["b"]}, "c"]}]', ("b", "c")),
        ('[{"image": "a", "captions": ["b", " ", ""]}]', ("b",)),
        ('{"image": "a", "caption": "b"}', ("b",)),
        ('image,caption\na,"b\nc"\n', ("b\nc",)),
        ("Image, Caption\r\na, b\r\n\r\n", ("b",)),
        ('image,raw\na,"[\'b\', ""c\'s""]"\n', ("b", "c's")),
        ("image,caption\na,[music] a man\n", ("[music] a man",)),
        ('image\tcaption\na\t"""quoted"", he said"\n', ('"quoted", he said',)),
    ],
)
def test_forms_of_captions(tmp_path, text, texts):
    (tmp_path / "file").write_text(text)
    [row] = read_annotations(tmp_path / "file").rows
    assert (row.item, row.texts) == ("a", texts)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"\xff\xfei\x00", "is not a readable file of annotations .*save it as UTF-8 text"),
        (b'{"image": "a", "caption": "b"}\n{"image": ', "is not readable json lines .* in line 2 of the file"),
        (b'[{"image": "a", "caption": "b"}', "is not readable json"),
        (
            b"image,caption\na.jpg,a dog, running\n",
            "line 2 has 3 columns, not 2; mend it; a text that holds ',' needs quotes",
        ),
        (b"image|number|caption\na.jpg|4 a dog\n", "line 2 has 2 columns, not 3"),
        (b"path,words\na.jpg,a dog\n", "the header has none of video, .*; it has 'path', 'words'"),
        (b'image,caption\na,"b', "is not a readable csv file .*two for each"),
        (b'image|caption\na| "b" he said\n', "is not a readable csv file .line 2"),
        (b'{"a": {"caption": "b"}}', "no known layout of annotations has 'a'; docs/data.md"),
        (b'[{"image": null, "caption": "b"}]', "entry 0 has none of video"),
        (b'[{"image": ["a"], "caption": "b"}]', r"entry 0 must be a text or a number, not \['a'\]"),
        (b'[{"image": "a", "caption": "b", "split": "tset"}]', "the split of entry 0 is 'tset'; did you mean 'test'"),
        (b'[{"video": "a", "question": "b", "answer": ""}]', "answer of entry 0 must be a text or a number, not ''"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path, text, message):
    (tmp_path / "file.csv").write_bytes(text)
    with pytest.raises(AuroraError, match=f"^{tmp_path}/file.csv.*{message}"):
        read_annotations(tmp_path / "file.csv")
