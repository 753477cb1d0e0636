"""Load a model with its processors, as LAVIS does, with a default type and clear errors."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lavis.models
import torch
from lavis.common.dist_utils import download_cached_file
from lavis.common.registry import registry
from lavis.common.utils import is_url
from lavis.models import load_preprocess
from lavis.models.vit import interpolate_pos_embed
from omegaconf import DictConfig, OmegaConf
from safetensors.torch import load_file
from torch import Tensor, nn

from lavis_aurora.adapters.config import CONFIG, read_adapter_config
from lavis_aurora.common.errors import AuroraError, abbreviated, did_you_mean, shown
from lavis_aurora.common.files import is_finite, load_torch, why_unreadable
from lavis_aurora.common.paths import use_weights_folder
from lavis_aurora.config.adapter_settings import adapter_settings, check_preprocess, type_settings
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


def _fit(state: dict[str, Tensor], model: Any) -> dict[str, Tensor]:
    """BLIP's position embeddings stretched to this image size."""
    state = dict(state)
    if POS_EMBED in state and state[POS_EMBED].shape != model.visual_encoder.pos_embed.shape:
        state[POS_EMBED] = interpolate_pos_embed(state[POS_EMBED], model.visual_encoder)
    return state


def check_finite(state: Mapping[str, Tensor], source: str) -> None:
    """Refuse weights that are NaN or infinite."""
    spoiled = sorted(name for name, x in state.items() if not is_finite(x))
    if spoiled:
        raise AuroraError(f"{source} holds NaN or infinite weights: {abbreviated(spoiled)}; take another checkpoint")


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
            f"{source} does not fit the model: {abbreviated(sorted(shapes))}; check vit, image_size, med_config_path"
        )
    missing = own.keys() - state.keys() - new_keys - transient
    missing = {key for key in missing if not key.endswith("position_ids")}
    if missing:
        raise AuroraError(f"{source} lacks {len(missing)} weights of the model: {abbreviated(sorted(missing))}")
    unknown = state.keys() - own.keys()
    towers = {name for name, _ in model.named_children() if not name.endswith("_m")}
    foreign = {key for key in unknown if key.partition(".")[0] in towers}
    if foreign:
        raise AuroraError(
            f"{source} has {len(foreign)} weights that the model has no place for: {abbreviated(sorted(foreign))}"
        )
    model.load_state_dict({key: value for key, value in state.items() if key in own}, strict=False)
    parts = sorted({key.partition(".")[0] for key in unknown})
    ignored = f"; not needed here: {abbreviated(parts)}" if unknown else ""
    logging.info("loaded %d weights from %s%s", len(state) - len(unknown), source, ignored)


# The types of LAVIS that stand in for those which only this package has.
PLAIN_TYPES = {"blip_retrieval": "coco", "blip_vqa": "vqav2"}
# What LAVIS's BLIP reads of its YAML that decides shapes or scores.
BLIP_KEYS = (
    *("image_size", "vit_type", "vit_layer_norm_epsilon", "med_config_path"),
    *("embed_dim", "queue_size", "max_txt_len"),
)
# What of a section says where weights come from.
LOADING_KEYS = ("arch", "model_type", "load_finetuned", "finetuned", "pretrained")


def loading_instructions(arch: str, settings: BlipAuroraConfig | ModeApproxModelConfig, file: Path) -> str:
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
            own = {key: value for key, value in base.items() if key not in LOADING_KEYS}
            return _section(arch, base.get("model_type"), own, {}, file)
        blip: BlipAuroraConfig = parse_config(inside, base, "model.base")
    else:
        blip = settings
    arch = arch.removesuffix("_aurora")
    if blip.vit is not None:
        sizes = ", ".join(f"{key} {value}" for key, value in vars(blip.vit).items())
        return (
            f"no YAML of plain LAVIS loads it: LAVIS builds its ViT base and its ViT large only, and this one has "
            f"{sizes}; in Python, give LAVIS's {arch} such towers and call its load_checkpoint"
        )
    own = {key: getattr(blip, key) for key in BLIP_KEYS if hasattr(blip, key)}
    # What LAVIS takes where its YAML says nothing is what this package does.
    unsaid = {key: getattr(type(blip)(), key) for key in own}
    return _section(arch, blip.model_type, own, unsaid, file)


def _section(arch: str, model_type: str | None, own: Mapping[str, Any], unsaid: Mapping[str, Any], file: Path) -> str:
    """What ``own`` changes of LAVIS's defaults for the type, which are ``unsaid`` where its YAML has none."""
    plain = registry.get_model_class(arch)
    if model_type not in plain.PRETRAINED_MODEL_CONFIG_DICT:
        model_type = PLAIN_TYPES[arch]
    written: Any = OmegaConf.to_container(OmegaConf.load(plain.default_config_path(model_type)).model)
    defaults = {**unsaid, **written}
    if "load_finetuned" not in defaults:
        return f"LAVIS's {arch} reads no checkpoint from a YAML; in Python, model.load_checkpoint({str(file)!r}) does"
    model = {"arch": arch, "model_type": model_type, "load_finetuned": True, "finetuned": str(file)}
    model.update({k: v for k, v in own.items() if k == "image_size" or k not in defaults or defaults[k] != v})
    same = ", and processors of the same image_size" if "image_size" in model else ""
    section = OmegaConf.to_yaml({"model": model}).rstrip()
    return f"LAVIS's {arch} loads it, in a YAML by these keys{same}:\n{section}"


SOURCES = ("pretrained", "tokenizer", "med_config_path")


def load_model_and_preprocess(
    name: str,
    model_type: str | None = None,
    is_eval: bool = False,
    device: str | torch.device = "cpu",
    adapter: str | Path | None = None,
    pretrained: str | Path | None = None,
    tokenizer: str | Path | None = None,
    med_config_path: str | Path | None = None,
) -> tuple[nn.Module, dict[str, Any], dict[str, Any]]:
    """Load a model registered with LAVIS and its processors.

    Args:
        name: registered name, e.g. ``blip_retrieval_aurora``.
        model_type: one of the model's types; the models of this package have a default. For ``mode_approx``, the
            name and type of the model inside, e.g. ``blip_vqa/vqav2``.
        is_eval: put the model in eval mode.
        device: where to put it.
        adapter: folder of an adapter to load; type, settings and processors are then those that it was tuned with.
            It is data: nothing of what follows is taken from it.
        pretrained: file or URL of the backbone instead of the type's own; for models of this package.
        tokenizer: hub name or folder of the tokenizer, likewise.
        med_config_path: configuration of the text tower, likewise.

    Returns:
        model, vision processors and text processors (both by ``train`` and ``eval``).

    Raises:
        AuroraError: no such name or type, or the weights cannot be loaded.

    Example:
        >>> model, vis, txt = load_model_and_preprocess("blip_retrieval_aurora", "tiny")
        >>> model, vis, txt = load_model_and_preprocess("blip_retrieval_aurora", adapter="output/RUN/adapter_best")
    """
    use_weights_folder()
    described = {} if adapter is None else read_adapter_config(adapter).model
    if described.get("arch", name) != name:
        raise AuroraError(f"{adapter} is an adapter of {shown(described['arch'])}, not of {name}")
    cls, model_type = _class_and_type(name, model_type or described.get("model_type"))
    given = {"pretrained": pretrained, "tokenizer": tokenizer, "med_config_path": med_config_path}
    sources = {key: str(value) for key, value in given.items() if value is not None}
    if adapter is None and not sources:
        return lavis.models.load_model_and_preprocess(name, model_type, is_eval=is_eval, device=device)  # type: ignore
    if not hasattr(cls, "CONFIG_CLASS"):
        raise AuroraError(f"{name} takes neither adapter nor {', '.join(SOURCES)}; it is not of this package")
    type_defaults = getattr(cls, "type_defaults", None)
    cfg = OmegaConf.load(cls.default_config_path(model_type)) if type_defaults is None else type_defaults(model_type)
    preprocess = described.get("preprocess") or cfg.preprocess
    if adapter is not None:
        with _named(adapter):
            cfg.model = OmegaConf.merge(cfg.model, adapter_settings(cls, described))
            check_preprocess(described.get("preprocess") or {})
        cfg.model.adapter = str(adapter)
    _set_sources(cfg.model, sources)
    try:
        processors = load_preprocess(OmegaConf.create(preprocess))
    except (TypeError, ValueError, AttributeError) as error:
        raise AuroraError(f"{adapter or name}: the processors cannot be made ({error})") from error
    model = cls.from_config(cfg.model).to(device)
    return (model.eval() if is_eval else model, *processors)


def _class_and_type(name: str, model_type: str | None) -> tuple[Any, str | None]:
    """A registered model's class, and the type asked for or its default one."""
    cls = registry.get_model_class(name)
    if cls is None:
        raise AuroraError(f"no model {name!r}{did_you_mean(name, registry.list_models())}")
    model_type = model_type or getattr(cls, "DEFAULT_MODEL_TYPE", None)
    # mode_approx takes the name and type of another model, and checks them itself.
    if name != "mode_approx" and model_type not in cls.PRETRAINED_MODEL_CONFIG_DICT:
        known = cls.PRETRAINED_MODEL_CONFIG_DICT
        raise AuroraError(f"{name}: no model type {model_type!r}{did_you_mean(str(model_type), known)}")
    return cls, model_type


@contextmanager
def _named(adapter: str | Path) -> Iterator[None]:
    """Errors say which adapter's file they are of."""
    try:
        yield
    except AuroraError as error:
        raise AuroraError(f"{Path(adapter) / CONFIG}: {error}") from error


def _set_sources(model: DictConfig, sources: Mapping[str, str]) -> None:
    """Put what the user names in the place of the type's own weights, tokenizer and text configuration."""
    backbone = model.base if "base" in model else model
    cls = registry.get_model_class(backbone.arch)
    if not hasattr(cls, "CONFIG_CLASS"):
        known = {"pretrained", *type_settings(cls, backbone.get("model_type"))}
        for key in sources.keys() - known:
            raise AuroraError(f"{key}: {backbone.arch} takes none; leave it out")
    backbone.update(sources)
    if "pretrained" in sources:
        backbone.load_finetuned = False
