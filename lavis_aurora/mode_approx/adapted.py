"""What layers over the shared factors have in common; merging and files need nothing else of a layer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from torch import Tensor, nn

from lavis_aurora.errors import AuroraError
from lavis_aurora.mode_approx.factors import FactorSet, ModeFactors


class AdaptedLayer(nn.Module):
    """Mixin in front of a layer whose weights are W0 + dW, with W0 under its old name.

    Checkpoints of the backbone load unmodified: parameters keep their names and order, and the factors live in one
    place of the model, outside this module. Whoever reads a weight as an attribute instead of calling the layer
    (torch's attention, the ViT of BLIP-2) gets W0 + dW, so that no way of computing passes the update by; what would
    change W0 itself takes it from ``adapted_weights()``. While an adapter is merged, state dicts still hold W0.

    Attributes:
        factors: the shared factors.
        slots_of: rows of P and lambda by weight. Several of them are several weights stacked in the rows of one.
        pinned: the factor set this layer always reads; None reads the active one. A momentum copy is pinned.
        originals: W0 by weight while an adapter is merged into the layer, else empty.
    """

    factors: ModeFactors
    slots_of: dict[str, tuple[int, ...]]
    pinned: str | None
    originals: dict[str, Tensor]

    def take_over(
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

    def twin(self, layer: nn.Module, pinned: str) -> AdaptedLayer:
        """This layer's class and slots around ``layer``, another of its shape, for a factor set of its own."""
        twin = type(self).__new__(type(self))
        twin.take_over(layer, self.factors, self.slots_of, pinned)
        return twin

    @property
    def active_set(self) -> FactorSet | None:
        """The set that forwards must add now; None while the factors are disabled or merged into the weights."""
        if self.pinned is None or self.factors.active is None or self.factors.merged is not None:
            return self.factors.active_set
        return self.factors.sets[self.pinned]

    def effective_weight(self, name: str) -> Tensor | None:
        """What forwards compute with: W0 + dW of the active set, or the parameter itself while there is none."""
        weight, active = self._parameters[name], self.active_set
        if active is None or name not in self.slots_of:
            return weight
        return (weight + self._delta(active, name)).to(weight.dtype)

    def adapted_weights(self) -> dict[str, nn.Parameter]:
        """The parameters that updates are for, by name, the slots stacked in their rows."""
        return {name: self._parameters[name] for name in self.slots_of}

    def backbone_weights(self) -> dict[str, Tensor]:
        """W0 by name, merged or not."""
        return {name: self.originals.get(name, weight.detach()) for name, weight in self.adapted_weights().items()}

    def delta_weights(self, name: str = "default") -> dict[str, Tensor]:
        """The updates of these weights, of the same shapes, from the set ``name`` (or the pinned one)."""
        source = self.factors.sets[self.pinned or name]
        return {weight: self._delta(source, weight) for weight in self.slots_of}

    def _delta(self, source: FactorSet, weight: str) -> Tensor:
        rows, d_in = self._parameters[weight].shape
        slots = self.slots_of[weight]
        return source.delta_weight(slots, d_in, rows // len(slots))

    def merged_weights(self, name: str) -> dict[str, Tensor]:
        """W0 + dW in the dtype of W0, computed in that of the factors. Changes nothing."""
        deltas = self.delta_weights(name)
        return {
            weight: (original.to(deltas[weight].dtype) + deltas[weight].detach()).to(original.dtype)
            for weight, original in self.backbone_weights().items()
        }

    def keep_originals(self) -> None:
        """Remember W0, before :meth:`merge`."""
        self.originals = self.backbone_weights()

    def merge(self, merged: Mapping[str, Tensor]) -> None:
        """Put ``merged`` in the weights' place."""
        for name, weight in self.adapted_weights().items():
            weight.data = merged[name]

    def unmerge(self) -> None:
        """Put W0 back, the very same numbers."""
        for name, original in self.originals.items():
            self._parameters[name].data = original
        self.originals = {}

    def _apply(self, fn, recurse: bool = True):
        super()._apply(fn, recurse)
        self.originals = {name: fn(original) for name, original in self.originals.items()}
        return self

    def _save_to_state_dict(self, destination: dict, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination.update({prefix + name: original for name, original in self.originals.items()})

    def _load_from_state_dict(self, state_dict, prefix, *args) -> None:
        if any(prefix + name in state_dict for name in self.originals):
            raise AuroraError(f"{prefix[:-1]}: an adapter is merged; unmerge_adapter(model) before loading weights")
        super()._load_from_state_dict(state_dict, prefix, *args)


def adapted_layers(model: nn.Module) -> Iterator[tuple[str, AdaptedLayer]]:
    """Name and module of every adapted layer, in the model's order; one in several places comes with each name."""
    modules = model.named_modules(remove_duplicate=False)
    return ((name, module) for name, module in modules if isinstance(module, AdaptedLayer))


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
