"""Keys that there are not, and values of the wrong type: both are named."""

from __future__ import annotations

from pathlib import Path

import pytest
from omegaconf import OmegaConf
from tiny import refused

from lavis_aurora.config.check import parse_config
from lavis_aurora.config.models import RetrievalAuroraConfig
from lavis_aurora.project import load_config

UNKNOWN_KEYS = [
    ("model.tunning", "tuning"),
    ("model.quee_size", "queue_size"),
    ("model.mode_aprox", "mode_approx"),
    ("model.mode_approx.rnk", "rank"),
    ("model.mode_approx.scal", "scale"),
    ("model.gate.from", "form"),
    ("model.context.forms", "form"),
    ("model.vit.pach_size", "patch_size"),
    ("model.vit.dept", "depth"),
    ("run.max_epochs", "max_epoch"),
    ("run.itcweight", "itc_weight"),
    ("run.batch_size", "batch_size_train"),
]


@pytest.mark.parametrize(("key", "near"), UNKNOWN_KEYS, ids=[key for key, _ in UNKNOWN_KEYS])
@pytest.mark.parametrize("where", ["yaml", "options"])
def test_unknown_key_gets_the_nearest_valid_name(project: Path, where: str, key: str, near: str) -> None:
    if where == "yaml":
        config = OmegaConf.load(project)
        OmegaConf.update(config, key, 1, force_add=True)
        OmegaConf.save(config, project)
    message = refused(project, f"{key}: unknown key", options=[f"{key}=1"] if where == "options" else None)
    assert repr(near) in message.partition("did you mean ")[2]


def test_unknown_key_without_a_near_name_gets_all_names(project: Path) -> None:
    refused(project, "model.gate.zzz: unknown key; known: decoder, form, init", options=["model.gate.zzz=1"])


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model.mode_approx.rank", "abc"),
        ("model.mode_approx.rank", "1.5"),
        ("model.mode_approx.rank", "null"),
        ("model.mode_approx.scale", "big"),
        ("model.mode_approx", "3"),
        ("model.gate", "residual"),
        ("model.context", "[1]"),
        ("model.vit", "base"),
        ("model.vit.depth", "[3]"),
        ("model.image_size", "48px"),
        ("model.train_heads", "maybe"),
        ("model.queue_size", "many"),
        ("model.tuning.form", "aurora"),
        ("run.max_epoch", "six"),
        ("run.init_lr", "fast"),
        ("run.amp", "2.5"),
        ("run.train_splits", "train"),
        ("run.seed", "{a: 1}"),
        ("run.seed", "1e26"),
        ("run.valid_splits", "{a: 1}"),
        ("run.task", "[1]"),
        ("run.runner", "{a: 1}"),
        ("model.arch", "[1]"),
        ("model.model_type", "{a: 1}"),
        ("model.gate", "[1]"),
        ("model.mode_approx", "[null]"),
        ("model.vit", "[]"),
        ("model.lora.targets", "{a: 1}"),
        ("preprocess.vis_processor", "7"),
        ("preprocess.vis_processor.train", "x"),
        ("preprocess.text_processor", "[1]"),
        ("datasets.coco_retrieval", "[1]"),
        ("datasets.coco_retrieval.type", "[1]"),
        ("datasets.coco_retrieval.build_info", "[1]"),
        ("datasets.coco_retrieval.build_info.images.storage", "[1]"),
        ("datasets.coco_retrieval.build_info.images.storage", "{a: 1}"),
        ("datasets.coco_retrieval.build_info.annotations.val", "[1]"),
        ("datasets.coco_retrieval.build_info.annotations.val.storage", "{a: 1}"),
        ("datasets.coco_retrieval.build_info.annotations.val.url", "[[1]]"),
        ("datasets.coco_retrieval.vis_processor.train.name", "[1]"),
    ],
)
def test_wrong_type_names_the_key(project: Path, key: str, value: str) -> None:
    named = key.rpartition(".")[0] if key == "model.tuning.form" else key
    refused(project, f"{named}: ", options=[f"{key}={value}"])


@pytest.mark.parametrize("key", ["model.base", "model.base.arch", "model.base.model_type", "model.mode_approx"])
def test_wrong_type_names_the_key_around_another_model(project: Path, key: str) -> None:
    config = OmegaConf.load(project)
    config.model = {"arch": "mode_approx", "base": {"arch": "blip_retrieval_aurora", "model_type": "tiny"}}
    OmegaConf.save(config, project)
    refused(project, f"{key}: ", options=[f"{key}=[1]"])


def test_what_a_key_refers_to_is_found_where_it_stands(project: Path) -> None:
    config = load_config(str(project), ["model.queue_size=${run.batch_size_train}", "run.batch_size_train=6"])
    settings = parse_config(RetrievalAuroraConfig, config.model_cfg, "model")
    assert settings.queue_size == 6
    refused(project, "model.queue_size: ", "run.nothing", options=["model.queue_size=${run.nothing}"])
