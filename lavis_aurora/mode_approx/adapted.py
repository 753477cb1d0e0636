"""What every adapted layer has in common: a weight whose rows carry slots."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor, nn

from lavis_aurora.errors import AuroraError
from lavis_aurora.mode_approx.factors import ModeFactors


class AdaptedModule(nn.Module):
    """Mixin in front of the class of the layer that is adapted; merging and files need nothing else of it.

    The weight keeps its name, so that checkpoints of the backbone load unmodified. While merged, state dicts still
    hold the backbone's own weight.

    Attributes:
        WEIGHT: name of the adapted parameter, (slots * d_out, d_in).
        factors: the factors shared by all adapted layers of the model.
        slots: consecutive rows of P and lambda, one for each block of rows of the weight.
        original: the backbone's weight while the update is merged, else None.
    """

    WEIGHT = "weight"
    factors: ModeFactors
    slots: tuple[int, ...]
    original: Tensor | None

    def adapt(self, factors: ModeFactors, slots: Sequence[int]) -> None:
        """Take the factors and slots; a constructor calls it once."""
        # Not a submodule: the factors are registered once, at the model.
        self.__dict__["factors"] = factors
        self.slots = tuple(slots)
        self.original = None

    @property
    def adapted_weight(self) -> nn.Parameter:
        """The parameter that the update is for, the slots stacked in its rows."""
        return getattr(self, self.WEIGHT)

    @property
    def backbone_weight(self) -> Tensor:
        """The weight without any update, merged or not."""
        return self.adapted_weight.detach() if self.original is None else self.original

    @property
    def slot_width(self) -> int:
        """d_out of each slot."""
        return len(self.adapted_weight) // len(self.slots)

    def delta_weight(self, name: str = "default") -> Tensor:
        """The whole update of this layer by the adapter ``name``, shaped like :attr:`adapted_weight`."""
        return self.factors.sets[name].delta_weight(self.slots, self.adapted_weight.shape[1], self.slot_width)

    def merged_weight(self, name: str) -> Tensor:
        """W0 + dW in the dtype of W0, computed in that of the factors. Changes nothing."""
        delta = self.delta_weight(name).detach()
        return (self.backbone_weight.to(delta.dtype) + delta).to(self.adapted_weight.dtype)

    def merge(self, merged: Tensor) -> None:
        """Put ``merged`` in the weight's place and keep the backbone's own."""
        self.original = self.backbone_weight
        self.adapted_weight.data = merged

    def unmerge(self) -> None:
        """Put the backbone's own weight back, the very same numbers."""
        if self.original is not None:
            self.adapted_weight.data, self.original = self.original, None

    def _apply(self, fn, recurse: bool = True):
        super()._apply(fn, recurse)
        if self.original is not None:
            self.original = fn(self.original)
        return self

    def _save_to_state_dict(self, destination: dict, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.original is not None:
            destination[prefix + self.WEIGHT] = self.original

    def _load_from_state_dict(self, state_dict, prefix, *args) -> None:
        if self.original is not None and prefix + self.WEIGHT in state_dict:
            raise AuroraError(f"{prefix}{self.WEIGHT}: an adapter is merged; unmerge_adapter(model) before loading")
        super()._load_from_state_dict(state_dict, prefix, *args)


def adapted_modules(model: nn.Module) -> Iterator[tuple[str, AdaptedModule]]:
    """Name and module of every adapted layer, in the model's order."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, AdaptedModule))


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
