"""Tokens from main memory to the model's device."""

from __future__ import annotations

import torch
from transformers import BatchEncoding


def to_device(tokens: BatchEncoding, device: torch.device | str) -> BatchEncoding:
    """``tokens`` on ``device``. A GPU is not waited for: it copies from pinned memory when its turn comes."""
    if torch.device(device).type != "cuda":
        return tokens.to(device)
    # Pinned memory is used again only after the copy, for which torch watches the stream.
    return BatchEncoding({key: ids.pin_memory().to(device, non_blocking=True) for key, ids in tokens.items()})
