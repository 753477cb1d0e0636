"""The YAML that ``lavis-aurora merge`` prints, read by LAVIS's own configuration and models."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any

import lavis.models.vit
import pytest
import torch
from lavis.common.config import Config
from lavis.common.registry import registry
from lavis.models.blip_models.blip import BlipBase
from omegaconf import DictConfig, OmegaConf
from tiny import activate, med_config, tiny_model

from lavis_aurora import save_adapter
from lavis_aurora.common.paths import package_file
from lavis_aurora.config.check import parse_config
from lavis_aurora.config.models import ModeApproxModelConfig
from lavis_aurora.encoders.towers import build_tokenizer
from lavis_aurora.models.export import loading_instructions
from lavis_aurora_cli import main

TOKENIZER = package_file("configs/models/tiny")
COMMON = {"load_finetuned": True, "finetuned": "/out/merged.pth"}


def _read_by_lavis(said: str, folder: Path) -> DictConfig:
    """The ``model:`` section of what was said, completed by LAVIS."""
    path = folder / "lavis.yaml"
    path.write_text(said[said.index("\nmodel:") :] + "\nrun: {}\ndatasets: {}\n")
    return Config(argparse.Namespace(cfg_path=str(path), options=None)).model_cfg


def _settings(arch: str, model_type: str, **changes: object):
    """What a model of the type is built from."""
    cls = registry.get_model_class(arch)
    defaults = OmegaConf.load(cls.default_config_path(model_type)).model
    return parse_config(cls.CONFIG_CLASS, OmegaConf.merge(defaults, changes), "model")


LARGE = {"vit_type": "large", "med_config_path": "configs/models/med_large_config.json"}


@pytest.mark.parametrize(
    ("arch", "model_type", "changes", "printed"),
    [
        ("blip_retrieval", "base", {}, {"model_type": "coco", "image_size": 384}),
        # The video projects.
        ("blip_retrieval", "base", {"image_size": 224}, {"model_type": "coco", "image_size": 224}),
        ("blip_retrieval", "flickr", {"queue_size": 0}, {"model_type": "flickr", "image_size": 384, "queue_size": 0}),
        ("blip_retrieval", "large", {}, {"model_type": "coco", "image_size": 384, **LARGE}),
        ("blip_vqa", "base", {"image_size": 384}, {"model_type": "vqav2", "image_size": 384}),
    ],
)
def test_lavis_completes_the_section_to_the_models_own_sizes(
    tmp_path: Path, arch: str, model_type: str, changes: dict, printed: dict
) -> None:
    settings = _settings(f"{arch}_aurora", model_type, **changes)
    said = loading_instructions(f"{arch}_aurora", settings, Path("/out/merged.pth"))
    section = OmegaConf.create(said[said.index("\nmodel:") :]).model
    assert section == {"arch": arch, **COMMON, **printed}, "nothing that LAVIS has by itself"
    completed = _read_by_lavis(said, tmp_path)
    for key in ("image_size", "vit_type", "med_config_path", "embed_dim", "queue_size"):
        assert completed.get(key) == getattr(settings, key, None), key


def test_around_a_model_of_lavis_its_own_type_is_named(tmp_path: Path) -> None:
    base = {"arch": "blip_vqa", "model_type": "aokvqa", "image_size": 224, "pretrained": "a.pth"}
    said = loading_instructions("mode_approx", ModeApproxModelConfig(base=base), Path("/out/merged.pth"))
    completed = _read_by_lavis(said, tmp_path)
    assert (completed.arch, completed.image_size, completed.finetuned) == ("blip_vqa", 224, "/out/merged.pth")
    assert "model_type: aokvqa" in said and "a.pth" not in said


@pytest.mark.parametrize(
    ("arch", "settings", "words"),
    [
        (
            "blip_vqa_aurora",
            _settings("blip_vqa_aurora", "tiny"),
            "no YAML of plain LAVIS loads it: LAVIS builds its ViT base and its ViT large only, and this one has "
            "patch_size 16, embed_dim 128",
        ),
        (
            "mode_approx",
            ModeApproxModelConfig(base={"arch": "clip", "model_type": "ViT-B-32"}),
            "LAVIS's clip reads no checkpoint from a YAML; in Python, model.load_checkpoint('/out/merged.pth') does",
        ),
    ],
)
def test_where_no_yaml_loads_it_that_is_said(arch: str, settings: object, words: str) -> None:
    said = loading_instructions(arch, settings, Path("/out/merged.pth"))
    assert words in said and "model:" not in said


def test_the_tiny_model_becomes_lavis_own_as_the_documentation_has_it(tmp_path: Path) -> None:
    weights = package_file("configs/models/tiny/model.safetensors")
    tuned = activate(tiny_model(pretrained=weights, gate={"form": "none"})).eval()
    save_adapter(tuned, tmp_path / "adapter")
    page = Path(__file__).resolve().parents[2] / "docs" / "adapters.md"
    [block] = re.findall(r"```python\n([^`]*class TinyBlip.*?)```", page.read_text(), re.DOTALL)
    assert block.startswith("from lavis_aurora import")  # or LAVIS refuses a later tokenizers
    found: dict[str, Any] = {}
    exec(block.replace("output/demo_ret/GATELESS_RUN/adapter_best", str(tmp_path / "adapter")), found)
    picture, plain = torch.randn(2, 3, 48, 48), found["plain"].eval()
    with torch.no_grad():
        ours, theirs = (one.visual_encoder.forward_features(picture) for one in (tuned, plain))
    torch.testing.assert_close(theirs, ours)


@pytest.mark.parametrize(
    ("arch", "model_type", "width"),
    [
        ("blip_retrieval", "base", 768),
        pytest.param("blip_retrieval", "large", 1024, marks=pytest.mark.slow),
        pytest.param("blip_vqa", "base", 768, marks=pytest.mark.slow),
    ],
)
def test_lavis_builds_the_model_from_what_the_command_prints(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
    arch: str,
    model_type: str,
    width: int,
) -> None:
    """Everything is LAVIS's own but the depth of its ViT and the vocabulary, which would be downloaded."""
    vit, original = lavis.models.vit.VisionTransformerEncoder, lavis.models.vit.VisionTransformerEncoder.__init__
    monkeypatch.setattr(vit, "__init__", lambda self, *args, **kw: original(self, *args, **{**kw, "depth": 1}))
    monkeypatch.setattr(BlipBase, "init_tokenizer", classmethod(lambda cls: build_tokenizer(TOKENIZER)))
    queue = {"queue_size": 16} if arch == "blip_retrieval" else {}
    widths = {"encoder_width": width, **({"hidden_size": width} if arch == "blip_vqa" else {})}
    sizes = {"image_size": 32, "med_config_path": med_config(tmp_path, **widths), **queue}
    own = {"pretrained": None, "tokenizer": TOKENIZER, "gate": {"form": "none"}, **sizes}
    cls = registry.get_model_class(f"{arch}_aurora")
    defaults = OmegaConf.load(cls.default_config_path(model_type)).model
    model = cls.from_config(OmegaConf.merge(defaults, own))
    backbone, merged = tmp_path / "base.pth", tmp_path / "merged.pth"
    torch.save({"model": {k: v for k, v in model.state_dict().items() if "mode_approx" not in k}}, backbone)
    save_adapter(activate(model), tmp_path / "adapter")

    files = ["--tokenizer", TOKENIZER, "--med-config-path", sizes["med_config_path"]]
    main(["merge", str(tmp_path / "adapter"), str(merged), "--pretrained", str(backbone), *files])
    cfg = _read_by_lavis(capsys.readouterr().out, tmp_path)
    plain = registry.get_model_class(cfg.arch).from_config(cfg)
    assert type(plain).__module__.startswith("lavis.models")
    expected = torch.load(merged, weights_only=True)["model"]
    assert plain.state_dict().keys() == expected.keys()
    for key, value in plain.state_dict().items():
        assert torch.equal(value, expected[key]), key
    qkv = "visual_encoder.blocks.0.attn.qkv.weight"
    assert not torch.equal(expected[qkv], model.state_dict()[qkv]), "the adapter is in it"
