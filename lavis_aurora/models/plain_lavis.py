"""How LAVIS's own model loads a merged checkpoint: what a YAML for plain LAVIS must say."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lavis.common.registry import registry
from omegaconf import OmegaConf

from lavis_aurora.config import BlipAuroraConfig, ModeApproxModelConfig
from lavis_aurora.config.check import parse_config

# The types of LAVIS that stand in for those which only this package has.
PLAIN_TYPES = {"blip_retrieval": "coco", "blip_vqa": "vqav2"}
# What LAVIS's BLIP reads of its YAML that decides shapes or scores.
BLIP_KEYS = (
    *("image_size", "vit_type", "vit_layer_norm_epsilon", "med_config_path"),
    *("embed_dim", "queue_size", "max_txt_len"),
)
SOURCES = ("arch", "model_type", "load_finetuned", "finetuned", "pretrained")


def how_to_load(arch: str, settings: BlipAuroraConfig | ModeApproxModelConfig, file: Path) -> str:
    """The ``model:`` section with which LAVIS loads a merged checkpoint, or why none does, as text.

    Args:
        arch: registered name of the model that was merged.
        settings: what it was built from.
        file: the checkpoint.
    """
    if isinstance(settings, ModeApproxModelConfig):
        arch, base = settings.base["arch"], settings.base
        inside = getattr(registry.get_model_class(arch), "CONFIG_CLASS", None)
        if inside is None:
            own = {key: value for key, value in base.items() if key not in SOURCES}
            return _section(arch, base.get("model_type"), own, {}, file)
        settings = parse_config(inside, base, "model.base")
    arch = arch.removesuffix("_aurora")
    if settings.vit is not None:
        sizes = ", ".join(f"{key} {value}" for key, value in vars(settings.vit).items())
        return (
            f"no YAML of plain LAVIS loads it: LAVIS builds its ViT base and its ViT large only, and this one has "
            f"{sizes}; in Python, give LAVIS's {arch} such towers and call its load_checkpoint"
        )
    own = {key: getattr(settings, key) for key in BLIP_KEYS if hasattr(settings, key)}
    # What LAVIS takes where its YAML says nothing is what this package does.
    unsaid = {key: getattr(type(settings)(), key) for key in own}
    return _section(arch, settings.model_type, own, unsaid, file)


def _section(arch: str, model_type: str | None, own: Mapping[str, Any], unsaid: Mapping[str, Any], file: Path) -> str:
    """What ``own`` changes of LAVIS's defaults for the type, which are ``unsaid`` where its YAML has none."""
    plain = registry.get_model_class(arch)
    if model_type not in plain.PRETRAINED_MODEL_CONFIG_DICT:
        model_type = PLAIN_TYPES[arch]
    defaults = {**unsaid, **OmegaConf.to_container(OmegaConf.load(plain.default_config_path(model_type)).model)}
    if "load_finetuned" not in defaults:
        return f"LAVIS's {arch} reads no checkpoint from a YAML; in Python, model.load_checkpoint({str(file)!r}) does"
    model = {"arch": arch, "model_type": model_type, "load_finetuned": True, "finetuned": str(file)}
    model.update({k: v for k, v in own.items() if k == "image_size" or k not in defaults or defaults[k] != v})
    same = ", and processors of the same image_size" if "image_size" in model else ""
    section = OmegaConf.to_yaml({"model": model}).rstrip()
    return f"LAVIS's {arch} loads it, in a YAML by these keys{same}:\n{section}"
