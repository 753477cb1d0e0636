"""The factors of the CP-decomposed update (paper 3.2, eq. 2-4)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lavis_aurora.adapters.sets import AdapterSet, AdapterSets, register_sets
from lavis_aurora.adapters.updates import LowRank
from lavis_aurora.common.errors import AuroraError, did_you_mean, require
from lavis_aurora.common.modules import KeepFloat32
from lavis_aurora.config.method import APPROX_FORMS, ModeApproxConfig

# Deviation of U at the start.
U_DEVIATION = 0.1


def tower_of(slot: str) -> str:
    """The tower whose U and V a slot has if they are not global: its module in a layer, whatever the layer.

    BLIP's attention has three: self-attention of the vision and of the text encoder, and cross-attention.

    >>> tower_of("text_encoder.encoder.layer.3.crossattention.self.query")
    'text_encoder_encoder_layer_crossattention_self'
    """
    parts = slot.split(".")[:-1]
    return "_".join(part for part in parts if not part.isdigit())


def slot_rows(factor: Tensor, slots: Sequence[int] | Tensor) -> Tensor:
    """The rows of a factor that are those of the slots."""
    if isinstance(slots, Tensor):
        return factor[slots]
    if list(slots) == list(range(slots[0], slots[-1] + 1)):
        return factor[slots[0] : slots[-1] + 1]  # no copy, and nothing to send to a GPU
    return factor[list(slots)]


@APPROX_FORMS.register("cp")
class FactorSet(KeepFloat32, AdapterSet):
    """One adapter of ``form: cp``: U, V, P and the coefficients lambda for all slots.

        dW_k = s * sum_r lambda[k, r] P[k, r] outer(U[:, r], V[:, r]),   s = scale / (0.1 sqrt(d_in * rank))

    U and V are shared by every slot of the same width ("global factors"), or by those of one tower, see
    :func:`tower_of`; P and lambda have one row a slot.
    U and P start as Gaussians with deviations 0.1 and 1, lambda at one and V at zero, so that dW = 0 at step 0.
    s makes the output of the update independent of width and rank, so that one learning rate serves them all;
    U starts small, so that an optimizer with steps of one size (Adam) turns it as fast as V grows.

    Args:
        slots: name of each slot with its (d_in, d_out), in slot order.
        config: rank, scale and sharing.

    Attributes:
        separable: the update is a sum of components that can be told apart, of which fewer are a smaller adapter.
        components: how many of the sum's terms are in use, the first ones; None: all. s stays that of the rank.
    """

    separable: ClassVar[bool] = True
    components: int | None = None

    def __init__(self, slots: Mapping[str, tuple[int, int]], config: ModeApproxConfig) -> None:
        super().__init__()
        self.config: ModeApproxConfig = config
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
        coefficients, p = self._in_use(self.coefficients), self._in_use(self.P)
        return self.scale(d_in) * slot_rows(coefficients, slots) * slot_rows(p, slots)

    def _in_use(self, factor: Tensor) -> Tensor:
        """The columns of the components in use; while these are all, the factor itself."""
        return factor if self.components is None else factor[:, : self.components]

    def parts(
        self, slots: Sequence[int] | Tensor, d_in: int, d_out: int, tower: str | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """U (d_in, rank), V (d_out, rank) and s * lambda * P (len(slots), rank): the update in its factors.

        Slots of one weight are of one ``tower``; where it is named, the slots may be a tensor. Where ``components``
        says so, rank stands for that number.
        """
        owner = self.owners[slots[0]] if tower is None else self.owner(tower)
        u, v = self._in_use(self.U[f"{owner}{d_in}"]), self._in_use(self.V[f"{owner}{d_out}"])
        return u, v, self.slot_weights(slots, d_in)

    def low_rank(
        self, slots: Sequence[int] | Tensor, d_in: int, d_out: int, tower: str | None = None, columns: bool = False
    ) -> tuple[Tensor, Tensor]:
        """The update of slots of one weight as a product of two matrices of ``rank`` columns.

        Slots in the rows of the weight share its input, and dW = stacked shared^T with shared = U (d_in, rank) and
        stacked = [V diag(w_1); V diag(w_2); ...] (len(slots) * d_out, rank), where w_k = s * lambda_k * P_k. Slots in
        its ``columns`` share the output: dW = shared stacked^T with V, and U diag(w_k) one below the other.

        Returns:
            shared and stacked; the other arguments are those of :meth:`parts`.
        """
        u, v, w = self.parts(slots, d_in, d_out, tower)
        shared, own = (v, u) if columns else (u, v)
        return shared, (w.unsqueeze(1) * own).flatten(0, 1)

    def delta_weight(self, slots: Sequence[int], d_in: int, d_out: int, columns: bool = False) -> Tensor:
        """The update in nn.Linear's layout, the slots stacked in rows: shape (len(slots) * d_out, d_in).

        In ``columns`` they stand side by side: shape (d_out, len(slots) * d_in).
        """
        shared, stacked = self.low_rank(slots, d_in, d_out, columns=columns)
        return shared @ stacked.t() if columns else stacked @ shared.t()

    def apply_update(
        self,
        x: Tensor,
        slots: Sequence[int] | Tensor,
        shape: tuple[int, int],
        tower: str | None,
        columns: bool,
        dropout: float,
    ) -> Tensor:
        """x dW, computed beside the layer: x (..., d_in) to (..., d_out of the layer).

        Args:
            x: what the layer reads.
            slots, tower, columns: as of :meth:`low_rank`.
            shape: (d_in, d_out) of a slot.
            dropout: probability of dropping a feature of x.
        """
        u, v, w = (part.to(x.dtype) for part in self.parts(slots, *shape, tower))
        x = F.dropout(x, dropout)
        if columns:
            return x @ (w.unsqueeze(1) * u).flatten(0, 1) @ v.t()
        return (((x @ u).unsqueeze(-2) * w) @ v.t()).flatten(-2)

    def shared_parameters(self) -> Iterator[nn.Parameter]:
        """What no slot has for itself: U and V."""
        yield from (*self.U.parameters(), *self.V.parameters())

    def adapter_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """(group, parameter) of everything this module trains."""
        for parameter in (*self.U.parameters(), *self.V.parameters()):
            yield "factors U, V", parameter
        yield "slot factors P", self.P
        yield "coefficients lambda", self.coefficients


@register_sets("mode_approx")
class ModeFactors(AdapterSets):
    """Named factor sets over the same slots, one of them active at a time.

    A second set beside the trained one serves as the momentum teacher: the frozen backbone is shared.

    Args:
        slots: name of each slot with its (d_in, d_out), in order.
        config: rank and scale of the set ``default``.

    Examples:
        >>> with model.mode_approx.use("momentum"):
        ...     teacher = model.visual_encoder(image)
        >>> with model.mode_approx.disabled():
        ...     frozen = model.visual_encoder(image)
    """

    tuning: ClassVar[str] = "aurora"
    prefix: ClassVar[str] = "factors"
    config_class: ClassVar[type] = ModeApproxConfig

    def __init__(self, slots: Mapping[str, tuple[int, int]], config: ModeApproxConfig) -> None:
        super().__init__(slots)
        self.add_set("default", config)

    @classmethod
    def tensor_shapes(
        cls, slots: Mapping[str, tuple[int, int]], config: ModeApproxConfig
    ) -> dict[str, tuple[int, ...]]:
        """The factors' shapes that follow from slots, rank and sharing."""
        with torch.device("meta"):
            made = APPROX_FORMS[config.form](slots, config)
        return {key: tuple(parameter.shape) for key, parameter in made.named_parameters()}

    @classmethod
    def slot_updates(
        cls, slots: Mapping[str, tuple[int, int]], config: ModeApproxConfig, tensors: Mapping[str, Tensor]
    ) -> LowRank:
        """A = U^T and B = V diag(s * lambda * P) of each slot, or what stands there with another form."""
        with torch.device("meta"):
            factors = APPROX_FORMS[config.form](slots, config)
        factors.load_state_dict(dict(tensors), assign=True)
        found = {}
        for k, (slot, (d_in, d_out)) in enumerate(slots.items()):
            shared, own = factors.low_rank([k], d_in, d_out)
            found[slot] = (shared.detach().t(), own.detach())
        return found

    @staticmethod
    def _check_separable(config: ModeApproxConfig, what: str) -> None:
        if not APPROX_FORMS[config.form].separable:
            raise AuroraError(
                f"mode_approx.form: {config.form} {what}: its components are mixed by the core; train an adapter of "
                f"form: cp, or export this one to peft as LoRA"
            )

    @classmethod
    def add_updates(
        cls, parts: Sequence[tuple[ModeApproxConfig, Mapping[str, Tensor]]], weights: Sequence[float]
    ) -> tuple[ModeApproxConfig, dict[str, Tensor]]:
        """A sum of CP decompositions is one, over [U_1 U_2 ...], [V_1 V_2 ...]: its rank is the sum of the ranks.

        Where U and V are equal the rank stays, and P is the sum of lambda * P, each times its weight.
        """
        first, reference = parts[0]
        for config, _ in parts:
            cls._check_separable(config, "cannot be added to another")
        if any(config.sharing != first.sharing for config, _ in parts):
            raise AuroraError(
                "mode_approx.sharing differs: one has U and V for all towers and another for each; export both to "
                "peft, which can add LoRAs"
            )
        shared = [key for key in reference if key.startswith(("U.", "V."))]
        equal = all(
            config.rank == first.rank and all(torch.equal(tensors[key], reference[key]) for key in shared)
            for config, tensors in parts
        )
        rank = first.rank if equal else sum(config.rank for config, _ in parts)
        merged = replace(first, rank=rank, nested=False)  # which components come first, no training has said
        # s differs by the same factor for every width.
        scaled = [
            (w * config.scale / merged.scale * math.sqrt(merged.rank / config.rank), tensors)
            for w, (config, tensors) in zip(weights, parts)
        ]
        if equal:
            products = [w * tensors["coefficients"] * tensors["P"] for w, tensors in scaled]
            summed = torch.stack(products).sum(dim=0)
            return merged, {**reference, "P": summed, "coefficients": torch.ones_like(summed)}
        stacked = {key: torch.cat([tensors[key] for _, tensors in scaled], dim=1) for key in reference}
        return merged, {**stacked, "coefficients": torch.cat([w * t["coefficients"] for w, t in scaled], dim=1)}

    @classmethod
    def truncated(
        cls, config: ModeApproxConfig, tensors: Mapping[str, Tensor], rank: int
    ) -> tuple[ModeApproxConfig, dict[str, Tensor]]:
        """The first ``rank`` components of a set, with the scale that leaves s what it was.

        s = scale / (0.1 sqrt(d_in * rank)), and so scale' = scale * sqrt(rank' / rank).
        """
        cls._check_separable(config, "cannot be cut to a lower rank")
        require(1 <= rank <= config.rank, "rank", rank, f"1 to {config.rank}, the adapter's own")
        scale = config.scale * math.sqrt(rank / config.rank)
        nested = config.nested and any(smaller < rank for smaller in config.nested_ranks)
        cut = {key: tensor[:, :rank].contiguous() for key, tensor in tensors.items()}
        return replace(config, rank=rank, scale=scale, nested=nested), cut

    @contextmanager
    def first(self, components: int | None) -> Iterator[None]:
        """Let forwards inside the block use the first ``components`` of every set alone; None: all.

        Each costs as much as that of a set of this rank; s stays that of the set's own. As in :meth:`use`, the
        backward pass belongs inside the block too.

        Raises:
            AuroraError: a set is merged, with all of its components, or has none that can be told apart.
        """
        if self.merged is not None:
            raise AuroraError(f"the adapter {self.merged!r} is merged into the weights; unmerge_adapter(model) first")
        sets = [self[name] for name in self.sets]
        for one in sets:
            self._check_separable(one.config, "has no first components")
        before = [one.components for one in sets]
        for one in sets:
            one.components = None if components is None or components >= one.config.rank else components
        try:
            yield
        finally:
            for one, its in zip(sets, before):
                one.components = its

    def make_set(self, name: str, config: ModeApproxConfig) -> FactorSet:
        """Fresh factors (dW = 0)."""
        device = next((parameter.device for parameter in self.sets.parameters()), None)
        made: FactorSet = APPROX_FORMS[config.form](self.slots, config)
        return made.to(device).train(self.training)

    def slot_index(self, name: str) -> int:
        """Row of the slot in P and lambda."""
        try:
            return list(self.slots).index(name)
        except ValueError:
            raise AuroraError(f"no slot {name!r}{did_you_mean(name, self.slots)}") from None

    def __getitem__(self, name: str) -> FactorSet:
        found = self.sets[name]
        assert isinstance(found, FactorSet)
        return found

    def delta_weight(self, slot: str, name: str = "default") -> Tensor:
        """The update of one slot in nn.Linear's layout, shape (d_out, d_in)."""
        index = self.slot_index(slot)
        return self[name].delta_weight([index], *self.slots[slot])
