"""Which settings an adapter folder may hold: every key is decided, and of LAVIS's models none names a place."""

from __future__ import annotations

from dataclasses import fields

import pytest
from lavis.common.registry import registry
from omegaconf import OmegaConf

from lavis_aurora.config.adapter_settings import (
    BLIP_SETTINGS,
    LEFT_OUT,
    PROCESSOR_KINDS,
    WRAPPER_SETTINGS,
    check_preprocess,
    portable_settings,
    type_settings,
)
from lavis_aurora.config.models import ModeApproxModelConfig, RetrievalAuroraConfig, VqaAuroraConfig


@pytest.mark.parametrize(
    ("cls", "allowed"),
    [
        (RetrievalAuroraConfig, BLIP_SETTINGS),
        (VqaAuroraConfig, BLIP_SETTINGS),
        (ModeApproxModelConfig, WRAPPER_SETTINGS),
    ],
)
def test_every_key_either_stands_in_an_adapter_or_does_not(cls, allowed):
    """A new key must be written into one of the two lists."""
    assert {one.name for one in fields(cls)} <= {*allowed, *LEFT_OUT}
    assert not {*allowed} & {*LEFT_OUT}


def test_of_other_models_numbers_and_known_words_are_taken():
    cls = registry.get_model_class("blip_caption")
    defaults = type_settings(cls, "base_coco")
    kept = {
        "image_size": 224,
        "vit_type": "base",
        "prompt": "a photo of",
        "vit_grad_ckpt": True,
        "timesformer": {"n_frms": 4, "rates": [0.1, 0.2], "ckpt": None},
    }
    dropped = {
        "pretrained": "http://x",
        "finetuned": 3,
        "med_config_path": 3,
        "q_former_model": "/home/me/x.pth",
        "opt_model": "facebook/opt-2.7b",
        "parts": {"file": "/home/me/x.pth"},
        "files": ["/home/me/x.pth"],
        "load_finetuned": False,
    }
    assert portable_settings(cls, {**kept, **dropped}, defaults) == kept


def test_what_is_a_name_in_the_defaults_stays_one():
    cls = registry.get_model_class("blip_caption")
    assert portable_settings(cls, {"bert": 3}, {"bert": "bert-base-uncased"}) == {}


def test_the_processors_of_every_registered_type_may_stand_in_an_adapter():
    for name, cls in registry.mapping["model_name_mapping"].items():
        for kind in cls.PRETRAINED_MODEL_CONFIG_DICT:
            if name == "mode_approx" or name.startswith("gpt"):
                continue
            cfg = OmegaConf.load(cls.default_config_path(kind))
            preprocess = OmegaConf.to_container(cfg.get("preprocess") or OmegaConf.create(), resolve=True)
            check_preprocess({key: part for key, part in preprocess.items() if key in PROCESSOR_KINDS})
