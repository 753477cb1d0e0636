"""Input that cannot be used: each gets one line that names what, where and the remedy; odd input works."""

from __future__ import annotations

import io
import json
import os
import re
import resource
import shutil
import signal
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import get_type_hints

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image
from runs import patch_open
from tiny import project_yaml, tiny_model

from lavis_aurora.common.errors import AuroraError
from lavis_aurora.config.check import parse_config
from lavis_aurora.config.models import RetrievalAuroraConfig, VqaAuroraConfig
from lavis_aurora.config.run import AnswerRunConfig, CaptionRunConfig, RetrievalRunConfig, RunConfig
from lavis_aurora.data.samples import CheckedDataset
from lavis_aurora.training.checkpoints import read_checkpoint
from lavis_aurora.training.runner import AuroraRunner
from lavis_aurora_cli import train

COUNT = 4


@pytest.fixture
def project(tmp_path: Path) -> Path:
    return project_yaml(tmp_path, count=COUNT)


def refused(capsys: pytest.CaptureFixture[str], project: Path, *options: str) -> str:
    """The one line of an error of training."""
    with pytest.raises(SystemExit) as caught:
        train(["--cfg-path", str(project), *(["--options", *options] if options else [])])
    assert caught.value.code == 1
    [line] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert not list(project.parent.glob("output/*/*.partial"))
    for checkpoint in project.parent.glob("output/*/*.pth"):
        read_checkpoint(checkpoint)
    return line


# Every key of model and run, misspelt


def keys(cls: type, prefix: str) -> list[tuple[type, str, str]]:
    """(top class, key with its sections, name) of every key."""
    found = []
    hints = get_type_hints(cls)
    for field in fields(cls):
        section = next(
            (t for t in (hints[field.name], *getattr(hints[field.name], "__args__", ())) if is_dataclass(t)), None
        )
        found.append(f"{prefix}{field.name}")
        if section is not None:
            found += keys(section, f"{prefix}{field.name}.")
    return found


KEYS = [
    (cls, top, key)
    for cls, top in (
        (RetrievalAuroraConfig, "model"),
        (VqaAuroraConfig, "model"),
        *((cls, "run") for cls in (RunConfig, RetrievalRunConfig, AnswerRunConfig, CaptionRunConfig)),
    )
    for key in keys(cls, "")
]


@pytest.mark.parametrize(("cls", "top", "key"), KEYS, ids=[f"{cls.__name__}.{key}" for cls, _, key in KEYS])
def test_every_key_misspelt_names_the_right_one(cls: type, top: str, key: str) -> None:
    parent, _, name = key.rpartition(".")
    # The last two letters swapped, or another letter behind them.
    wrong = name[:-2] + name[:-3:-1] if name[-1] != name[-2] else f"{name}x"
    cfg = OmegaConf.create()
    OmegaConf.update(cfg, f"{parent}.{wrong}" if parent else wrong, 1, force_add=True)
    with pytest.raises(AuroraError) as caught:
        parse_config(cls, cfg, top)
    message = str(caught.value)
    assert message.startswith(f"{top}.{parent + '.' if parent else ''}{wrong}: unknown key")
    assert repr(name) in message


UNKNOWN = {
    "vis_procesor": "vis_processor",
    "build_infos": "build_info",
    "typ": "type",
    "build_info.anotations.train.storage": "annotations",
    "build_info.annotations.tran.storage": "train",
    "build_info.annotations.vall.storage": "val",
    "build_info.annotations.train.storge": "storage",
    "build_info.annotations.train.urls": "url",
    "build_info.annotations.test.md": "md5",
    "build_info.image.storage": "images",
    "build_info.images.storages": "storage",
    "vis_processor.trian.name": "train",
    "vis_processor.eval.img_size": "image_size",
    "vis_processor.train.image_sizes": "image_size",
    "text_processor.evl.name": "eval",
    "text_processor.train.promt": "prompt",
    "text_processor.eval.maxwords": "max_words",
}


@pytest.mark.parametrize(("key", "near"), UNKNOWN.items())
def test_unknown_key_of_a_dataset(project: Path, capsys, key: str, near: str) -> None:
    line = refused(capsys, project, f"datasets.coco_retrieval.{key}=1")
    unknown, _, rest = line.removeprefix(f"error: {project}: datasets.coco_retrieval.").partition(": ")
    assert key == unknown or key.startswith(f"{unknown}."), line
    assert rest.startswith(f"unknown key; did you mean '{near}'"), line


@pytest.mark.parametrize(
    "key", ["build_info", "build_info.annotations", "build_info.annotations.train", "build_info.images"]
)
def test_a_value_in_place_of_a_section_of_a_dataset(project: Path, capsys, key: str) -> None:
    line = refused(capsys, project, f"datasets.coco_retrieval.{key}=7")
    assert f"{project}: datasets.coco_retrieval.{key}: must be a section of keys, not 7" in line


# Pictures


def replace(project: Path, split: str, index: int, name: str) -> Path:
    """Let an entry name another picture; returns its path."""
    data = project.parent / "data"
    file = data / f"{split}.json"
    entries = json.loads(file.read_text())
    entries[index]["image"] = name
    file.write_text(json.dumps(entries))
    return data / "images" / name


RNG = np.random.default_rng(0)
USABLE = {
    "grey": Image.fromarray(RNG.integers(0, 255, (64, 64), dtype=np.uint8)),
    "grey with alpha": Image.fromarray(RNG.integers(0, 255, (64, 64, 2), dtype=np.uint8), "LA"),
    "RGBA": Image.fromarray(RNG.integers(0, 255, (64, 64, 4), dtype=np.uint8), "RGBA"),
    "palette": Image.fromarray(RNG.integers(0, 255, (64, 64, 3), dtype=np.uint8)).quantize(16),
    "black and white": Image.new("1", (64, 64), 1),
    "one pixel": Image.new("RGB", (1, 1), (255, 0, 0)),
    "16 bits": Image.fromarray(np.full((8, 8), 1000, dtype=np.uint16)),
    "CMYK": Image.new("CMYK", (64, 64), (0, 255, 255, 0)),
}


@pytest.mark.filterwarnings("ignore")
def test_pictures_of_every_kind_are_read(project: Path) -> None:
    for index, split in ((i, s) for i in range(COUNT) for s in ("train", "val")):
        kind = list(USABLE)[index + COUNT * (split == "val")]
        suffix = "jpg" if kind == "CMYK" else "png"
        USABLE[kind].save(replace(project, split, index, f"{split}_{index}.{suffix}"))
    train(["--cfg-path", str(project)])
    [run] = (project.parent / "output").iterdir()
    assert all(t.isfinite().all() for t in read_checkpoint(run / "checkpoint_latest.pth")["model"].values())


def floats(path: Path) -> None:
    Image.fromarray(np.ones((8, 8), dtype=np.float32)).save(path, format="TIFF")


def bomb(path: Path) -> None:
    # A small file that would fill 400 million pixels.
    Image.new("1", (20_000, 20_000)).save(path)


SPOILED = {
    "floats": (floats, "nothing says which value is white in its mode, F; convert it to 8 bits a channel"),
    "bomb": (bomb, "decompression bomb"),
    "html": (lambda path: path.write_text("<html>not found</html>"), "cannot identify image file"),
    "zero bytes": (lambda path: path.write_bytes(b""), "it is empty"),
    "truncated": (lambda path: path.write_bytes(b"\x89PNG\r\n\x1a\n\x00\x00"), "cannot identify image file"),
    "missing": (lambda path: None, "No such file"),
    "pipe": (os.mkfifo, "it is a pipe, not a file"),
    "folder": (os.mkdir, "it is a folder, not a file"),
    "link to a device": (lambda path: path.symlink_to("/dev/zero"), "it is a device, not a file"),
}


# One class reads the pictures of all splits; what a validation says follows an epoch of training.
@pytest.mark.parametrize(
    ("kind", "split"), [*((kind, "train") for kind in SPOILED), ("truncated", "val"), ("folder", "val")]
)
def test_pictures_that_cannot_be_used(project: Path, capsys, split: str, kind: str) -> None:
    make, problem = SPOILED[kind]
    path = replace(project, split, 1, "odd.png")
    make(path)
    line = refused(capsys, project)
    assert f"coco_retrieval {split}: cannot read " in line and str(path) in line and problem in line


# Captions and entries


def edit(project: Path, split: str, change: Callable[[list[dict]], object]) -> None:
    file = project.parent / "data" / f"{split}.json"
    entries = json.loads(file.read_text())
    change(entries)
    file.write_text(json.dumps(entries, ensure_ascii=False), encoding="utf-8")


ODD_TEXTS = [
    "猫が二匹いる",
    "🐈 🐕",
    "Ω∑ é ñ",
    "word " * 500,
    "x" * 5000,
    "a\tcat\nsits",
    "[ENC] [CLS] [MASK]",
    "?!",
]


def test_captions_of_every_kind_are_read(project: Path) -> None:
    for split in ("train", "val"):

        def odd(entries: list[dict], split: str = split) -> None:
            for i, entry in enumerate(entries):
                text = ODD_TEXTS[i + COUNT * (split == "val")]
                entry["caption"] = text if split == "train" else [text]

        edit(project, split, odd)
    train(["--cfg-path", str(project)])


@pytest.mark.parametrize(
    ("text", "split"), [*((text, "train") for text in ("", "   ", None, 3)), ("", "val"), (3, "val"), ("   ", "test")]
)
def test_captions_that_are_none(project: Path, capsys, split: str, text: object) -> None:
    edit(project, split, lambda entries: entries[2].update(caption=text if split == "train" else [text]))
    line = refused(capsys, project)
    assert f"the caption of entry 2 of {project.parent / 'data' / split}.json must be" in line


NO_PATHS = [None, True, 7, 0.5, float("nan"), ["a.jpg"], {"a": "a.jpg"}, "", " "]


@pytest.mark.parametrize(
    ("value", "split"), [*((value, "train") for value in NO_PATHS), (None, "val"), (["a.jpg"], "val"), ("", "val")]
)
def test_a_picture_that_is_no_path(project: Path, capsys, split: str, value: object) -> None:
    edit(project, split, lambda entries: entries[1].update(image=value))
    line = refused(capsys, project)
    assert f"the image of entry 1 of {project.parent / 'data' / split}.json must be the path of one file" in line


@pytest.mark.parametrize("value", [None, True, 0.5, float("nan"), [1], {"a": 1}, 2**63])
def test_a_picture_whose_id_is_none(project: Path, capsys, value: object) -> None:
    """All with null or true would count as one picture, each with NaN as another."""
    edit(project, "train", lambda entries: entries[1].update(image_id=value))
    assert "the image_id of entry 1 of" in refused(capsys, project)


def test_a_huge_value_is_not_repeated(project: Path, capsys) -> None:
    edit(project, "train", lambda entries: entries[1].update(caption=["x" * 10_000_000]))
    assert len(refused(capsys, project)) < 1000
    edit(project, "train", lambda entries: entries[1].update(caption="a cat", image="x" * 10_000_000))
    assert len(refused(capsys, project)) < 5000


@pytest.mark.parametrize("depth", [900, 1_000_000])
def test_annotations_nested_too_deep(project: Path, capsys, depth: int) -> None:
    file = project.parent / "data" / "train.json"
    file.write_text(file.read_text().replace('"train/001.jpg"', "[" * depth + "]" * depth))
    assert "annotations.train.storage: " in refused(capsys, project)


def test_annotations_that_are_a_pipe(project: Path, capsys) -> None:
    file = project.parent / "data" / "val.json"
    file.unlink()
    os.mkfifo(file)
    assert f"annotations.val.storage: {file}: it is a pipe, not a file" in refused(capsys, project)
    project.unlink()
    os.mkfifo(project)
    assert f"{project}: it is a pipe, not a file" in refused(capsys, project)


@pytest.mark.parametrize("split", ["val", "test"])
def test_a_picture_that_is_to_be_ranked_twice(project: Path, capsys, split: str) -> None:
    edit(project, split, lambda entries: entries[3].update(image=entries[1]["image"]))
    assert "entries 1 and 3 of" in refused(capsys, project)


def test_a_picture_may_be_trained_on_with_several_captions(project: Path) -> None:
    edit(project, "train", lambda entries: entries[3].update(image=entries[1]["image"], image_id="train_1"))
    train(["--cfg-path", str(project)])


# Weights, disks and processes


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers(project: Path, tmp_path: Path, capsys, value: float) -> None:
    state = tiny_model(tuning="heads").state_dict()
    state["text_proj.weight"][0, 0] = value
    torch.save(state, tmp_path / "nan.pth")
    line = refused(capsys, project, f"model.pretrained={tmp_path / 'nan.pth'}")
    assert "nan.pth holds NaN or infinite weights: text_proj.weight" in line


def test_a_checkpoint_that_is_no_numbers(project: Path, tmp_path: Path, capsys) -> None:
    state = tiny_model().run_state()
    state["text_proj.weight"] = state["text_proj.weight"] * float("nan")
    rest = {"optimizer": {"state": {}, "param_groups": []}, "scaler": None, "epoch": 0, "step": 1}
    rest |= {"best_metric": 0.0, "best_epoch": 0}
    torch.save({"model": state, **rest}, tmp_path / "nan.pth")
    line = refused(capsys, project, f"run.resume_ckpt_path={tmp_path / 'nan.pth'}")
    assert "nan.pth holds NaN or infinite numbers: model.text_proj.weight" in line


def test_a_full_disk_leaves_the_last_good_checkpoint(project: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    """No file may grow beyond a limit that the second checkpoint meets: the system itself refuses the write."""
    from lavis_aurora.training import resuming

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    original, written = resuming.write_checkpoint, []

    def write(state, path, previous=None):
        if written:
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
        original(state, path, previous)
        written.append(path)

    monkeypatch.setattr(resuming, "write_checkpoint", write)
    try:
        with pytest.raises(SystemExit):
            train(["--cfg-path", str(project), "--options", "run.max_epoch=2", "run.valid_splits=[]"])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)
    [run] = (tmp_path / "output").iterdir()
    error = capsys.readouterr().err
    assert f"cannot write {run / 'checkpoint_latest.pth'}" in error and "free some space" in error
    assert [path.name for path in run.glob("*.pth*")] == ["checkpoint_latest.pth"]
    assert read_checkpoint(run / "checkpoint_latest.pth")["epoch"] == 0


@pytest.mark.parametrize("file", ["log.txt", "result/val_epoch_0.json", "config.yaml", "summary.json"])
def test_a_full_disk_is_said_of_every_file(project: Path, capsys, monkeypatch, file: str) -> None:
    """Where the device has no space left, opening succeeds and writing does not."""
    original = io.open

    def no_space(path, mode="r", *args, **kwargs):
        if re.sub(r"\.\w+\.partial$", "", str(path)).endswith(file) and mode[0] in "wax":
            path, mode = "/dev/full", mode.replace("x", "w")
            kwargs.pop("opener", None)  # that of Path.open before Python 3.10 opens its own path
        return original(path, mode, *args, **kwargs)

    patch_open(monkeypatch, no_space)
    line = refused(capsys, project)
    [run] = (project.parent / "output").iterdir()
    assert f"cannot write {run / file} (No space left on device); free some space" in line


@pytest.mark.parametrize("folder", ["", "result"])
def test_a_run_folder_that_is_removed(project: Path, capsys, monkeypatch, folder: str) -> None:
    original = AuroraRunner.train_epoch

    def remove(*args, **kwargs):
        stats = original(*args, **kwargs)
        [run] = (project.parent / "output").iterdir()
        shutil.rmtree(run / folder)
        return stats

    monkeypatch.setattr(AuroraRunner, "train_epoch", remove)
    line = refused(capsys, project)
    assert "cannot write " in line and "its folder is not there, or no longer" in line


@pytest.mark.parametrize("options", [[], ["run.resume=auto"]])
def test_a_name_too_long_for_a_folder(project: Path, capsys, options: list[str]) -> None:
    line = refused(capsys, project, f"run.output_dir={project.parent / ('x' * 300)}", *options)
    assert line.startswith("error: run.output_dir: cannot ") and "too long" in line


@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGBUS, signal.SIGSEGV])
def test_a_data_process_that_is_killed(project: Path, capsys, monkeypatch, signum: int) -> None:
    """By the system where main memory runs out, by SIGBUS where /dev/shm does."""
    monkeypatch.setattr(CheckedDataset, "__getitem__", lambda self, index: os.kill(os.getpid(), signum))
    line = refused(capsys, project, "run.num_workers=2")
    assert "run.num_workers: a process that reads the data was lost" in line and "run.num_workers=0" in line
