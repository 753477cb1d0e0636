"""Other ways of tuning the same models, to compare with: LoRA and UniAdapter."""

from __future__ import annotations

from torch import nn

from lavis_aurora.baselines.lora import inject_lora
from lavis_aurora.baselines.uniadapter import add_uniadapter
from lavis_aurora.config import BlipAuroraConfig


def add_baseline(model: nn.Module, cfg: BlipAuroraConfig, attention: tuple[str, ...]) -> nn.Module | None:
    """Add what ``cfg.tuning`` trains, if that is a baseline.

    Args:
        model: a BLIP with ``visual_encoder``, ``text_encoder`` and maybe ``text_decoder``; changed in place.
        cfg: its configuration.
        attention: regular expressions of the attention projections' names.

    Returns:
        The adapters as one module with named sets, as :class:`lavis_aurora.mode_approx.ModeFactors` has them.
    """
    if cfg.tuning == "lora":
        return inject_lora(model, cfg.lora, attention)
    if cfg.tuning == "uniadapter":
        decoder = getattr(model, "text_decoder", None)
        texts = [model.text_encoder] if decoder is None else [model.text_encoder, decoder.bert]
        return add_uniadapter(model.visual_encoder, texts, cfg.uniadapter)
    return None
