"""An nn.Linear that also reads the shared factors."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from lavis_aurora.mode_approx.factors import ModeFactors


class ModeApproxLinear(nn.Linear):
    """y = x W0 + b + x dW_k (paper eq. 4), with the keys of the nn.Linear it replaces.

    Checkpoints of the backbone load unmodified: ``weight`` and ``bias`` keep their names, and the factors
    live in one place of the model, outside this module.

    Args:
        linear: the layer to replace; its parameters are taken over, not copied.
        factors: the shared factors.
        slots: rows of P and lambda. Several slots are several weights stacked in the rows of this one, as q, k
            and v in LAVIS's ViT.
    """

    def __init__(self, linear: nn.Linear, factors: ModeFactors, slots: Sequence[int]) -> None:
        super().__init__(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
        self.weight, self.bias = linear.weight, linear.bias
        self.slots = tuple(slots)
        # Not a submodule: the factors are registered once, at the model.
        self.__dict__["factors"] = factors
        self.train(linear.training)

    @property
    def slot_width(self) -> int:
        """d_out of each slot."""
        return self.out_features // len(self.slots)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in_features) to (..., out_features)."""
        y = F.linear(x, self.weight, self.bias)
        active = self.factors.active_set
        return y if active is None else y + active.project(x, self.slots, self.slot_width).to(y.dtype)

    def delta_weight(self, name: str = "default") -> Tensor:
        """The whole update of this layer, shape (out_features, in_features)."""
        return self.factors.sets[name].delta_weight(self.slots, self.in_features, self.slot_width)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, slots={self.slots}"
