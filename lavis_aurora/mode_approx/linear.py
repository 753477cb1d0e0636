"""An nn.Linear that also reads the shared factors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lavis_aurora.mode_approx.adapted import AdaptedLayer
from lavis_aurora.mode_approx.factors import ModeFactors


class FoldedLinear(torch.autograd.Function):
    """y = x (W0 + dW)^T + b with the update folded into the weight: one product beside the folding.

    The backward pass never forms the gradient of the folded weight: with A = x U and B = g V for each slot, the
    gradients of U, V and w = s * lambda * P follow from products of width ``rank``.
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None, u: Tensor, v: Tensor, w: Tensor) -> Tensor:
        """x (..., d_in), weight (slots * d_out, d_in), u (d_in, rank), v (d_out, rank), w (slots, rank)."""
        ctx.save_for_backward(x, weight, u, v, w)
        return F.linear(x, _folded(weight, u, v, w), bias)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple:
        """Gradients of x, u, v and w; weight and bias are frozen."""
        x, weight, u, v, w = ctx.saved_tensors
        grad_x = grad @ _folded(weight, u, v, w) if ctx.needs_input_grad[0] else None
        if not any(ctx.needs_input_grad[3:]):
            return grad_x, None, None, None, None, None
        x, grad = x.flatten(0, -2), grad.flatten(0, -2).unflatten(-1, (len(w), -1))
        a = x @ u
        b = grad @ v
        grad_w = (a.unsqueeze(1) * b).sum(dim=0)
        grad_u = x.t() @ (b * w).sum(dim=1)
        scaled = (a.unsqueeze(1) * w).flatten(0, 1)
        grad_v = grad.flatten(0, 1).t() @ scaled
        return grad_x, None, None, grad_u, grad_v, grad_w


def _folded(weight: Tensor, u: Tensor, v: Tensor, w: Tensor) -> Tensor:
    """W0 + dW."""
    rows = (w.unsqueeze(1) * v).flatten(0, 1)
    return torch.addmm(weight, rows, u.t())


class ModeApproxLinear(AdaptedLayer, nn.Linear):
    """y = x W0 + b + x dW_k (paper eq. 4), with the keys of the nn.Linear it replaces.

    Args:
        linear: the layer to replace; its parameters are taken over, not copied.
        factors: the shared factors.
        slots: consecutive rows of P and lambda. Several slots are several weights stacked in the rows of this one,
            as q, k and v in LAVIS's ViT.
    """

    def __init__(self, linear: nn.Linear, factors: ModeFactors, slots: Sequence[int]) -> None:
        self.take_over(linear, factors, {"weight": slots})

    @property
    def weight(self) -> Tensor:
        """W0 + dW, see :class:`AdaptedLayer`."""
        return self.effective_weight("weight")

    @property
    def adapted_weight(self) -> nn.Parameter:
        """The parameter that the update is for, the slots stacked in its rows."""
        return self._parameters["weight"]

    @property
    def slots(self) -> tuple[int, ...]:
        """Rows of P and lambda."""
        return self.slots_of["weight"]

    @property
    def slot_width(self) -> int:
        """d_out of each slot."""
        return self.out_features // len(self.slots)

    def delta_weight(self, name: str = "default") -> Tensor:
        """The whole update of this layer, shape (out_features, in_features)."""
        return self.delta_weights(name)["weight"]

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in_features) to (..., out_features)."""
        active, weight = self.active_set, self.adapted_weight
        if active is not None and self._folds(x):
            return FoldedLinear.apply(x, weight, self.bias, *active.parts(self.slots, x.shape[-1], self.slot_width))
        y = F.linear(x, weight, self.bias)
        return y if active is None else y + active.project(x, self.slots, self.slot_width).to(y.dtype)

    def _folds(self, x: Tensor) -> bool:
        """Whether folding is cheaper than the products beside the layer, and safe: one dtype, a frozen layer."""
        plain = x.dtype == self.adapted_weight.dtype == self.active_set.P.dtype
        trained = self.adapted_weight.requires_grad or (self.bias is not None and self.bias.requires_grad)
        if not plain or trained or torch.is_autocast_enabled(x.device.type):
            return False
        tokens = x.numel() // x.shape[-1]
        return tokens * (self.in_features + self.out_features) > self.in_features * self.out_features

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, slots={self.slots}"
