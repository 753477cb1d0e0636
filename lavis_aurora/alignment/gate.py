"""Gated query transformation, GQT (paper 3.3, figure 6)."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from lavis_aurora.common.precision import SinglePrecision
from lavis_aurora.config.method import GateConfig


def _start(dim: int, init: str) -> nn.Parameter:
    return nn.Parameter(torch.ones(dim) if init == "ones" else torch.zeros(dim))


class QueryGate(SinglePrecision):
    """Feeds the text query t back into the fusion features f of a cross-attention layer.

        t' = tanh(gamma * t) + beta,   g = softmax_i(sum_j <f_i, t'_j>)
        residual: f + (1 - g) * t'      convex: g * f + (1 - g) * t'

    With gamma = beta = 0, ``residual`` is exactly f. Padding takes no part in sum and softmax.

    Args:
        dim: width d of t and f; gamma and beta have 2d numbers.
        config: form (residual or convex) and init.
    """

    def __init__(self, dim: int, config: GateConfig) -> None:
        super().__init__()
        self.form = config.form
        self.gamma = _start(dim, config.init)
        self.beta = _start(dim, config.init)

    def forward(self, t: Tensor, f: Tensor, keep: Tensor | None = None) -> Tensor:
        """Combine the two.

        Args:
            t: output of the self-attention block, (batch, length, d).
            f: output of the cross-attention block, (batch, length, d).
            keep: True where a position is text, False where padding, (batch, length); None if all are text.

        Returns:
            (batch, length, d).
        """
        transformed = torch.tanh(self.gamma * t) + self.beta
        summed = transformed if keep is None else transformed * keep.unsqueeze(-1).to(transformed.dtype)
        similarity = (f * summed.sum(dim=1, keepdim=True)).sum(dim=-1)
        if keep is not None:
            similarity = similarity.masked_fill(~keep, float("-inf"))
        g = similarity.softmax(dim=1).unsqueeze(-1)
        base = g * f if self.form == "convex" else f
        return (base + (1 - g) * transformed).to(f.dtype)

    def adapter_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """(group, parameter) of everything this module trains."""
        yield "gate", self.gamma
        yield "gate", self.beta


class AffineGate(SinglePrecision):
    """The form in the authors' released code: 0.1 (gamma * x + beta) for x in (t, f), 4d numbers.

    It is added to the output of the whole layer, after the feed-forward block.
    """

    def __init__(self, dim: int, config: GateConfig) -> None:
        super().__init__()
        self.gamma_t, self.beta_t = _start(dim, config.init), _start(dim, config.init)
        self.gamma_f, self.beta_f = _start(dim, config.init), _start(dim, config.init)

    def forward(self, t: Tensor, f: Tensor) -> Tensor:
        """What to add, (batch, length, d), for t and f as in :class:`QueryGate`."""
        return (0.1 * (self.gamma_t * t + self.beta_t + self.gamma_f * f + self.beta_f)).to(f.dtype)

    def adapter_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """(group, parameter) of everything this module trains."""
        for parameter in (self.gamma_t, self.beta_t, self.gamma_f, self.beta_f):
            yield "gate", parameter
