"""Load a model with its processors, as LAVIS does, with a default type and clear errors."""

from __future__ import annotations

from pathlib import Path

import lavis.models
import torch
from lavis.common.registry import registry
from lavis.models import load_preprocess
from omegaconf import OmegaConf
from torch import nn

from lavis_aurora.errors import AuroraError, near_names
from lavis_aurora.mode_approx.adapter_file import read_adapter_config


def load_model_and_preprocess(
    name: str,
    model_type: str | None = None,
    is_eval: bool = False,
    device: str | torch.device = "cpu",
    adapter: str | Path | None = None,
    pretrained: str | Path | None = None,
) -> tuple[nn.Module, dict, dict]:
    """Load a model registered with LAVIS and its processors.

    Args:
        name: registered name, e.g. ``blip_retrieval_aurora``.
        model_type: one of the model's types; the models of this package have a default. For ``mode_approx``, the
            name and type of the model inside, e.g. ``blip_vqa/vqav2``.
        is_eval: put the model in eval mode.
        device: where to put it.
        adapter: folder of an adapter to load; type, settings and processors are then those that it was tuned with.
        pretrained: file or URL of the backbone instead of the type's own; for models of this package.

    Returns:
        model, vision processors and text processors (both by ``train`` and ``eval``).

    Raises:
        AuroraError: no such name or type, or the weights cannot be loaded.

    Example:
        >>> model, vis, txt = load_model_and_preprocess("blip_retrieval_aurora", "tiny")
        >>> model, vis, txt = load_model_and_preprocess("blip_retrieval_aurora", adapter="output/RUN/adapter_best")
    """
    cls = registry.get_model_class(name)
    if cls is None:
        raise AuroraError(f"no model {name!r}{near_names(name, registry.list_models())}")
    described = {} if adapter is None else read_adapter_config(adapter).model
    if described.get("arch", name) != name:
        raise AuroraError(f"{adapter} is an adapter of {described['arch']}, not of {name}")
    model_type = model_type or described.get("model_type") or getattr(cls, "DEFAULT_MODEL_TYPE", None)
    # mode_approx takes the name and type of another model, and checks them itself.
    if name != "mode_approx" and model_type not in cls.PRETRAINED_MODEL_CONFIG_DICT:
        known = cls.PRETRAINED_MODEL_CONFIG_DICT
        raise AuroraError(f"{name}: no model type {model_type!r}{near_names(str(model_type), known)}")
    if adapter is None and pretrained is None:
        return lavis.models.load_model_and_preprocess(name, model_type, is_eval=is_eval, device=device)
    if not hasattr(cls, "CONFIG_CLASS"):
        raise AuroraError(f"{name} takes neither adapter nor pretrained; it is not of this package")
    type_defaults = getattr(cls, "type_defaults", None)
    cfg = OmegaConf.load(cls.default_config_path(model_type)) if type_defaults is None else type_defaults(model_type)
    cfg.model = OmegaConf.merge(cfg.model, described.get("settings") or {})
    if adapter is not None:
        cfg.model.adapter = str(adapter)
    if pretrained is not None:
        backbone = cfg.model.base if "base" in cfg.model else cfg.model
        backbone.update(pretrained=str(pretrained), load_finetuned=False)
    model = cls.from_config(cfg.model).to(device)
    processors = load_preprocess(OmegaConf.create(described.get("preprocess") or cfg.preprocess))
    return (model.eval() if is_eval else model, *processors)
