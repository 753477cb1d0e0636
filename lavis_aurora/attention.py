"""Heads of attention, and texts of many lengths without padding. Torch only."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor


def split_heads(x: Tensor, heads: int) -> Tensor:
    """(batch, length, heads * width) to (batch, heads, length, width)."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def merge_heads(x: Tensor) -> Tensor:
    """(batch, heads, length, width) to (batch, length, heads * width)."""
    return x.transpose(1, 2).flatten(2)


class Packing:
    """Several texts that follow one another without padding: a batch of one, (1, tokens, d).

    All of them then attend to one image as one long query. Where a text is looked at as a whole, those of the same
    length are a batch.

    Args:
        lengths: tokens of each text, (texts,), rising, from 1.
        device: of the texts.

    Attributes:
        first: place of each text's first token, (texts,).
    """

    def __init__(self, lengths: Tensor, device: torch.device) -> None:
        self.first = (lengths.cumsum(0) - lengths).to(device)
        self._sizes = [pair.tolist() for pair in lengths.unique_consecutive(return_counts=True)]
        self._tokens = [length * texts for length, texts in zip(*self._sizes)]

    def unpacked(self, *packed: Tensor) -> Iterator[tuple[Tensor, ...]]:
        """Views of the texts of each length, (texts, length, d), for each input."""
        parts = zip(*(x[0].split(self._tokens) for x in packed))
        return (tuple(x.unflatten(0, (-1, length)) for x in group) for length, group in zip(self._sizes[0], parts))

    def packed(self, groups: Iterable[Tensor]) -> Tensor:
        """(1, tokens, d) of results for each length, (texts, length, d)."""
        return torch.cat([x.flatten(0, 1) for x in groups]).unsqueeze(0)
