"""The adapters of a model: found, bound to its gates and heads, switched, disabled, deleted, counted."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from lavis_aurora.adapters.companions import (
    BASE,
    Companions,
    adapter_parameters,
    has_momentum,
    head_buffers,
    head_modules,
    head_parameters,
    momentum_copies,
    norms_of,
    persistent_buffers,
)
from lavis_aurora.adapters.sets import MOMENTUM_SET, AdapterSets
from lavis_aurora.common.errors import AuroraError
from lavis_aurora.common.summary import GroupCount

# Attributes of LAVIS's models as they are here, which hold the sets of their adapters.
SETS = ("mode_approx", "baseline")


class AdapterOwner:
    """Base class of models that have something to say about their adapters; any other nn.Module has them too."""

    def describe_adapter(self) -> dict[str, Any]:
        """What must be known to build the model again: JSON values, under ``model`` of the file."""
        return {}

    def base_name(self) -> str | None:
        """ARCH/TYPE of the registered model whose backbone this is; None for other weights."""
        return None

    def adapter_differences(self, description: Mapping[str, Any]) -> list[str]:
        """How the model that ``description`` is of differs from this one, where an adapter cannot bridge it."""
        return []

    def adapter_loaded(self, name: str) -> None:
        """Called when the parameters of the adapter ``name`` have new values."""

    def complete_merged_state(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """The plain model's state dict from that with an adapter merged, e.g. with momentum towers."""
        return state


def owner_of(model: nn.Module) -> AdapterOwner:
    """The model, if it is an :class:`AdapterOwner`, else one that has nothing to say."""
    return model if isinstance(model, AdapterOwner) else AdapterOwner()


def find_adapters(model: nn.Module) -> AdapterSets | None:
    """The sets of adapter parameters in ``model``, of whatever kind; None if there are none.

    Raises:
        AuroraError: there are several, e.g. of two models in one.
    """
    found = [module for module in model.modules() if isinstance(module, AdapterSets)]
    if len(found) > 1:
        raise AuroraError(
            f"{type(model).__name__} holds {len(found)} modules of adapters; name the part of the model that is meant"
        )
    return found[0] if found else None


def adapters_of(model: nn.Module) -> AdapterSets:
    """:func:`find_adapters`; an AuroraError for a model without."""
    sets = find_adapters(model)
    if sets is None:
        raise AuroraError(
            f"{type(model).__name__} has no adapter: build it with model.tuning: aurora, or put one on it with "
            f"inject_mode_approx(model, ModeApproxConfig(rank=...))"
        )
    return sets


def bind_companions(model: nn.Module, sets: AdapterSets, train_heads: bool) -> None:
    """Let gates and heads switch with the sets; called once, when the model has both.

    Gates are what modules of the model name in ``adapter_parameters``, heads what ``model.heads`` lists.

    Args:
        model: the model around the sets.
        sets: its adapters.
        train_heads: the heads are trained with the adapter ``default``: the backbone's own are kept beside them.

    Raises:
        AuroraError: a head holds a weight that the adapter updates, or buffers and no parameter.
    """
    names = {id(tensor): name for name, tensor in (*model.named_parameters(), *model.named_buffers())}
    own = {id(parameter) for parameter in (*sets.parameters(), *sets.set_parameters())}
    gates: dict[str, Tensor] = {names[id(p)]: p for _, p in adapter_parameters(model) if id(p) not in own}
    heads = {names[id(tensor)]: tensor for tensor in (*head_parameters(model), *head_buffers(model))}
    adapted = {id(weight) for _, layer in sets.updated_layers(model) for weight in layer.adapted_weights().values()}
    both = [names[id(p)] for p in head_parameters(model) if id(p) in adapted]
    if both:
        raise AuroraError(
            f"{both[0]} has an update by {sets.kind} and cannot be trained itself too; name modules without adapted "
            f"layers in model.modules_to_save, or other layers in model.{sets.kind}.targets"
        )
    for head in head_modules(model):
        if persistent_buffers(head) and not any(True for _ in head.parameters()):
            name = next(name for name, module in model.named_modules() if module is head)
            raise AuroraError(f"{name} has buffers and no parameter to train; name the module around it as the head")
    if gates:
        sets.companions["gate"] = Companions(model, gates, "gate", "default", single_precision=True)
    if heads:
        norms = [mode for head in head_modules(model) for mode in norms_of(model, head)] if train_heads else []
        group = sets.companions["heads"] = Companions(model, heads, "heads", BASE, False, norms)
        if train_heads:
            group.active = "default"
            sets.keep_base_heads()
    sets.train(sets.training)


def reset_teacher(model: nn.Module, sets: AdapterSets) -> None:
    """Let the momentum copies of ``model`` start as the adapter ``default``, whichever adapter is active."""
    if not has_momentum(model) or not momentum_copies(model):
        return
    sets.switch_companions("default")
    model.copy_params()
    for trained, copy in momentum_copies(model):
        # LAVIS copies parameters alone.
        own = persistent_buffers(trained)
        for name, buffer in persistent_buffers(copy).items():
            buffer.copy_(own[name])
    sets.switch_companions(sets.active)


def list_adapters(model: nn.Module) -> list[str]:
    """Names of the adapters that the model holds."""
    return adapters_of(model).names


def set_adapter(model: nn.Module, name: str) -> None:
    """Let forwards use the adapter ``name``: its set, its gates and, if it brought any, its heads.

    No tensor is copied. What is trained stays the same: an adapter that was loaded beside ``default`` is frozen.

    Raises:
        AuroraError: no such adapter, another one is merged, or :func:`disable_adapter` is to be left first.
    """
    sets = adapters_of(model)
    sets.check_name(name)
    sets.check_switch(name)
    active_name(sets.active)
    sets.activate(name)
    sets.switch_companions(name)


@contextmanager
def disable_adapter(model: nn.Module) -> Iterator[None]:
    """Context in which the model is its backbone alone: no update, no gate, the backbone's heads.

    Raises:
        AuroraError: an adapter is merged.
    """
    sets = adapters_of(model)
    before = sets.active
    with sets.disabled():
        sets.switch_companions(None)
        try:
            yield
        finally:
            sets.switch_companions(before)


def delete_adapter(model: nn.Module, name: str) -> None:
    """Forget an adapter that is not active.

    Raises:
        AuroraError: no such adapter; it is active, or ``default``, which the model was built with; or
            :func:`disable_adapter` is to be left first.
    """
    sets = adapters_of(model)
    sets.check_name(name)
    if name == "default":
        raise AuroraError("the adapter 'default' belongs to the model and stays; load_adapter replaces its values")
    if name == active_name(sets.active) or name == sets.merged:
        raise AuroraError(f"the adapter {name!r} is active; set_adapter another one first")
    sets.remove_set(name)


def truncate_adapter(model: nn.Module, rank: int, name: str | None = None) -> None:
    """Cut an adapter to its first ``rank`` components, in place: those that ``mode_approx.nested`` has put in order.

    The factors that are left are what they were, and so is their scale: it computes what it computed with these
    components. It can be saved, merged, loaded and switched like any other, and trained further with a new optimizer.

    Args:
        model: a model with an adapter.
        rank: 1 to that of the adapter.
        name: which adapter; by default the active one.

    Raises:
        AuroraError: no such adapter or rank, it is merged, or it is of a kind without components; nothing is changed.
    """
    sets = adapters_of(model)
    name = active_name(sets.active) if name is None else name
    sets.check_name(name)
    if name == sets.merged:
        raise AuroraError(f"the adapter {name!r} is merged into the weights; unmerge_adapter(model) first")
    warn_of_order(sets[name].config, f"the adapter {name!r}", rank)
    sets.truncate_set(name, rank)
    if name == "default" and MOMENTUM_SET in sets.sets:
        sets.truncate_set(MOMENTUM_SET, rank)


def warn_of_order(settings: Any, which: str, rank: int) -> None:
    """Say of an adapter that is cut, by its settings, if its components are in no order."""
    if not getattr(settings, "nested", True) and rank < settings.rank:
        logging.warning(
            "%s was not trained with mode_approx.nested: its components are in no order, and with the first %d of %d "
            "alone it computes something else",
            which,
            rank,
            settings.rank,
        )


def active_name(name: str | None) -> str:
    if name is None:
        raise AuroraError("no adapter is active: leave disable_adapter first")
    return name


def trained_groups(model: nn.Module) -> dict[str, list[nn.Parameter]]:
    """What is trained, by group: adapters' own, ``heads``, ``backbone``."""
    group_of = {id(p): group for group, p in adapter_parameters(model)}
    group_of.update((id(p), "heads") for p in head_parameters(model))
    groups: dict[str, list[nn.Parameter]] = {}
    for parameter in model.parameters():
        if parameter.requires_grad:
            groups.setdefault(group_of.get(id(parameter), "backbone"), []).append(parameter)
    return groups


def parameter_groups(model: nn.Module) -> dict[str, GroupCount]:
    """Tensors and scalars of what is trained, by group of :func:`trained_groups`, then of what is ``frozen``."""
    frozen = [parameter for parameter in model.parameters() if not parameter.requires_grad]
    return {
        group: GroupCount(tensors=len(parameters), parameters=sum(parameter.numel() for parameter in parameters))
        for group, parameters in {**trained_groups(model), "frozen": frozen}.items()
    }


def trainable_parameters_summary(model: nn.Module) -> str:
    """What is trained: a row for each group, then PEFT's one line. Counts are numbers of scalars."""
    groups = parameter_groups(model)
    total = sum(count["parameters"] for count in groups.values())
    trained = total - groups["frozen"]["parameters"]
    lines = [f"{'group':<22}{'tensors':>9}{'parameters':>14}{'%':>10}"]
    for group, count in groups.items():
        share = _percent(count["parameters"], total)
        lines.append(f"{group:<22}{count['tensors']:>9,}{count['parameters']:>14,}{share:>10.4f}")
    share = _percent(trained, total)
    lines.append(f"trainable params: {trained:,} || all params: {total:,} || trainable%: {share:.4f}")
    return "\n".join(lines)


def _percent(part: int, whole: int) -> float:
    return 100 * part / whole if whole else 0.0
