"""The factors of the CP-decomposed update (paper 3.2, eq. 2-4)."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lavis_aurora.common.errors import AuroraError, near_names
from lavis_aurora.common.precision import SinglePrecision
from lavis_aurora.config.method import ModeApproxConfig

# Deviation of U at the start.
U_DEVIATION = 0.1
# The factor set of the momentum teacher's moving average.
TEACHER_SET = "momentum"
# Sets that belong to a model's training and are no adapters.
INTERNAL = (TEACHER_SET,)
# Whose the heads of the backbone itself are, see Companions.
BASE = "base"


def tower_of(slot: str) -> str:
    """The tower whose U and V a slot has if they are not global: its attention module, whatever the layer.

    BLIP has three: self-attention of the vision and of the text encoder, and cross-attention.

    >>> tower_of("text_encoder.encoder.layer.3.crossattention.self.query")
    'text_encoder_encoder_layer_crossattention_self'
    """
    parts = slot.split(".")[:-1]
    return "_".join(part for part in parts if not part.isdigit())


class FactorSet(SinglePrecision):
    """One adapter: U, V, P and the coefficients lambda for all slots.

        dW_k = s * sum_r lambda[k, r] P[k, r] outer(U[:, r], V[:, r]),   s = scale / (0.1 sqrt(d_in * rank))

    U and V are shared by every slot of the same width ("global factors"), or by those of one tower, see
    :func:`tower_of`; P and lambda have one row a slot.
    U and P start as Gaussians with deviations 0.1 and 1, lambda at one and V at zero, so that dW = 0 at step 0.
    s makes the output of the update independent of width and rank, so that one learning rate serves them all;
    U starts small, so that an optimizer with steps of one size (Adam) turns it as fast as V grows.

    Args:
        slots: name of each slot with its (d_in, d_out), in slot order.
        config: rank, scale and sharing.
    """

    def __init__(self, slots: Mapping[str, tuple[int, int]], config: ModeApproxConfig) -> None:
        super().__init__()
        self.config = config
        rank = config.rank
        # Prefix of the names of each slot's U and V.
        self.owners = [self.owner(tower_of(name)) for name in slots]
        owned = list(zip(self.owners, slots.values()))
        widths_in = sorted({(owner, d_in) for owner, (d_in, _) in owned})
        widths_out = sorted({(owner, d_out) for owner, (_, d_out) in owned})
        self.U = nn.ParameterDict({f"{o}{d}": nn.Parameter(U_DEVIATION * torch.randn(d, rank)) for o, d in widths_in})
        self.V = nn.ParameterDict({f"{o}{d}": nn.Parameter(torch.zeros(d, rank)) for o, d in widths_out})
        self.P = nn.Parameter(torch.randn(len(slots), rank))
        self.coefficients = nn.Parameter(torch.ones(len(slots), rank))

    def owner(self, tower: str) -> str:
        """Prefix of the names of a tower's U and V."""
        return "" if self.config.sharing == "global" else f"{tower}_"

    def scale(self, d_in: int) -> float:
        """s of the equation above, for slots that read ``d_in`` features."""
        return self.config.scale / (U_DEVIATION * math.sqrt(d_in * self.config.rank))

    def slot_weights(self, slots: Sequence[int] | Tensor, d_in: int) -> Tensor:
        """s * lambda * P of the slots, shape (len(slots), rank)."""
        rows = slots if isinstance(slots, Tensor) else list(slots)
        if isinstance(rows, list) and rows == list(range(rows[0], rows[-1] + 1)):
            rows = slice(rows[0], rows[-1] + 1)  # no copy, and nothing to send to a GPU
        return self.scale(d_in) * self.coefficients[rows] * self.P[rows]

    def parts(
        self, slots: Sequence[int] | Tensor, d_in: int, d_out: int, tower: str | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """U (d_in, rank), V (d_out, rank) and s * lambda * P (len(slots), rank): the update in its factors.

        Slots of one weight are of one ``tower``; where it is named, the slots may be a tensor.
        """
        owner = self.owners[slots[0]] if tower is None else self.owner(tower)
        return self.U[f"{owner}{d_in}"], self.V[f"{owner}{d_out}"], self.slot_weights(slots, d_in)

    def delta_weight(self, slots: Sequence[int], d_in: int, d_out: int) -> Tensor:
        """The update in nn.Linear's layout, the slots stacked in rows: shape (len(slots) * d_out, d_in)."""
        u, v, w = self.parts(slots, d_in, d_out)
        return torch.einsum("nr,or,ir->noi", w, v, u).flatten(0, 1)

    def project(self, x: Tensor, slots: Sequence[int] | Tensor, d_out: int, tower: str | None = None) -> Tensor:
        """x dW for the slots side by side: x (..., d_in) gives (..., len(slots) * d_out)."""
        u, v, w = (part.to(x.dtype) for part in self.parts(slots, x.shape[-1], d_out, tower))
        inner = (x @ u).unsqueeze(-2) * w
        return (inner @ v.t()).flatten(-2)

    def adapter_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """(group, parameter) of everything this module trains."""
        for parameter in (*self.U.parameters(), *self.V.parameters()):
            yield "factors U, V", parameter
        yield "slot factors P", self.P
        yield "coefficients lambda", self.coefficients


class ModeFactors(nn.Module):
    """Named factor sets over the same slots, one of them active at a time.

    A second set beside the trained one serves as the momentum teacher: the frozen backbone is shared.

    Args:
        slots: name of each slot with its (d_in, d_out), in order.
        config: rank and scale of the set ``default``.

    Example:
        >>> with model.mode_approx.use("momentum"):
        ...     teacher = model.visual_encoder(image)
        >>> with model.mode_approx.disabled():
        ...     frozen = model.visual_encoder(image)
    """

    def __init__(self, slots: Mapping[str, tuple[int, int]], config: ModeApproxConfig) -> None:
        super().__init__()
        self.slots = dict(slots)
        self.sets = nn.ModuleDict()
        # What switches with the set: gates and heads, see Companions.
        self.companions = nn.ModuleDict()
        self.active: str | None = "default"
        self.merged: str | None = None
        self.add_set("default", config)

    def add_set(self, name: str, config: ModeApproxConfig) -> FactorSet:
        """Add a fresh set (dW = 0) under ``name``; it is not made active.

        Raises:
            AuroraError: the name is taken or cannot be used.
        """
        if name in self.sets:
            raise AuroraError(f"there is an adapter {name!r} already; delete_adapter it, or choose another name")
        if not re.fullmatch(r"\w[\w-]*", name) or hasattr(self.sets, name) or name == BASE:
            raise AuroraError(f"an adapter cannot be called {name!r}; use another word of letters, digits, _ and -")
        self.sets[name] = FactorSet(self.slots, config).to(self.sets_device()).train(self.training)
        return self.sets[name]

    def sets_device(self) -> torch.device | None:
        """Where the sets are; None before the first."""
        return next((parameter.device for parameter in self.sets.parameters()), None)

    @property
    def names(self) -> list[str]:
        """The adapters, without sets that a model keeps for its training."""
        return [name for name in self.sets if name not in INTERNAL]

    def slot_index(self, name: str) -> int:
        """Row of the slot in P and lambda."""
        try:
            return list(self.slots).index(name)
        except ValueError:
            raise AuroraError(f"no slot {name!r}{near_names(name, self.slots)}") from None

    @property
    def active_set(self) -> FactorSet | None:
        """The set that forwards must add now; None while disabled, and while merged into the weights.

        Raises:
            AuroraError: the model is trained while an adapter is merged.
        """
        if self.merged is not None:
            if self.training and torch.is_grad_enabled():
                raise AuroraError(
                    f"the adapter {self.merged!r} is merged into the weights and cannot be trained; call "
                    f"unmerge_adapter(model) before training, or model.eval() before scoring"
                )
            return None
        return None if self.active is None else self.sets[self.active]

    def check_trained(self) -> None:
        """Refuse to train while an adapter is active that was loaded beside the trained one.

        Raises:
            AuroraError: gradients are asked for in training mode, and the active adapter has none.
        """
        if self.active in (None, "default", *INTERNAL) or not (self.training and torch.is_grad_enabled()):
            return
        if not any(parameter.requires_grad for parameter in self.sets[self.active].parameters()):
            raise AuroraError(
                f"the adapter {self.active!r} is frozen, as one beside 'default' is: load_adapter(model, folder) "
                f"without a name to train it further, or model.eval() to score with it"
            )

    def check_name(self, name: str) -> None:
        """Refuse a name that no adapter has."""
        if name not in self.names:
            raise AuroraError(f"no adapter {name!r}{near_names(name, self.names)}")

    def check_switch(self, name: str | None) -> None:
        """Refuse a set that is not there, or any other than the merged one."""
        if name not in (None, *INTERNAL):
            self.check_name(name)
        if self.merged is not None and name != self.merged:
            raise AuroraError(f"the adapter {self.merged!r} is merged into the weights; unmerge_adapter(model) first")

    @contextmanager
    def use(self, name: str | None) -> Iterator[None]:
        """Let forwards inside the block use the set ``name``; None is the plain backbone.

        With gradient checkpointing the backward pass belongs inside the block too: it computes forward again.
        """
        self.check_switch(name)
        before, self.active = self.active, name
        try:
            yield
        finally:
            self.active = before

    def disabled(self):
        """Context in which every adapted layer is the plain backbone's."""
        return self.use(None)

    def delta_weight(self, slot: str, name: str = "default") -> Tensor:
        """The update of one slot in nn.Linear's layout, shape (d_out, d_in)."""
        index = self.slot_index(slot)
        return self.sets[name].delta_weight([index], *self.slots[slot])
