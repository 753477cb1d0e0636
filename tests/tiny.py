"""A tiny model, tiny pictures and a tiny project, for any test."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable
from functools import wraps
from itertools import product
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest
import torch
from lavis.models.med import XBertEncoder
from lavis.models.vit import VisionTransformerEncoder
from omegaconf import DictConfig, OmegaConf
from PIL import Image
from torch import nn

from lavis_aurora.adapters.companions import adapter_parameters
from lavis_aurora.common.errors import AuroraError
from lavis_aurora.models.blip_retrieval_aurora import BlipRetrievalAurora
from lavis_aurora.project import load_config

SPLITS = ("train", "val", "test")
COLORS = ("black", "blue", "brown", "cyan", "gray", "green", "orange", "pink", "purple", "red", "white", "yellow")
SHAPES = ("circle", "cross", "diamond", "ring", "square", "star", "triangle")
SIZES = ("big", "small", "large")
# Every word is in the vocabulary of the tiny model; neighbours in this list differ in most words.
CAPTIONS = [f"a {size} {color} {shape}" for size, color, shape in product(SIZES, COLORS, SHAPES)]
random.Random(0).shuffle(CAPTIONS)


def tiny_config(**overrides: Any) -> DictConfig:
    """``model:`` of type tiny with random weights; overrides are keys of it, sections as dicts."""
    defaults = OmegaConf.load(BlipRetrievalAurora.default_config_path("tiny")).model
    return OmegaConf.merge(defaults, {"pretrained": None}, OmegaConf.create(overrides))


Model = TypeVar("Model", bound=nn.Module)
# Settings that name files, which may change.
FILES = {"adapter", "finetuned", "med_config_path", "pretrained", "tokenizer"}
# Models that are copied, by builder, seed and settings; the latest, of some 10 MB each.
BUILT: dict[tuple[str, int, str], nn.Module] = {}


def built_once(build: Callable[..., Model]) -> Callable[..., Model]:
    """A builder that hands out copies of what it has built from the same seed and settings: they take a quarter."""

    @wraps(build)
    def copied(seed: int = 0, **overrides: Any) -> Model:
        if FILES & overrides.keys():
            return build(seed, **overrides)
        key = (build.__name__, seed, repr(overrides))
        if key not in BUILT:
            BUILT[key] = build(seed, **overrides)
            if len(BUILT) > 24:
                del BUILT[next(iter(BUILT))]
        return copy.deepcopy(BUILT[key])

    return copied


@built_once
def tiny_model(seed: int = 0, **overrides: Any) -> BlipRetrievalAurora:
    """A tiny model with random weights, the same for the same seed; overrides as in :func:`tiny_config`."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return BlipRetrievalAurora.from_config(tiny_config(**overrides))


def lavis_towers(cfg) -> tuple[VisionTransformerEncoder, XBertEncoder]:
    """LAVIS's own classes, none of ours."""
    vision = VisionTransformerEncoder(
        img_size=cfg.image_size,
        patch_size=cfg.vit.patch_size,
        embed_dim=cfg.vit.embed_dim,
        depth=cfg.vit.depth,
        num_heads=cfg.vit.num_heads,
    )
    vision.vision_width = cfg.vit.embed_dim
    return vision, XBertEncoder.from_config(cfg)


def activate(model: nn.Module, seed: int = 0, std: float = 0.2) -> nn.Module:
    """Give every adapter parameter random values, so that no part of the method is at its neutral start."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, parameter in adapter_parameters(model):
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
    return model


def keys_of_trained(model: BlipRetrievalAurora) -> set[str]:
    """Keys of the state dict that training may change (law 4): the adapter, the heads and their momentum copies."""
    names = {id(p): name for name, p in model.named_parameters()}
    allowed = {names[id(p)] for _, p in adapter_parameters(model)}
    for head in model.heads:
        allowed |= {names[id(p)] for p in ([head] if isinstance(head, nn.Parameter) else head.parameters())}
    return allowed | {"vision_proj_m.weight", "vision_proj_m.bias", "text_proj_m.weight", "text_proj_m.bias"}


def write_pictures(folder: Path, count: int, captions_each: int = 1) -> dict[str, Path]:
    """Write ``count`` JPEGs for each split and its annotations in LAVIS's (Karpathy's) format.

    Returns:
        Paths of the annotations by split, and of the pictures' folder under ``images``.
    """
    rng = np.random.default_rng(0)
    paths = {"images": folder / "images"}
    captions = iter(CAPTIONS * (1 + len(SPLITS) * count * captions_each // len(CAPTIONS)))
    for split in SPLITS:
        (paths["images"] / split).mkdir(parents=True, exist_ok=True)
        entries = []
        for i in range(count):
            name = f"{split}/{i:03d}.jpg"
            pixels = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
            Image.fromarray(pixels).resize((64, 64), Image.NEAREST).save(paths["images"] / name, quality=90)
            texts = [next(captions) for _ in range(captions_each)]
            if split == "train":
                entries += [{"image": name, "caption": text, "image_id": f"{split}_{i}"} for text in texts]
            else:
                entries.append({"image": name, "caption": texts})
        paths[split] = folder / f"{split}.json"
        paths[split].write_text(json.dumps(entries), encoding="utf-8")
    return paths


def project(tmp_path: Path, count: int = 8, captions_each: int = 1, **overrides: Any) -> DictConfig:
    """What :func:`project_yaml` writes. Pictures go to ``tmp_path/data`` unless they are there."""
    folder = tmp_path / "data"
    paths = {name: folder / f"{name}.json" for name in SPLITS} | {"images": folder / "images"}
    if not folder.exists():
        paths = write_pictures(folder, count, captions_each)
    annotations = {split: {"url": str(paths[split]), "storage": str(paths[split])} for split in SPLITS}
    images = {"storage": str(paths["images"])}
    config = {
        "model": {
            "arch": "blip_retrieval_aurora",
            "model_type": "tiny",
            "pretrained": None,
            "queue_size": 16,
        },
        "datasets": {"coco_retrieval": {"build_info": {"annotations": annotations, "images": images}}},
        "run": {
            "init_lr": 1e-3,
            "max_epoch": 1,
            "batch_size_train": 4,
            "batch_size_eval": 4,
            "num_workers": 0,
            "train_splits": ["train"],
            "valid_splits": ["val"],
            "test_splits": ["test"],
            "k_test": 4,
            "device": "cpu",
            "output_dir": str(tmp_path / "output"),
        },
    }
    return OmegaConf.merge(config, OmegaConf.create(overrides))


def project_yaml(tmp_path: Path, count: int = 8, captions_each: int = 1, **overrides: Any) -> Path:
    """Write a project that runs within seconds: coco_retrieval on :func:`write_pictures`, model type tiny.

    Args:
        tmp_path: folder for ``project.yaml``, ``data`` and ``output``; existing data are kept.
        count: pictures of each split.
        captions_each: captions of each picture.
        overrides: sections of the YAML to merge over it, e.g. ``run={"max_epoch": 2}``.
    """
    path = tmp_path / "project.yaml"
    OmegaConf.save(project(tmp_path, count, captions_each, **overrides), path)
    return path


def refused(path: Path, *parts: str, options: list[str] | None = None) -> str:
    """The one-line error of loading a project, which names the file and all of ``parts``."""
    with pytest.raises(AuroraError) as caught:
        load_config(str(path), options)
    message = str(caught.value)
    assert message.startswith(f"{path}: ") and "\n" not in message
    for part in parts:
        assert part in message
    return message


def med_config(folder: Path, **changes: Any) -> str:
    """Path of a copy of the tiny model's med_config.json with ``changes``."""
    config = json.loads(Path(tiny_config().med_config_path).read_text())
    path = folder / "med_config.json"
    path.write_text(json.dumps({**config, **changes}))
    return str(path)
