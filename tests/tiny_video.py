"""Short mp4 files, whole and broken, and annotations of them, for any test."""

from __future__ import annotations

import json
import struct
import wave
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from omegaconf import OmegaConf
from tiny import CAPTIONS, SPLITS

PROJECTS = Path(__file__).resolve().parents[1] / "projects" / "aurora"
# Questions with answers, of MSRVTT-QA's five kinds.
QUESTIONS = [
    ("what is the color of the big shape?", "red"),
    ("who is in the picture?", "star"),
    ("how many shapes are there?", "two"),
    ("when is it shown?", "now"),
    ("where is the circle?", "left"),
]
# Frame i of a clip is gray with brightness STEP * i + OFFSET: each frame can be told from its pixels.
STEP, OFFSET = 8, 20


def write_clip(path: Path, frames: int = 6, size: tuple[int, int] = (64, 48), seed: int | None = None) -> Path:
    """Write an mp4 of ``frames`` frames of (width, height) pixels.

    Args:
        seed: blocks of random colours; without one, gray frames that tell their number.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"mp4v"), 10, size)
    assert writer.isOpened()
    rng = np.random.default_rng(seed)
    for i in range(frames):
        picture = np.full((4, 4, 3), (STEP * i + OFFSET) % 256, dtype=np.uint8)
        if seed is not None:
            picture = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)
        writer.write(cv2.resize(picture, size, interpolation=cv2.INTER_NEAREST))
    writer.release()
    return path


def frame_numbers(clip: np.ndarray) -> list[int]:
    """Which frames of a gray clip these are, from their brightness of 0 to 255, (frames, ...)."""
    means = np.asarray(clip, dtype=np.float64).reshape(len(clip), -1).mean(axis=1)
    return np.rint((means - OFFSET) / STEP).astype(int).tolist()


def _boxes(data: bytes) -> dict[bytes, bytes]:
    boxes, start = {}, 0
    while start < len(data):
        length, name = struct.unpack(">I4s", data[start : start + 8])
        boxes[name] = data[start : start + length]
        start += length
    return boxes


def _index_first(data: bytes) -> bytes:
    """The same mp4 with its index in front of the frames, as files for the web have it."""
    boxes = _boxes(data)
    moov = bytearray(boxes[b"moov"])
    table = moov.find(b"stco")
    (count,) = struct.unpack(">I", moov[table + 8 : table + 12])
    for place in range(table + 12, table + 12 + 4 * count, 4):
        (offset,) = struct.unpack(">I", moov[place : place + 4])
        moov[place : place + 4] = struct.pack(">I", offset + len(moov))
    return boxes[b"ftyp"] + bytes(moov) + b"".join(boxes[name] for name in boxes if name not in (b"ftyp", b"moov"))


BREAKS = ("missing", "empty", "text", "folder", "truncated", "truncated behind its index", "damaged", "sound only")


def break_clip(path: Path, how: str) -> None:
    """Make of a clip of about 30 frames one that cannot be read."""
    data = path.read_bytes()
    path.unlink()
    if how == "empty":
        path.touch()
    elif how == "text":
        path.write_text("this is not a video\n" * 20)
    elif how == "folder":
        path.mkdir()
    elif how == "truncated":
        path.write_bytes(data[: len(data) // 2])
    elif how == "truncated behind its index":
        path.write_bytes(_index_first(data)[: len(data) * 2 // 3])
    elif how == "damaged":
        damaged, start = bytearray(data), data.find(b"mdat") + 60
        middle = start + (len(data) - start) // 3
        damaged[start:middle] = b"\x55" * (middle - start)
        path.write_bytes(bytes(damaged))
    elif how == "sound only":
        with wave.open(str(path), "wb") as sound:
            sound.setnchannels(1)
            sound.setsampwidth(2)
            sound.setframerate(8000)
            sound.writeframes(b"\0\1" * 8000)
    else:
        assert how == "missing"


def write_videos(folder: Path, count: int = 8, frames: int = 6, captions_each: int = 1) -> dict[str, Path]:
    """Write ``count`` clips for each split and their annotations in LAVIS's format (msrvtt, didemo retrieval).

    Returns:
        Paths of the annotations by split, and of the clips' folder under ``videos``.
    """
    paths = {"videos": folder / "videos"}
    captions = iter(CAPTIONS * (1 + len(SPLITS) * count * captions_each // len(CAPTIONS)))
    for number, split in enumerate(SPLITS):
        entries = []
        for i in range(count):
            name = f"{split}_{i}.mp4"
            write_clip(paths["videos"] / name, frames, seed=100 * number + i)
            texts = [next(captions) for _ in range(captions_each)]
            if split == "train":
                entries += [{"video": name, "caption": text} for text in texts]
            else:
                entries.append({"video": name, "caption": texts})
        paths[split] = folder / f"retrieval_{split}.json"
        paths[split].write_text(json.dumps(entries), encoding="utf-8")
    return paths


def write_video_questions(folder: Path, count: int = 8, frames: int = 6) -> dict[str, Path]:
    """Write clips and questions about them in the format of LAVIS's msrvtt_qa; two splits have the same question ids.

    Returns:
        Paths of the annotations by split, of the answers under ``ans2label``, of the clips' folder under ``videos``.
    """
    paths = {"videos": folder / "videos"}
    for number, split in enumerate(SPLITS):
        entries = []
        for i in range(count):
            name = f"video{count * number + i}.mp4"
            write_clip(paths["videos"] / name, frames, seed=100 * number + i)
            question, answer = QUESTIONS[i % len(QUESTIONS)]
            entries.append({"video": name, "question": question, "answer": answer, "question_id": i})
        paths[split] = folder / f"qa_{split}.json"
        paths[split].write_text(json.dumps(entries), encoding="utf-8")
    paths["ans2label"] = folder / "qa_ans2label.json"
    labels = {answer: i for i, answer in enumerate(dict.fromkeys(answer for _, answer in QUESTIONS))}
    paths["ans2label"].write_text(json.dumps(labels), encoding="utf-8")
    return paths


def video_overrides(builder: str, paths: dict[str, Path], image_size: int = 48) -> list[str]:
    """``--options`` that make a dataset of videos small and local."""
    options = [f"datasets.{builder}.build_info.videos.storage={paths['videos']}"]
    for split in (*SPLITS, "ans2label"):
        if split in paths:
            part = f"datasets.{builder}.build_info.annotations.{split}"
            options += [f"{part}.url={paths[split]}", f"{part}.storage={paths[split]}"]
    for split in ("train", "eval"):
        part = f"datasets.{builder}.vis_processor.{split}"
        options += [f"{part}.image_size={image_size}"]
    return options


def video_project(folder: Path, name: str, builder: str, paths: dict[str, Path], **overrides: Any) -> Path:
    """Write ``folder/project.yaml``, a run of seconds that projects/aurora/NAME.yaml becomes on these videos.

    Args:
        folder: for it and the run's ``output``.
        name: the project.
        builder: its dataset.
        paths: of :func:`write_videos` or :func:`write_video_questions`.
        overrides: sections of the YAML to merge over it.
    """
    size = 48
    frames = [f"datasets.{builder}.vis_processor.{split}.n_frms=2" for split in ("train", "eval")]
    small = {
        "model": {"model_type": "tiny", "image_size": size, "pretrained": None},
        "run": {
            "init_lr": 1e-3,
            "max_epoch": 1,
            "batch_size_train": 4,
            "batch_size_eval": 4,
            "num_workers": 0,
            "device": "cpu",
            "output_dir": str(folder / "output"),
        },
    }
    config = OmegaConf.merge(
        OmegaConf.load(PROJECTS / f"{name}.yaml"),
        OmegaConf.from_dotlist(video_overrides(builder, paths, size) + frames),
        small,
        OmegaConf.create(overrides),
    )
    folder.mkdir(parents=True, exist_ok=True)
    OmegaConf.save(config, folder / "project.yaml")
    return folder / "project.yaml"
