"""What every adapted layer has in common: weights whose rows carry slots."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from torch import Tensor, nn

from lavis_aurora.errors import AuroraError
from lavis_aurora.mode_approx.factors import FactorSet, ModeFactors


class AdaptedModule(nn.Module):
    """Mixin in front of the class of the layer that is adapted; merging and files need nothing else of it.

    Weights keep their names and order, so that checkpoints of the backbone load unmodified. Whoever reads a weight as
    an attribute instead of calling the layer (torch's attention, the ViT of BLIP-2) gets W0 + dW, so that no way of
    computing passes the update by; ``backbone_weight`` is W0 alone. While merged, state dicts still hold W0.

    Attributes:
        factors: the factors shared by all adapted layers of the model.
        slots_of: by the name of each adapted weight, (slots * d_out, d_in), the consecutive rows of P and lambda of
            the blocks of its rows.
        pinned: the factor set this layer reads whichever is active; None for most. A momentum copy has one.
        originals: W0 of each weight while the update is merged, else empty.
    """

    factors: ModeFactors
    slots_of: dict[str, tuple[int, ...]]
    pinned: str | None
    originals: dict[str, Tensor]

    def adapt(
        self,
        layer: nn.Module,
        factors: ModeFactors,
        slots: Mapping[str, Sequence[int]],
        pinned: str | None = None,
    ) -> None:
        """Become ``layer``, whose class this one extends: its very parameters, children, hooks and settings."""
        self.__dict__.update({k: v.copy() if isinstance(v, dict) else v for k, v in layer.__dict__.items()})
        # Not a submodule: the factors are registered once, at the model.
        self.__dict__["factors"] = factors
        self.slots_of = {name: tuple(rows) for name, rows in slots.items()}
        self.pinned = pinned
        self.originals = {}

    def twin(self, layer: nn.Module, pinned: str) -> AdaptedModule:
        """This layer's class and slots around ``layer``, another of its shape, for a factor set of its own."""
        twin = type(self).__new__(type(self))
        twin.adapt(layer, self.factors, self.slots_of, pinned)
        return twin

    @property
    def active_set(self) -> FactorSet | None:
        """The set that forwards must add now; None while disabled or merged."""
        if self.pinned is None or self.factors.active is None or self.factors.merged is not None:
            return self.factors.active_set
        return self.factors.sets[self.pinned]

    def effective_weight(self, weight: str) -> Tensor | None:
        """What forwards compute with: W0 + dW of the active set, or the parameter itself while there is none."""
        parameter, active = self._parameters[weight], self.active_set
        if active is None or weight not in self.slots_of:
            return parameter
        return (parameter + self._delta(weight, active)).to(parameter.dtype)

    def backbone_weight(self, weight: str) -> Tensor:
        """W0, without any update, merged or not."""
        return self.originals.get(weight, self._parameters[weight].detach())

    def merged_weight(self, weight: str, name: str) -> Tensor:
        """W0 + dW of the adapter ``name`` in the dtype of W0, computed in that of the factors. Changes nothing."""
        delta = self.update_of(weight, name).detach()
        return (self.backbone_weight(weight).to(delta.dtype) + delta).to(self._parameters[weight].dtype)

    def update_of(self, weight: str, name: str) -> Tensor:
        """dW of a weight by the adapter ``name``, or by the pinned set."""
        return self._delta(weight, self.factors.sets[self.pinned or name])

    def _delta(self, weight: str, source: FactorSet) -> Tensor:
        rows, d_in = self._parameters[weight].shape
        slots = self.slots_of[weight]
        return source.delta_weight(slots, d_in, rows // len(slots))

    def keep_originals(self) -> None:
        """Remember W0 before :meth:`merge`."""
        self.originals = {weight: self.backbone_weight(weight) for weight in self.slots_of}

    def merge(self, weight: str, merged: Tensor) -> None:
        """Put ``merged`` in the weight's place."""
        self._parameters[weight].data = merged

    def unmerge(self) -> None:
        """Put W0 back, the very same numbers."""
        for weight, original in self.originals.items():
            self._parameters[weight].data = original
        self.originals = {}

    def _apply(self, fn, recurse: bool = True):
        super()._apply(fn, recurse)
        self.originals = {weight: fn(original) for weight, original in self.originals.items()}
        return self

    def _save_to_state_dict(self, destination: dict, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination.update({prefix + weight: original for weight, original in self.originals.items()})

    def _load_from_state_dict(self, state_dict, prefix, *args) -> None:
        for weight in self.originals:
            if prefix + weight in state_dict:
                raise AuroraError(f"{prefix}{weight}: an adapter is merged; unmerge_adapter(model) before loading")
        super()._load_from_state_dict(state_dict, prefix, *args)


def adapted_modules(model: nn.Module) -> Iterator[tuple[str, AdaptedModule]]:
    """Name and module of every adapted layer, in the model's order; one in several places comes with each name."""
    modules = model.named_modules(remove_duplicate=False)
    return ((name, module) for name, module in modules if isinstance(module, AdaptedModule))


def factors_of(model: nn.Module) -> ModeFactors:
    """``model.mode_approx``.

    Raises:
        AuroraError: the model has no factors.
    """
    factors = getattr(model, "mode_approx", None)
    if not isinstance(factors, ModeFactors):
        raise AuroraError(
            f"{type(model).__name__} has no adapter: build it with model.tuning: aurora, or put one on it with "
            f"inject_mode_approx(model, ModeApproxConfig(rank=...))"
        )
    return factors
