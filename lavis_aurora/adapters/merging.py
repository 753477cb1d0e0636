"""An adapter folded into the weights of a model, for good or for a while, and the plain model that is then left."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor, nn

from lavis_aurora.adapters.companions import adapter_parameters
from lavis_aurora.adapters.sets import AdapterSets
from lavis_aurora.adapters.switching import active_name, adapters_of, find_adapters, owner_of
from lavis_aurora.adapters.updates import UpdatedLayer
from lavis_aurora.common.errors import AuroraError, Diverged


def weight_layers(model: nn.Module, sets: AdapterSets) -> list[tuple[str, UpdatedLayer]]:
    """The layers whose weights the adapters update, by name; an AuroraError for a kind that updates none."""
    layers = list(sets.updated_layers(model))
    if not layers:
        raise AuroraError(
            f"an adapter of model.tuning: {sets.tuning} is no update of weights and cannot be merged into them; keep "
            f"it (save_adapter) and load it with model.adapter"
        )
    return layers


def _tied(model: nn.Module, layers: list[tuple[str, UpdatedLayer]]) -> tuple[str, str] | None:
    """An adapted weight that is that of a module without the update, too, such as an embedding: its two names."""
    keys = {id(weight): f"{path}.{key}" for path, one in layers for key, weight in one.adapted_weights().items()}
    updated = {id(layer) for _, layer in layers}
    for path, module in model.named_modules():
        tied = [key for key, p in module._parameters.items() if id(p) in keys and id(module) not in updated]
        if tied:
            return keys[id(module._parameters[tied[0]])], f"{path}.{tied[0]}"
    return None


def merged_weights(model: nn.Module, name: str) -> dict[str, Tensor]:
    """W0 + dW of every adapted layer, by its key in the state dict of the plain model.

    Raises:
        AuroraError: a merged weight is not finite (Diverged), or tied to one without the update; or the adapter is no
            update of weights.
    """
    merged = {}
    layers = weight_layers(model, adapters_of(model))
    tied = _tied(model, layers)
    if tied is not None:
        raise AuroraError(
            f"{tied[0]} has an update and is {tied[1]}, too, which has none: merged, both would have it; keep the "
            f"adapter (save_adapter), or untie them before tuning"
        )
    for path, layer in layers:
        for weight, value in layer.merged_weights(name).items():
            key = f"{path}.{weight}"
            if not torch.isfinite(value).all():
                raise Diverged(
                    f"{key}: not finite once the adapter {name!r} is merged; nothing was changed; train it at a "
                    f"lower rate (run.init_lr), or merge it in single precision"
                )
            merged[key] = value
    return merged


def merge_adapter(model: nn.Module) -> None:
    """Fold the active adapter into the weights: forwards then cost what the plain backbone's cost.

    The backbone's own weights are kept beside the merged ones. Merging twice changes nothing; gates stay in force.

    Raises:
        AuroraError: no adapter is active, it is no update of weights, or a merged weight is not finite or tied to one
            without the update; nothing is changed then.
    """
    sets = adapters_of(model)
    if sets.merged is not None:
        return
    weights = merged_weights(model, active_name(sets.active))
    layers = weight_layers(model, sets)
    # Layers may share a weight: all of them remember it before one changes it.
    for _, layer in layers:
        layer.backup_weights()
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


@contextmanager
def merged(model: nn.Module) -> Iterator[None]:
    """Context in which the active adapter is merged; one that is already stays so. Errors are merge_adapter's."""
    unmerge = adapters_of(model).merged is None
    try:
        merge_adapter(model)  # in here: a signal may come between two layers
        yield
    finally:
        if unmerge:
            unmerge_adapter(model)


def merged_where_exact(model: nn.Module) -> AbstractContextManager[None]:
    """:func:`merged`, where that changes what forwards cost and no result; elsewhere an empty context.

    Beside the weights stays an adapter that cannot be merged, and one that would be rounded by weights of half
    precision.

    Raises:
        Diverged: a merged weight is not finite; nothing is changed then.
    """
    sets = find_adapters(model)
    layers = list(sets.updated_layers(model)) if sets is not None and sets.active is not None else []
    weights = [weight for _, layer in layers for weight in layer.adapted_weights().values()]
    exact = weights and all(weight.dtype in (torch.float32, torch.float64) for weight in weights)
    return merged(model) if exact and _tied(model, layers) is None else nullcontext()


def refuse_gates(model: nn.Module, sets: AdapterSets, purpose: str) -> None:
    """An AuroraError for a model with gates, which no weight can hold."""
    own = {id(parameter) for parameter in (*sets.parameters(), *sets.set_parameters())}
    if any(id(parameter) not in own for _, parameter in adapter_parameters(model)):
        raise AuroraError(
            f"the gates cannot be folded into weights: tune with model.gate.form: none {purpose}, or keep the "
            f"adapter (save_adapter) and load it with model.adapter"
        )


def plain_model(model: nn.Module, sets: AdapterSets) -> tuple[nn.Module, str]:
    """The model that the sets were put into, as it stands in ``model``, and the prefix of its names there."""
    [name] = [name for name, module in model.named_modules() if module is sets]
    path = name.rpartition(".")[0]
    return model.get_submodule(path), f"{path}." if path else ""


def merged_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The state dict of the plain model with the active adapter folded into its weights. Changes nothing.

    Its keys are those of the model without the adapter: a checkpoint of LAVIS, or of nn.Linear layers. A model that
    shares towers with its momentum teacher adds the teacher's, see
    :meth:`~lavis_aurora.adapters.switching.AdapterOwner.complete_merged_state`.
    Tensors that the adapter does not touch are the model's own, as in ``state_dict``.

    Raises:
        AuroraError: the model has gates, which no weight can hold; no adapter is active, or it is no update of
            weights; a weight is not finite, or tied to one without the update.
    """
    sets = adapters_of(model)
    refuse_gates(model, sets, "to export a plain checkpoint")
    [prefix] = [name for name, module in model.named_modules() if module is sets]
    weights = merged_weights(model, active_name(sets.active))
    state = sets.plain_state(model.state_dict(), f"{prefix}.")
    state.update(weights)
    return owner_of(model).complete_merged_state(state)
