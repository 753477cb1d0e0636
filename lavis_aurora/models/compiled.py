"""Layers of the towers, compiled (``run.compile``)."""

from __future__ import annotations

from typing import Any

import torch
from lavis.models.med import BertLayer
from lavis.models.vit import Block
from torch import nn

from lavis_aurora.errors import AuroraError


def compile_layers(model: nn.Module, **options: Any) -> None:
    """Compile the layers of LAVIS's ViT and BERT in a model; layers of one kind share what is compiled.

    Args:
        model: changed in place; its state dict stays as it is.
        options: of ``torch.compile``.

    Raises:
        AuroraError: the model's towers are others.
    """
    layers = [module for module in model.modules() if isinstance(module, (Block, BertLayer))]
    if not layers:
        raise AuroraError(
            "run.compile: only layers of the ViT and BERT that BLIP and ALBEF have are compiled, and this model has "
            "none; set run.compile: false"
        )
    # Text alone or with images, trained or by the teacher, the first layer or a later one: each is compiled once.
    torch._dynamo.config.cache_size_limit = max(64, torch._dynamo.config.cache_size_limit)
    for layer in layers:
        layer.compile(**options)
