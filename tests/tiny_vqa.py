"""A tiny question answering model, questions, and a tiny project in VQAv2's format."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf
from PIL import Image
from tiny import built_once

from lavis_aurora.models.blip_vqa_aurora import BlipVqaAurora

QUESTIONS = ["what color is the circle ?", "how many stars ?", "is there a big blue square in the picture ?", "why ?"]
ANSWERS = ["yes", "no", "red", "blue", "2", "a big star", "three circles", "left of the square"]
# Ways to answer.
GREEDY = {"inference_method": "generate", "num_beams": 1}
BEAMS = {"inference_method": "generate", "num_beams": 3}
RANK = {"inference_method": "rank", "answer_list": ANSWERS, "num_ans_candidates": 5}
# Questions, answer types and answers of write_vqa, in turn; digits, as the official evaluator makes of number words.
KINDS = [("what color is the", "other", "red"), ("how many", "number", "2"), ("is there a", "yes/no", "yes")]


def vqa_config(**overrides: Any) -> DictConfig:
    """``model:`` of type tiny with random weights; overrides are keys of it, sections as dicts."""
    defaults = OmegaConf.load(BlipVqaAurora.default_config_path("tiny")).model
    return OmegaConf.merge(defaults, {"pretrained": None}, OmegaConf.create(overrides))


@built_once
def vqa_model(seed: int = 0, **overrides: Any) -> BlipVqaAurora:
    """A tiny model with random weights, large enough that questions and pictures get different answers."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = BlipVqaAurora.from_config(vqa_config(**overrides))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2 and not name.startswith("mode_approx"):
                parameter.mul_(4)
    return model


def vqa_batch(size: int = 4, seed: int = 0, questions: list[str] | None = None) -> dict:
    """Samples for training: questions with one or two answers, questions of different lengths."""
    counts = [1 + i % 2 for i in range(size)]
    total = sum(counts)
    return {
        "image": torch.randn(size, 3, 48, 48, generator=torch.Generator().manual_seed(seed)),
        "text_input": (questions or QUESTIONS)[:size],
        "answer": (ANSWERS * total)[:total],
        "n_answers": torch.tensor(counts),
        "weight": torch.linspace(0.2, 1.0, total),
    }


def write_vqa(folder: Path, count: int = 6, string_ids: bool = False) -> dict[str, list[str]]:
    """Write ``count`` JPEGs and the files of coco_vqa (train, val, test) and vg_vqa (vg).

    Returns:
        Paths of the files of each split, in LAVIS's order, and of the pictures' folder under ``images``.
    """
    images = folder / "images"
    images.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for i in range(count):
        pixels = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((64, 64), Image.NEAREST).save(images / f"{i}.jpg", quality=90)

    def entry(i: int, **rest: Any) -> dict:
        start = KINDS[i % len(KINDS)][0]
        return {"image": f"{i}.jpg", "question": f"{start} square number {i}?", **rest}

    def number(i: int) -> int | str:
        return f"q-{i}" if string_ids else 4_000_000_000 + i

    right = [KINDS[i % len(KINDS)][2] for i in range(count)]
    asked = [entry(i, question_id=number(i)) for i in range(count)]
    official = [
        {
            "question_id": number(i),
            "image_id": i,
            "question_type": KINDS[i % len(KINDS)][0],
            "answer_type": KINDS[i % len(KINDS)][1],
            "answers": [{"answer": right[i], "answer_id": n} for n in range(10)],
        }
        for i in range(count)
    ]
    head = {"info": {}, "task_type": "Open-Ended", "data_type": "mscoco", "data_subtype": "val2014", "license": {}}
    contents = {
        "train.json": [entry(i, question_id=number(i), answer=[right[i]] * 9 + ["no"]) for i in range(count)],
        "vg.json": [entry(i, answer=right[i]) for i in range(count)],
        "val.json": asked,
        "test.json": asked,
        "answers.json": ANSWERS,
        "questions.json": {**head, "questions": asked},
        "truth.json": {"annotations": official},
    }
    for name, content in contents.items():
        (folder / name).write_text(json.dumps(content), encoding="utf-8")
    splits = {
        "train": ["train.json"],
        "vg": ["vg.json"],
        "val": ["val.json", "answers.json", "questions.json", "truth.json"],
        "test": ["test.json", "answers.json"],
    }
    return {split: [str(folder / name) for name in names] for split, names in splits.items()} | {
        "images": str(images)
    }


def vqa_project(tmp_path: Path, count: int = 6, string_ids: bool = False, **overrides: Any) -> Path:
    """Write ``project.yaml``, a run of seconds on :func:`write_vqa`; overrides are sections to merge over it."""
    paths = write_vqa(tmp_path / "data", count, string_ids)
    images = {"storage": paths["images"]}

    def annotations(**splits: str) -> dict:
        return {name: {"url": paths[source], "storage": paths[source]} for name, source in splits.items()}

    coco = {"annotations": annotations(train="train", val="val", test="test"), "images": images}
    config = {
        "model": {"arch": "blip_vqa_aurora", "model_type": "tiny", "pretrained": None},
        "datasets": {
            "coco_vqa": {"build_info": coco},
            "vg_vqa": {"build_info": {"annotations": annotations(train="vg"), "images": images}},
        },
        "run": {
            "task": "vqa_aurora",
            "init_lr": 1e-3,
            "max_epoch": 1,
            "batch_size_train": 4,
            "batch_size_eval": 4,
            "num_workers": 0,
            "train_splits": ["train"],
            "valid_splits": ["val"],
            "test_splits": ["test"],
            "num_ans_candidates": 4,
            "device": "cpu",
            "output_dir": str(tmp_path / "output"),
        },
    }
    path = tmp_path / "project.yaml"
    OmegaConf.save(OmegaConf.merge(config, OmegaConf.create(overrides)), path)
    return path
