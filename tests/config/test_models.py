"""``model:``: LAVIS's defaults, and parts that do not fit each other."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from lavis.common.registry import registry
from lavis.common.utils import get_abs_path
from omegaconf import OmegaConf
from tiny import refused, tiny_config

from lavis_aurora.common.errors import AuroraError
from lavis_aurora.config.check import parse_config
from lavis_aurora.config.method import ContextConfig
from lavis_aurora.config.models import TUNINGS, RetrievalAuroraConfig
from lavis_aurora.models.blip_retrieval_aurora import BlipRetrievalAurora
from lavis_aurora.project import load_config

ROOT = Path(__file__).resolve().parents[2]


def test_defaults_are_lavis_own() -> None:
    own = OmegaConf.load(get_abs_path("configs/models/blip_retrieval_coco.yaml")).model
    settings = RetrievalAuroraConfig()
    for key in ("vit_type", "image_size", "embed_dim", "queue_size", "med_config_path"):
        assert getattr(settings, key) == own[key], key


def test_image_size_without_vit_must_fit_lavis_patches() -> None:
    with pytest.raises(AuroraError, match=r"model.image_size: 200 .* a multiple of the patch size \(16\)"):
        RetrievalAuroraConfig(image_size=200)


@pytest.mark.parametrize("data", ["coco", "flickr"])
def test_negatives_come_from_where_lavis_trains_with_them(data: str) -> None:
    lavis = OmegaConf.load(get_abs_path(f"projects/blip/train/retrieval_{data}_ft.yaml")).model.negative_all_rank
    project = load_config(str(ROOT / f"projects/aurora/{data}_ret.yaml")).model_cfg
    of_type = OmegaConf.load(BlipRetrievalAurora.default_config_path(data)).model
    for section in (project, of_type):
        assert parse_config(RetrievalAuroraConfig, section, "model").negative_all_rank is lavis


@pytest.mark.parametrize("tuning", ["heads", "full"])
def test_heads_cannot_be_left_out_where_they_are_what_is_trained(project: Path, tuning: str) -> None:
    options = [f"model.tuning={tuning}", "model.train_heads=false"]
    refused(project, f"model.train_heads: false does not go with model.tuning: {tuning}", options=options)
    assert RetrievalAuroraConfig(tuning="frozen", train_heads=False).train_heads is False


@pytest.mark.parametrize("tuning", [tuning for tuning in TUNINGS if tuning != "aurora"])
def test_context_is_for_aurora_and_refused_elsewhere_if_it_is_asked_for(project: Path, tuning: str) -> None:
    options = [f"model.tuning={tuning}", "model.context.form=attention"]
    refused(project, f"model.context.form: attention is for model.tuning: aurora, not {tuning}", options=options)
    for options in ([], ["model.context.form=none"]):
        settings = load_config(str(project), [f"model.tuning={tuning}", *options]).model_cfg
        assert parse_config(RetrievalAuroraConfig, settings, "model").context.form == "none"


def test_context_of_aurora_is_the_papers_unless_told_otherwise() -> None:
    assert RetrievalAuroraConfig().context.form == "attention"
    assert replace(RetrievalAuroraConfig(context=ContextConfig("mean")), alpha=0.0).context.form == "mean"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokenizer": "/no/such/folder"}, "model.tokenizer"),
        ({"tokenizer": str(ROOT / "tests")}, "model.tokenizer: the folder .* holds no vocab.txt"),
        ({"tokenizer": "no-such-tokenizer"}, "model.tokenizer: cannot load 'no-such-tokenizer'"),
        ({"med_config_path": "/no/such/med_config.json"}, "model.med_config_path: .*/no/such/med_config.json"),
        ({"max_txt_len": 65}, "model.max_txt_len: 65 tokens do not fit the 64 positions"),
        ({"vit": {"embed_dim": 64}}, "model.med_config_path: .* encoder_width 128.*64 wide"),
    ],
)
def test_parts_that_do_not_fit_each_other_are_named_when_building(change: dict, message: str) -> None:
    cfg = tiny_config(**change)
    with pytest.raises(AuroraError, match=message):
        registry.get_model_class(cfg.arch).from_config(cfg)


@pytest.mark.parametrize("content", ["{", "{}", '{"vocab_size": 100}'])
def test_med_config_that_cannot_be_used_is_named(tmp_path: Path, content: str) -> None:
    path = tmp_path / "med.json"
    path.write_text(content)
    cfg = tiny_config(med_config_path=str(path))
    with pytest.raises(AuroraError, match=f"model.med_config_path: .*{path}"):
        registry.get_model_class(cfg.arch).from_config(cfg)


def test_vocabulary_larger_than_the_embeddings_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "med.json"
    small = json.loads(Path(tiny_config().med_config_path).read_text()) | {"vocab_size": 401}
    path.write_text(json.dumps(small))
    cfg = tiny_config(med_config_path=str(path))
    with pytest.raises(AuroraError, match=r"model.tokenizer: .* has 402 tokens .* has vocab_size 401"):
        registry.get_model_class(cfg.arch).from_config(cfg)
