"""What layers over the shared factors have in common."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from lavis_aurora.mode_approx.factors import FactorSet, ModeFactors


class AdaptedLayer(nn.Module):
    """Mixin in front of a layer whose weights are W0 + dW, with W0 under its old name.

    Checkpoints of the backbone load unmodified: parameters keep their names and order, and the factors live in one
    place of the model, outside this module. Whoever reads a weight as an attribute instead of calling the layer
    (torch's attention, the ViT of BLIP-2) gets W0 + dW, so that no way of computing passes the update by;
    the frozen W0 alone is ``adapted_weights()``.

    Attributes:
        factors: the shared factors.
        slots_of: rows of P and lambda by weight. Several of them are several weights stacked in the rows of one.
        pinned: the factor set this layer always reads; None reads the active one. A momentum copy is pinned.
    """

    slots_of: dict[str, tuple[int, ...]]
    pinned: str | None

    def take_over(
        self,
        layer: nn.Module,
        factors: ModeFactors,
        slots: Mapping[str, Sequence[int]],
        pinned: str | None,
    ) -> None:
        """Become ``layer``, whose class this one extends: its very parameters, children, hooks and settings."""
        self.__dict__.update({k: v.copy() if isinstance(v, dict) else v for k, v in layer.__dict__.items()})
        # Not a submodule: the factors are registered once, at the model.
        self.__dict__["factors"] = factors
        self.slots_of = {name: tuple(rows) for name, rows in slots.items()}
        self.pinned = pinned

    @property
    def active_set(self) -> FactorSet | None:
        """The set that forwards use now; None while the factors are disabled."""
        if self.pinned is None or self.factors.active is None:
            return self.factors.active_set
        return self.factors.sets[self.pinned]

    def adapted_weights(self) -> dict[str, nn.Parameter]:
        """The frozen weights, by name."""
        return {name: self._parameters[name] for name in self.slots_of}

    def delta_weights(self, name: str = "default") -> dict[str, Tensor]:
        """The updates of these weights, of the same shapes, from the set ``name`` (or the pinned one)."""
        source = self.factors.sets[self.pinned or name]
        return {weight: self._delta(source, weight) for weight in self.slots_of}

    def twin(self, layer: nn.Module, pinned: str) -> AdaptedLayer:
        """This layer's class and slots around another layer like it, for a set of its own."""
        twin = type(self).__new__(type(self))
        twin.take_over(layer, self.factors, self.slots_of, pinned)
        return twin

    def _delta(self, source: FactorSet, weight: str) -> Tensor:
        rows, d_in = self._parameters[weight].shape
        slots = self.slots_of[weight]
        return source.delta_weight(slots, d_in, rows // len(slots))

    def effective_weight(self, name: str) -> Tensor | None:
        """W0 + dW of the active set; W0 itself while there is none; None for a weight the layer does not have."""
        weight = self._parameters[name]
        active = self.active_set
        if active is None or name not in self.slots_of:
            return weight
        return weight + self._delta(active, name).to(weight.dtype)
