"""Loading backbone weights, with every missing or foreign key accounted for."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lavis.common.dist_utils import download_cached_file
from lavis.common.registry import registry
from lavis.common.utils import is_url
from lavis.models.vit import interpolate_pos_embed
from omegaconf import OmegaConf
from safetensors.torch import load_file
from torch import Tensor, nn

from lavis_aurora.common.errors import AuroraError, some
from lavis_aurora.common.files import is_finite, load_torch, why_unreadable
from lavis_aurora.common.paths import use_weights_folder
from lavis_aurora.config.check import parse_config
from lavis_aurora.config.models import BlipAuroraConfig, ModeApproxModelConfig

POS_EMBED = "visual_encoder.pos_embed"


def read_state_dict(source: str, key: str) -> dict[str, Tensor]:
    """Weights from a URL or file, .safetensors or .pth; nothing that could run code is unpickled.

    Args:
        source: URL or path.
        key: the YAML key that names it, for messages.
    """
    path = source
    if is_url(source):
        use_weights_folder()
        try:
            path = download_cached_file(source, check_hash=False, progress=True)
        except OSError as error:
            raise AuroraError(
                f"{key}: cannot download {source} ({error}); download it elsewhere and name the local file"
            ) from error
    if not os.path.isfile(path):
        raise AuroraError(f"{key}: no such file: {path}")
    try:
        if path.endswith(".safetensors"):
            return load_file(path)
        state = load_torch(path)
    except MemoryError:
        raise
    except Exception as error:  # torch, pickle, zipfile and safetensors each have errors of their own
        raise AuroraError(f"{key}: {path} is not a readable checkpoint ({why_unreadable(error)})") from error
    state = state.get("model", state) if isinstance(state, dict) else state
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise AuroraError(f"{key}: {path} holds no state dict of tensors")
    return state


def _fit(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """BLIP's position embeddings stretched to this image size."""
    state = dict(state)
    if POS_EMBED in state and state[POS_EMBED].shape != model.visual_encoder.pos_embed.shape:
        state[POS_EMBED] = interpolate_pos_embed(state[POS_EMBED], model.visual_encoder)
    return state


def check_finite(state: Mapping[str, Tensor], source: str) -> None:
    """Refuse weights that are no numbers."""
    spoiled = sorted(name for name, x in state.items() if not is_finite(x))
    if spoiled:
        raise AuroraError(f"{source} holds NaN or infinite weights: {some(spoiled)}; take another checkpoint")


def load_backbone(model: nn.Module, state: dict[str, Tensor], source: str, new_keys: set[str]) -> None:
    """Load weights of BLIP; afterwards the missing keys are exactly ``new_keys`` or fewer.

    Args:
        model: a model with ``visual_encoder`` and text towers.
        state: the checkpoint.
        source: its name, for messages.
        new_keys: keys that a plain BLIP checkpoint does not hold (the adapter's, the queue's, the teacher's).

    Raises:
        AuroraError: a key is missing, has another shape, belongs to a layer that the model does not have, or holds
            NaN.
    """
    check_finite(state, source)
    own = model.state_dict()
    # Queues and their pointer belong to a run, not to the weights; their size is the YAML's.
    transient = {key for key in own if "queue" in key}
    # Momentum copies follow the weights that they are copies of.
    state = {key: value for key, value in state.items() if not key.partition(".")[0].endswith("_m")}
    state = {key: value for key, value in _fit(state, model).items() if key not in transient}
    shapes = {
        f"{key} is {tuple(state[key].shape)} there and {tuple(own[key].shape)} here"
        for key in state.keys() & own.keys()
        if state[key].shape != own[key].shape
    }
    if shapes:
        raise AuroraError(
            f"{source} does not fit the model: {some(sorted(shapes))}; check vit, image_size, med_config_path"
        )
    missing = own.keys() - state.keys() - new_keys - transient
    missing = {key for key in missing if not key.endswith("position_ids")}
    if missing:
        raise AuroraError(f"{source} lacks {len(missing)} weights of the model: {some(sorted(missing))}")
    unknown = state.keys() - own.keys()
    towers = {name for name, _ in model.named_children() if not name.endswith("_m")}
    foreign = {key for key in unknown if key.partition(".")[0] in towers}
    if foreign:
        raise AuroraError(
            f"{source} has {len(foreign)} weights that the model has no place for: {some(sorted(foreign))}"
        )
    model.load_state_dict({key: value for key, value in state.items() if key in own}, strict=False)
    parts = sorted({key.partition(".")[0] for key in unknown})
    ignored = f"; not needed here: {some(parts)}" if unknown else ""
    logging.info("loaded %d weights from %s%s", len(state) - len(unknown), source, ignored)


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
