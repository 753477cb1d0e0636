"""Attention over keys and values that several queries share. Torch only."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def split_heads(x: Tensor, heads: int) -> Tensor:
    """(batch, length, heads * width) to (batch, heads, length, width)."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def merge_heads(x: Tensor) -> Tensor:
    """(batch, heads, length, width) to (batch, length, heads * width)."""
    return x.transpose(1, 2).flatten(2)


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, dropout: float = 0.0) -> Tensor:
    """softmax(q k^T / sqrt(width) + mask) v, by torch's fused kernel.

    With fewer keys than queries in the batch, consecutive queries share them: query i reads keys i // (batch /
    groups). The queries of a group are then one long query, and its keys are read once.

    Args:
        query: (batch, heads, length, width).
        key, value: (groups, heads, keys, width), where groups divides batch.
        mask: added to the scores, broadcast to (batch, heads, length, keys); only with groups = batch.
        dropout: probability of dropping an attention weight.

    Returns:
        (batch, heads, length, width).
    """
    batch, heads, length, width = query.shape
    groups = key.shape[0]
    if groups == batch:
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=dropout)
    if batch % groups or mask is not None:
        raise ValueError(f"{batch} queries cannot share {groups} keys" + (" with a mask" if mask is not None else ""))
    grouped = query.unflatten(0, (groups, -1)).transpose(1, 2).reshape(groups, heads, -1, width)
    attended = F.scaled_dot_product_attention(grouped, key, value, dropout_p=dropout)
    return attended.view(groups, heads, -1, length, width).transpose(1, 2).flatten(0, 1)
