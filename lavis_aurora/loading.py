"""Load a model with its processors, as LAVIS does, with a default type and clear errors."""

from __future__ import annotations

import lavis.models
import torch
from lavis.common.registry import registry
from torch import nn

from lavis_aurora.errors import AuroraError, near_names


def load_model_and_preprocess(
    name: str, model_type: str | None = None, is_eval: bool = False, device: str | torch.device = "cpu"
) -> tuple[nn.Module, dict, dict]:
    """Load a model registered with LAVIS and its processors.

    Args:
        name: registered name, e.g. ``blip_retrieval_aurora``.
        model_type: one of the model's types; the models of this package have a default. For ``mode_approx``, the
            name and type of the model inside, e.g. ``blip_vqa/vqav2``.
        is_eval: put the model in eval mode.
        device: where to put it.

    Returns:
        model, vision processors and text processors (both by ``train`` and ``eval``).

    Raises:
        AuroraError: no such name or type, or the weights cannot be loaded.

    Example:
        >>> model, vis, txt = load_model_and_preprocess("blip_retrieval_aurora", "tiny")
    """
    cls = registry.get_model_class(name)
    if cls is None:
        raise AuroraError(f"no model {name!r}{near_names(name, registry.list_models())}")
    model_type = model_type or getattr(cls, "DEFAULT_MODEL_TYPE", None)
    # mode_approx takes the name and type of another model, and checks them itself.
    if name != "mode_approx" and model_type not in cls.PRETRAINED_MODEL_CONFIG_DICT:
        known = cls.PRETRAINED_MODEL_CONFIG_DICT
        raise AuroraError(f"{name}: no model type {model_type!r}{near_names(str(model_type), known)}")
    return lavis.models.load_model_and_preprocess(name, model_type, is_eval=is_eval, device=device)
