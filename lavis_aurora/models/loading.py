"""Load a model with its processors, as LAVIS does, with a default type and clear errors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lavis.models
import torch
from lavis.common.registry import registry
from lavis.models import load_preprocess
from omegaconf import DictConfig, OmegaConf
from torch import nn

from lavis_aurora.adapters.config import CONFIG, read_adapter_config
from lavis_aurora.common.errors import AuroraError, near_names, shown
from lavis_aurora.common.paths import use_weights_folder
from lavis_aurora.config.adapter_settings import adapter_settings, check_preprocess, type_settings

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
        loaded: tuple[nn.Module, dict[str, Any], dict[str, Any]]
        loaded = lavis.models.load_model_and_preprocess(name, model_type, is_eval=is_eval, device=device)
        return loaded
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
        raise AuroraError(f"no model {name!r}{near_names(name, registry.list_models())}")
    model_type = model_type or getattr(cls, "DEFAULT_MODEL_TYPE", None)
    # mode_approx takes the name and type of another model, and checks them itself.
    if name != "mode_approx" and model_type not in cls.PRETRAINED_MODEL_CONFIG_DICT:
        known = cls.PRETRAINED_MODEL_CONFIG_DICT
        raise AuroraError(f"{name}: no model type {model_type!r}{near_names(str(model_type), known)}")
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
