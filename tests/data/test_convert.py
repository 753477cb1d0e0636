"""The converter: what it writes of one's own files, published numbers, nothing half-written."""

from __future__ import annotations

import io
import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf
from runs import patch_open

from lavis_aurora.common.errors import AuroraError
from lavis_aurora.common.files import read_json as read
from lavis_aurora.common.paths import package_file
from lavis_aurora.data.convert import PUBLISHED, main, videos_in

ROOT = Path(__file__).resolve().parents[2]


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
    """What it writes; and what is opened without an encoding afterwards, as LAVIS opens annotations, is UTF-8 too.

    What the terminal cannot show is escaped. LAVIS, which takes long to import, is not needed.
    """
    encoding = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    (tmp_path / "train.csv").write_text("image;caption\ncafé.jpg;ein großer Hund\n", encoding="utf-8-sig")
    (tmp_path / "é.jsonl").write_text('{"image": "é.jpg", "caption": "ä"}\n', encoding="utf-8")
    files = [str(tmp_path / "train.csv"), f"val={tmp_path}/é.jsonl"]
    (tmp_path / "a.json").write_text('["ä"]', encoding="utf-8")
    code = (
        "import importlib.util, json, runpy\nfound = importlib.util.find_spec\n"
        "importlib.util.find_spec = lambda name, *rest: None if name == 'lavis' else found(name, *rest)\n"
        "runpy.run_module('lavis_aurora.data.convert', run_name='__main__')\n"
        f"print(json.load(open({str(tmp_path / 'a.json')!r})))"
    )
    command = [sys.executable, "-c", code, "own", *files, "--output", str(tmp_path / "é")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, check=False, env={**os.environ, **encoding})
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == b"['\\xe4']"
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
        full = "retrieval_val.json." in str(path)
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
