"""An nn.Linear that also reads the shared factors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lavis_aurora.mode_approx.adapted import AdaptedLayer
from lavis_aurora.mode_approx.factors import ModeFactors, tower_of


class FoldedLinear(torch.autograd.Function):
    """y = x (W0 + dW)^T + b with the update folded into the weight: one product beside the folding.

    The backward pass never forms the gradient of the folded weight. With A = x U, w = s * lambda * P and g_k the
    gradient of slot k's output, everything follows from products of width ``rank``:

        C_k = A^T g_k,   dV^T = sum_k diag(w_k) C_k,   dw_k = diag(C_k V),   dU = x^T sum_k g_k V diag(w_k)

    The weight is folded in the factors' precision and then rounded to that of x, as a trained weight is in mixed
    precision.
    """

    @staticmethod
    def forward(ctx, x: Tensor, bias: Tensor | None, u: Tensor, v: Tensor, w: Tensor, *weights: Tensor) -> Tensor:
        """x (..., d_in), u (d_in, rank), v (d_out, rank), w (slots, rank); weights, (slots * d_out, d_in) in all."""
        ctx.save_for_backward(x, u, v, w, *weights)
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x, _folded(x.dtype, u, v, w, *weights), None if bias is None else bias.to(x.dtype))

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple:
        """Gradients of x, u, v and w; weights and bias are frozen."""
        x, u, v, w, *weights = ctx.saved_tensors
        grad_x = grad @ _folded(x.dtype, u, v, w, *weights) if ctx.needs_input_grad[0] else None
        frozen = (None,) * len(weights)
        if not any(ctx.needs_input_grad[2:5]):
            return grad_x, None, None, None, None, *frozen
        x, grad = x.flatten(0, -2), grad.flatten(0, -2)
        # Written with the long side last: as transposed products these are markedly slower on a CPU.
        grad_u = ((grad @ _rows(v, w).to(x.dtype)).t() @ x).t()
        # A^T g of each slot, (rank, slots, d_out): both other gradients follow from it.
        c = ((x @ u.to(x.dtype)).t() @ grad).to(v.dtype).unflatten(1, (len(w), -1))
        grad_v = (c * w.t().unsqueeze(2)).sum(dim=1).t()
        grad_w = (c * v.t().unsqueeze(1)).sum(dim=2).t()
        return grad_x, None, grad_u.to(u.dtype), grad_v, grad_w, *frozen


def _rows(v: Tensor, w: Tensor) -> Tensor:
    """V diag(w) of the slots one below the other, (slots * d_out, rank)."""
    return (w.unsqueeze(1) * v).flatten(0, 1)


def _folded(dtype: torch.dtype, u: Tensor, v: Tensor, w: Tensor, *weights: Tensor) -> Tensor:
    """W0 + dW of layers whose weights are stacked in rows."""
    weight = torch.cat(weights) if len(weights) > 1 else weights[0]
    return torch.addmm(weight.to(v.dtype), _rows(v, w), u.t()).to(dtype)


def linear_together(x: Tensor, *layers: nn.Module) -> tuple[Tensor, ...]:
    """``layer(x)`` of each layer; those of this module that fold are one product, sharing A = x U."""
    first = layers[0]
    together = all(
        isinstance(layer, ModeApproxLinear)
        and layer.active_set is first.active_set
        and (layer.slot_width, layer.tower) == (first.slot_width, first.tower)
        and layer.folds(x)
        for layer in layers
    )
    if not together:
        return tuple(layer(x) for layer in layers)
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    if torch.compiler.is_compiling():
        # As numbers they would be part of the code, and every layer would be compiled anew.
        slots = torch.cat([layer.rows for layer in layers])
    else:
        slots = [slot for layer in layers for slot in layer.slots]
    parts = first.active_set.parts(slots, first.in_features, first.slot_width, first.tower)
    bias = first.bias
    if len(layers) > 1 and bias is not None:
        bias = torch.cat([layer.bias for layer in layers])
    y = FoldedLinear.apply(x, bias, *parts, *(layer.adapted_weight for layer in layers))
    return y.split([layer.out_features for layer in layers], dim=-1)


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

    def take_over(self, *args, **kwargs) -> None:
        """As :class:`AdaptedLayer`'s; the slots are there as a tensor too."""
        super().take_over(*args, **kwargs)
        self.tower = tower_of(list(self.factors.slots)[self.slots[0]])
        device = self.adapted_weight.device
        self.register_buffer("rows", torch.tensor(self.slots, device=device), persistent=False)

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
        return self.out_features // len(self.rows)

    def delta_weight(self, name: str = "default") -> Tensor:
        """The whole update of this layer, shape (out_features, in_features)."""
        return self.delta_weights(name)["weight"]

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in_features) to (..., out_features)."""
        if self.folds(x):
            return linear_together(x, self)[0]
        y = F.linear(x, self.adapted_weight, self.bias)
        active = self.active_set
        if active is None:
            return y
        x = F.dropout(x, active.config.dropout, self.training)
        slots = self.rows if torch.compiler.is_compiling() else self.slots
        return y + active.project(x, slots, self.slot_width, self.tower).to(y.dtype)

    def folds(self, x: Tensor) -> bool:
        """Whether the update is folded into the weight: where that is the cheaper way, and the layer is frozen."""
        active, weight, bias = self.active_set, self.adapted_weight, self.bias
        if active is None or weight.requires_grad or (bias is not None and bias.requires_grad):
            return False
        if self.training and active.config.dropout:
            return False
        tokens = x.numel() // x.shape[-1]
        return tokens * (self.in_features + self.out_features) > self.in_features * self.out_features

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, slots={self.slots}"
