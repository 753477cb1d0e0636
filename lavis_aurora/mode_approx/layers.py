"""Layers of torch that also read the shared factors: linear, and multi-head attention."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lavis_aurora.adapters.updates import LowRank, UpdatedLayer
from lavis_aurora.common.modules import adopt
from lavis_aurora.mode_approx.factors import FactorSet, ModeFactors, tower_of


class AdaptedLayer(UpdatedLayer):
    """Mixin in front of a layer whose weights are W0 + dW, with W0 under its old name.

    Checkpoints of the backbone load unmodified: parameters keep their names and order, and the factors live in one
    place of the model, outside this module. Whoever reads a weight as an attribute instead of calling the layer
    (torch's attention, the ViT of BLIP-2) gets W0 + dW, so that no way of computing passes the update by; what would
    change W0 itself takes it from ``adapted_weights()``.

    Attributes:
        factors: the shared factors.
        slots_of: rows of P and lambda by weight. Several of them are several weights stacked in the rows of one, or
            standing side by side in its columns.
    """

    factors: ModeFactors
    slots_of: dict[str, tuple[int, ...]]

    def take_over(
        self,
        layer: nn.Module,
        factors: ModeFactors,
        slots: Mapping[str, Sequence[int]],
        pinned: str | None = None,
    ) -> None:
        """Become ``layer``, whose class this one extends, over the factors."""
        adopt(self, layer)
        # Not a submodule: the factors are registered once, at the model.
        self.__dict__["factors"] = factors
        self.slots_of = {name: tuple(rows) for name, rows in slots.items()}
        self.pinned = pinned
        self.originals = {}

    def twin(self, layer: nn.Module, pinned: str) -> AdaptedLayer:
        """This layer's class and slots around ``layer``, another of its shape, for a factor set of its own."""
        twin = type(self).__new__(type(self))
        twin.take_over(layer, self.factors, self.slots_of, pinned)
        return twin

    @property
    def active_set(self) -> FactorSet | None:
        """The set that forwards must add now; None while the factors are disabled or merged into the weights."""
        if self.pinned is None or self.factors.active is None or self.factors.merged is not None:
            active: FactorSet | None = self.factors.active_set
            return active
        return self.factors[self.pinned]

    def effective_weight(self, name: str) -> Tensor | None:
        """What forwards compute with: W0 + dW of the active set, or the parameter itself while there is none."""
        weight, active = self._parameters[name], self.active_set
        if active is None or weight is None or name not in self.slots_of:
            return weight
        return (weight + self._delta(active, name)).to(weight.dtype)

    def _own(self, name: str) -> nn.Parameter:
        weight = self._parameters[name]
        assert weight is not None
        return weight

    def adapted_weights(self) -> dict[str, nn.Parameter]:
        """The parameters that updates are for, by name."""
        return {name: self._own(name) for name in self.slots_of}

    def delta_weights(self, name: str = "default") -> dict[str, Tensor]:
        """The updates of these weights, of the same shapes, from the set ``name`` (or the pinned one)."""
        source = self.factors[self.pinned or name]
        return {weight: self._delta(source, weight) for weight in self.slots_of}

    def low_rank_updates(self, name: str = "default") -> LowRank:
        """The updates as LoRA has them, of rank R however many slots a weight has: see :meth:`FactorSet.low_rank`."""
        source, found = self.factors[self.pinned or name], {}
        for weight, slots in self.slots_of.items():
            d_in, d_out = self.slot_shape(weight)
            in_columns = d_in < self._own(weight).shape[1]
            shared, stacked = source.low_rank(slots, d_in, d_out, columns=in_columns)
            found[weight] = (stacked.t(), shared) if in_columns else (shared.t(), stacked)
        return found

    def slot_shape(self, weight: str) -> tuple[int, int]:
        """(d_in, d_out) of each slot of a weight."""
        return list(self.factors.slots.values())[self.slots_of[weight][0]]

    def _delta(self, source: FactorSet, weight: str) -> Tensor:
        d_in, d_out = self.slot_shape(weight)
        return source.delta_weight(self.slots_of[weight], d_in, d_out, columns=d_in < self._own(weight).shape[1])


class FoldedLinear(torch.autograd.Function):
    """y = x (W0 + dW)^T + b with the update folded into the weight: one product beside the folding.

    The update is a product of two matrices of ``rank`` columns, see :meth:`FactorSet.low_rank`. With dW = B A^T and g
    the gradient of y, the backward pass takes the cheaper way to

        dB = g^T (x A) = (g^T x) A,   dA = x^T (g B) = (g^T x)^T B

    which are products of width ``rank``, or where the rank is not far below the widths the gradient of the folded
    weight, g^T x. A is shared and B stacked for slots in the rows of the weight, and the other way round for slots in
    its columns. What B is made of (V diag(w_k) of each slot) has its gradient from dB.

    The weight is folded in the factors' precision, or in its own if that is higher, and then rounded to that of x, as
    a trained weight is in mixed precision.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, *weights: Tensor) -> Tensor:
        """x (..., d_in) to (..., d_out).

        Args:
            ctx: torch's.
            x: input.
            bias: (d_out,) or None.
            a, b: (d_in, rank) and (d_out, rank).
            weights: stacked in rows (d_out, d_in).
        """
        ctx.save_for_backward(x, a, b, *weights)
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x, _folded(x.dtype, a, b, *weights), None if bias is None else bias.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x, a and b; weights and bias are frozen."""
        x, a, b, *weights = ctx.saved_tensors
        grad_x = grad @ _folded(x.dtype, a, b, *weights) if ctx.needs_input_grad[0] else None
        frozen = (None,) * len(weights)
        if not any(ctx.needs_input_grad[2:4]):
            return grad_x, None, None, None, *frozen
        x, grad = x.flatten(0, -2), grad.flatten(0, -2)
        own_a, own_b = a.to(x.dtype), b.to(x.dtype)
        if _through_the_weight(len(x), len(a), len(b), a.shape[1]):
            weight = x.t() @ grad
            grad_a, grad_b = weight @ own_b, weight.t() @ own_a
        else:
            # Written with the long side last: as transposed products these are markedly slower on a CPU.
            grad_a = ((grad @ own_b).t() @ x).t()
            grad_b = ((x @ own_a).t() @ grad).t()
        return grad_x, None, grad_a.to(a.dtype), grad_b.to(b.dtype), *frozen


def _through_the_weight(tokens: int, d_in: int, d_out: int, rank: int) -> bool:
    """Whether gradients of the factors take fewer multiplications by the gradient of the weight."""
    return (tokens + 2 * rank) * d_in * d_out < 2 * tokens * rank * (d_in + d_out)


def _folded(dtype: torch.dtype, a: Tensor, b: Tensor, *weights: Tensor) -> Tensor:
    """W0 + dW of layers whose weights are stacked in rows; arguments as of :class:`FoldedLinear`."""
    weight = torch.cat(weights) if len(weights) > 1 else weights[0]
    higher = torch.promote_types(weight.dtype, b.dtype)
    return torch.addmm(weight.to(higher), b.to(higher), a.t().to(higher)).to(dtype)


def _is_watched(layer: nn.Module) -> bool:
    """Whether calling a layer does more than its forward: hooks are called with what it reads and gives."""
    hooks = (layer._forward_pre_hooks, layer._forward_hooks, layer._backward_pre_hooks, layer._backward_hooks)
    return any(map(len, hooks))


def grouped_linear(x: Tensor, *layers: nn.Module) -> tuple[Tensor, ...]:
    """``layer(x)`` of each layer; those of this module that fold are one product, sharing A = x U."""
    ours = [layer for layer in layers if isinstance(layer, ModeApproxLinear)]
    first, active = ours[0] if ours else None, ours[0].active_set if ours else None
    if (
        first is None
        or active is None
        or len(ours) < len(layers)
        or any(layer.active_set is not active for layer in ours)
        or any((layer.shape, layer.tower) != (first.shape, first.tower) for layer in ours)
        or (len(ours) > 1 and any(layer.columns or _is_watched(layer) for layer in ours))
        or not all(layer.folds(x) for layer in ours)
    ):
        return tuple(layer(x) for layer in layers)
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    slots: Tensor | list[int]
    if torch.compiler.is_compiling():
        # As numbers they would be part of the code, and every layer would be compiled anew.
        slots = torch.cat([layer.rows for layer in ours])
    else:
        slots = [slot for layer in ours for slot in layer.slots]
    shared, stacked = active.low_rank(slots, *first.shape, first.tower, first.columns)
    a, b = (stacked, shared) if first.columns else (shared, stacked)
    bias: Tensor | None = first.bias
    if len(ours) > 1 and bias is not None:
        bias = torch.cat([layer.bias for layer in ours])
    weights = (layer.adapted_weight for layer in ours)
    y: Tensor = FoldedLinear.apply(x, bias, a, b, *weights)
    return torch.split(y, [layer.out_features for layer in ours], dim=-1)


class ModeApproxLinear(AdaptedLayer, nn.Linear):
    """y = x W0 + b + x dW_k (paper eq. 4), with the keys of the nn.Linear it replaces.

    Args:
        linear: the layer to replace; its parameters are taken over, not copied.
        factors: the shared factors.
        slots: consecutive rows of P and lambda. Several slots are several weights stacked in the rows of this one,
            as q, k and v in LAVIS's ViT, or side by side in its columns, where a slot reads less than the layer.

    Attributes:
        rows: the slots as a tensor.
        shape: (d_in, d_out) of each slot.
        columns: they stand in the columns.
        tower: whose U and V they have.
    """

    rows: Tensor
    shape: tuple[int, int]
    columns: bool
    tower: str

    def __init__(self, linear: nn.Module, factors: ModeFactors, slots: Sequence[int]) -> None:
        self.take_over(linear, factors, {"weight": slots})

    def take_over(self, *args: Any, **kwargs: Any) -> None:
        """As :class:`AdaptedLayer`'s; what forwards need of the slots is there too."""
        super().take_over(*args, **kwargs)
        self.shape = self.slot_shape("weight")
        self.columns = self.shape[0] < self.in_features
        self.tower = tower_of(list(self.factors.slots)[self.slots[0]])
        device = self.adapted_weight.device
        self.register_buffer("rows", torch.tensor(self.slots, device=device), persistent=False)

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """W0 + dW, see :class:`AdaptedLayer`."""
        weight = self.effective_weight("weight")
        assert weight is not None
        return weight

    @property
    def adapted_weight(self) -> nn.Parameter:
        """The parameter that the update is for."""
        return self._own("weight")

    @property
    def slots(self) -> tuple[int, ...]:
        """Rows of P and lambda."""
        return self.slots_of["weight"]

    def delta_weight(self, name: str = "default") -> Tensor:
        """The whole update of this layer, shape (out_features, in_features)."""
        return self.delta_weights(name)["weight"]

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in_features) to (..., out_features)."""
        if self.folds(x):
            return grouped_linear(x, self)[0]
        y = F.linear(x, self.adapted_weight, self.bias)
        active = self.active_set
        if active is None:
            return y
        slots = self.rows if torch.compiler.is_compiling() else self.slots
        dropped = active.config.dropout if self.training else 0.0
        return y + active.apply_update(x, slots, self.shape, self.tower, self.columns, dropped).to(y.dtype)

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
        """nn.Linear's, and the slots."""
        return f"{super().extra_repr()}, slots={self.slots}"


class ModeApproxMultiheadAttention(AdaptedLayer, nn.MultiheadAttention):
    """nn.MultiheadAttention with dW_k (paper eq. 4) folded into its input projections, with the same keys.

    torch computes with the weights as they are, by several ways (its fused kernels read them from the encoder layer
    around); each of them reads W0 + dW here.

    Args:
        attention: the module to replace; its parameters are taken over, not copied.
        factors: the shared factors.
        slots: rows of P and lambda for each of ``IN_WEIGHTS`` of ``inject`` that the module has.
    """

    def __init__(
        self,
        attention: nn.MultiheadAttention,
        factors: ModeFactors,
        slots: Mapping[str, Sequence[int]],
    ) -> None:
        self.take_over(attention, factors, slots)

    @property
    def in_proj_weight(self) -> Tensor | None:  # type: ignore[override]
        """Query, key and value, stacked: (3 embed_dim, embed_dim)."""
        return self.effective_weight("in_proj_weight")

    @property
    def q_proj_weight(self) -> Tensor | None:  # type: ignore[override]
        """(embed_dim, embed_dim)."""
        return self.effective_weight("q_proj_weight")

    @property
    def k_proj_weight(self) -> Tensor | None:  # type: ignore[override]
        """(embed_dim, kdim)."""
        return self.effective_weight("k_proj_weight")

    @property
    def v_proj_weight(self) -> Tensor | None:  # type: ignore[override]
        """(embed_dim, vdim)."""
        return self.effective_weight("v_proj_weight")
