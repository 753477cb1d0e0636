"""Fold an adapter into the weights, and take it out again (law: merged = unmerged forward)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lavis_aurora.adapters.companions import adapter_parameters
from lavis_aurora.adapters.sets import AdapterSets, UpdatedLayer
from lavis_aurora.adapters.switching import adapters_of, owner_of
from lavis_aurora.common.errors import AuroraError


def _layers(model: nn.Module, sets: AdapterSets) -> list[tuple[str, UpdatedLayer]]:
    layers = list(sets.updated_layers(model))
    if not layers:
        raise AuroraError(
            f"an adapter of model.tuning: {sets.tuning} is no update of weights and cannot be merged into them; keep "
            f"it (save_adapter) and load it with model.adapter"
        )
    return layers


def merged_weights(model: nn.Module, name: str) -> dict[str, Tensor]:
    """W0 + dW of every adapted layer, by its key in the state dict of the plain model.

    Raises:
        AuroraError: a merged weight is not finite, or the adapter is no update of weights.
    """
    merged = {}
    for path, layer in _layers(model, adapters_of(model)):
        for weight, value in layer.merged_weights(name).items():
            key = f"{path}.{weight}"
            if not torch.isfinite(value).all():
                raise AuroraError(f"{key}: not finite once the adapter {name!r} is merged; nothing was changed")
            merged[key] = value
    return merged


def merge_adapter(model: nn.Module) -> None:
    """Fold the active adapter into the weights: forwards then cost what the plain backbone's cost.

    The backbone's own weights are kept beside the merged ones. Merging twice changes nothing; gates stay in force.

    Raises:
        AuroraError: no adapter is active, it is no update of weights, or a merged weight is not finite; nothing is
            changed then.
    """
    sets = adapters_of(model)
    if sets.merged is not None:
        return
    weights = merged_weights(model, _active(sets.active))
    layers = _layers(model, sets)
    # Layers may share a weight: all of them remember it before one changes it.
    for _, layer in layers:
        layer.keep_originals()
    for path, layer in layers:
        layer.merge({weight: weights[f"{path}.{weight}"] for weight in layer.adapted_weights()})
    sets.merged = sets.active
    sets.activate(sets.active)


def unmerge_adapter(model: nn.Module) -> None:
    """Put the backbone's own weights back, bit for bit; without a merged adapter nothing happens."""
    sets = adapters_of(model)
    for _, layer in sets.updated_layers(model):
        layer.unmerge()
    sets.merged = None
    sets.activate(sets.active)


def merged_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The state dict of the plain model with the active adapter folded into its weights. Changes nothing.

    Its keys are those of the model without the adapter: a checkpoint of LAVIS, or of nn.Linear layers. A model that
    shares towers with its momentum teacher adds the teacher's, see
    :meth:`~lavis_aurora.adapters.switching.AdapterOwner.complete_merged_state`.
    Tensors that the adapter does not touch are the model's own, as in ``state_dict``.

    Raises:
        AuroraError: the model has gates, which no weight can hold; no adapter is active, or it is no update of
            weights; a weight is not finite.
    """
    sets = adapters_of(model)
    own = {id(parameter) for parameter in (*sets.parameters(), *sets.set_parameters())}
    if any(id(parameter) not in own for _, parameter in adapter_parameters(model)):
        raise AuroraError(
            "the gates cannot be folded into weights: tune with model.gate.form: none to export a plain checkpoint, "
            "or keep the adapter (save_adapter) and load it with model.adapter"
        )
    [prefix] = [name for name, module in model.named_modules() if module is sets]
    weights = merged_weights(model, _active(sets.active))
    state = sets.plain_state(model.state_dict(), f"{prefix}.")
    state.update(weights)
    return owner_of(model).complete_merged_state(state)


def _active(name: str | None) -> str:
    if name is None:
        raise AuroraError("no adapter is active: leave disable_adapter first")
    return name
