"""Fold an adapter into the weights, and take it out again (law: merged = unmerged forward)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lavis_aurora.adapters.sets import adapter_parameters
from lavis_aurora.common.errors import AuroraError
from lavis_aurora.mode_approx.layers import adapted_layers, factors_of


def merged_weights(model: nn.Module, name: str) -> dict[str, Tensor]:
    """W0 + dW of every adapted layer, by its key in the state dict.

    Raises:
        AuroraError: a merged weight is not finite.
    """
    merged = {}
    for path, layer in adapted_layers(model):
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
        AuroraError: no adapter is active, or a merged weight is not finite; nothing is changed then.
    """
    factors = factors_of(model)
    if factors.merged is not None:
        return
    weights = merged_weights(model, _active(factors.active))
    # Layers may share a weight: all of them remember it before one changes it.
    for _, layer in adapted_layers(model):
        layer.keep_originals()
    for path, layer in adapted_layers(model):
        layer.merge({weight: weights[f"{path}.{weight}"] for weight in layer.slots_of})
    factors.merged = factors.active


def unmerge_adapter(model: nn.Module) -> None:
    """Put the backbone's own weights back, bit for bit; without a merged adapter nothing happens."""
    for _, layer in adapted_layers(model):
        layer.unmerge()
    factors_of(model).merged = None


def merged_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The state dict of the plain model with the active adapter folded into its weights. Changes nothing.

    Its keys are those of the model without the adapter: a checkpoint of LAVIS, or of nn.Linear layers. A model that
    shares towers with its momentum teacher adds the teacher's in ``complete_merged_state(state)``.
    Tensors that the adapter does not touch are the model's own, as in ``state_dict``.

    Raises:
        AuroraError: the model has gates, which no weight can hold; no adapter is active; a weight is not finite.
    """
    factors = factors_of(model)
    own = {id(parameter) for parameter in factors.parameters()}
    if any(id(parameter) not in own for _, parameter in adapter_parameters(model)):
        raise AuroraError(
            "the gates cannot be folded into weights: tune with model.gate.form: none to export a plain checkpoint, "
            "or keep the adapter (save_adapter) and load it with model.adapter"
        )
    [prefix] = [name for name, module in model.named_modules() if module is factors]
    weights = merged_weights(model, _active(factors.active))
    state = {key: value for key, value in model.state_dict().items() if not key.startswith(f"{prefix}.")}
    complete = getattr(model, "complete_merged_state", None)
    state.update(weights)
    return state if complete is None else complete(state)


def _active(name: str | None) -> str:
    if name is None:
        raise AuroraError("no adapter is active: leave disable_adapter first")
    return name
