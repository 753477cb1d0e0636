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

    All of them then attend to one image as one long query, and nothing is computed for padding. Where a text is
    looked at as a whole, texts of about the same length are padded together for the moment.

    Args:
        lengths: tokens of each text, (texts,), rising, from 1.
        device: of the texts.

    Attributes:
        first: place of each text's first token, (texts,).
    """

    def __init__(self, lengths: Tensor, device: torch.device) -> None:
        ends = lengths.cumsum(0)
        self.first = (ends - lengths).to(device)
        self._groups = []
        start = 0
        while start < len(lengths):
            # Padding adds less than a third.
            stop = int(torch.searchsorted(lengths, lengths[start] * 4 // 3, right=True))
            positions = torch.arange(int(lengths[stop - 1]))
            keep = positions < lengths[start:stop, None]
            sources = (self.first[start:stop, None].cpu() + positions).clamp(max=int(ends[-1]) - 1)
            self._groups.append(tuple(x.to(device) for x in (keep, sources, keep.flatten().nonzero()[:, 0])))
            start = stop

    def padded(self, *packed: Tensor) -> Iterator[tuple[Tensor, ...]]:
        """Groups of texts: where they are no padding, (texts, longest), and of each input (texts, longest, d).

        What stands at the padding is finite and means nothing.
        """
        for keep, sources, _ in self._groups:
            yield (keep, *(x[0, sources] for x in packed))

    def packed(self, groups: Iterable[Tensor]) -> Tensor:
        """(1, tokens, d) of results for each group, (texts, longest, d)."""
        parts = [x.flatten(0, 1)[places] for x, (_, _, places) in zip(groups, self._groups)]
        return torch.cat(parts).unsqueeze(0)
