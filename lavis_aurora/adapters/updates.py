"""Layers whose weights are W0 + dW: what updates them, and how an update is merged and taken back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from lavis_aurora.common.errors import AuroraError

# By name of a weight or slot, its update as LoRA has it: A (rank, d_in) and B (d_out, rank), with dW = B A.
LowRank = dict[str, tuple[Tensor, Tensor]]


class UpdatedLayer(nn.Module):
    """Mixin in front of a layer whose weights are W0 + dW, with W0 as its parameters: they can be merged.

    While an adapter is merged, state dicts still hold W0.

    Attributes:
        pinned: the set this layer always reads; None reads the active one. A momentum copy is pinned.
        originals: W0 by weight while an adapter is merged into the layer, else empty.
    """

    pinned: str | None = None
    originals: dict[str, Tensor]

    def adapted_weights(self) -> dict[str, nn.Parameter]:
        """The parameters that updates are for, by name."""
        raise NotImplementedError

    def delta_weights(self, name: str = "default") -> dict[str, Tensor]:
        """The updates of these weights, of the same shapes, from the set ``name`` (or the pinned one)."""
        raise NotImplementedError

    def low_rank_updates(self, name: str = "default") -> LowRank:
        """The updates of these weights in their factors, see :data:`LowRank`."""
        raise NotImplementedError

    def backbone_weights(self) -> dict[str, Tensor]:
        """W0 by name, merged or not."""
        return {name: self.originals.get(name, weight.detach()) for name, weight in self.adapted_weights().items()}

    def merged_weights(self, name: str) -> dict[str, Tensor]:
        """W0 + dW in the dtype of W0, computed in the higher one of W0 and the update. Changes nothing."""
        deltas = self.delta_weights(name)
        return {
            weight: (original + deltas[weight].detach()).to(original.dtype)
            for weight, original in self.backbone_weights().items()
        }

    def backup_weights(self) -> None:
        """Remember W0, before :meth:`merge`."""
        self.originals = self.backbone_weights()

    def merge(self, merged: Mapping[str, Tensor]) -> None:
        """Put ``merged`` in the weights' place."""
        for name, weight in self.adapted_weights().items():
            weight.data = merged[name]

    def unmerge(self) -> None:
        """Put W0 back, the very same numbers."""
        for name, weight in self.adapted_weights().items():
            weight.data = self.originals.get(name, weight.data)
        self.originals = {}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> UpdatedLayer:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.originals = {name: fn(original) for name, original in self.originals.items()}
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination.update({prefix + name: original for name, original in self.originals.items()})

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        if any(prefix + name in state_dict for name in self.originals):
            raise AuroraError(f"{prefix[:-1]}: an adapter is merged; unmerge_adapter(model) before loading weights")
        super()._load_from_state_dict(state_dict, prefix, *args)
