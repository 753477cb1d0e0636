"""What belongs to an adapter besides its factors: gates, and heads that were trained with it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from lavis_aurora.adapters.norms import Norm, NormMode, is_trained, norms_of
from lavis_aurora.common.errors import AuroraError
from lavis_aurora.common.precision import SinglePrecision
from lavis_aurora.common.summary import GroupCount
from lavis_aurora.mode_approx.factors import BASE, ModeFactors
from lavis_aurora.mode_approx.layers import adapted_layers, factors_of


@runtime_checkable
class AdapterModule(Protocol):
    """A module that owns adapter parameters."""

    def adapter_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """(group, parameter) of everything the module trains."""


def adapter_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """(group, parameter) of all adapter modules in ``model``, each parameter once."""
    seen: set[int] = set()
    for module in model.modules():
        if module is not model and isinstance(module, AdapterModule):
            for group, parameter in module.adapter_parameters():
                if id(parameter) not in seen:
                    seen.add(id(parameter))
                    yield group, parameter


def head_parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    """The parameters of ``model.heads``, a list of modules and parameters; none without that attribute."""
    for head in getattr(model, "heads", ()):
        yield from [head] if isinstance(head, nn.Parameter) else head.parameters()


def head_buffers(model: nn.Module) -> Iterator[Tensor]:
    """The buffers inside ``model.heads`` that a state dict holds, such as running statistics."""
    for head in head_modules(model):
        yield from persistent_buffers(head).values()


def head_modules(model: nn.Module) -> list[nn.Module]:
    """``model.heads`` without single parameters."""
    return [head for head in getattr(model, "heads", ()) if isinstance(head, nn.Module)]


def persistent_buffers(module: nn.Module) -> dict[str, Tensor]:
    """The buffers that a state dict holds, by name; one in several places comes once."""
    held = module.state_dict().keys()
    return {name: buffer for name, buffer in module.named_buffers() if name in held}


def momentum_copies(model: nn.Module) -> list[tuple[nn.Module, nn.Module]]:
    """(trained, copy) as LAVIS's MomentumDistilationMixin lists them in ``model.model_pairs``; empty without."""
    return [(trained, copy) for trained, copy in getattr(model, "model_pairs", ())]


def trained_buffers(model: nn.Module) -> dict[str, Tensor]:
    """The buffers that training changes, by name: of trained heads and norms, and of their momentum copies."""
    owners = [*head_modules(model), *(module for module in model.modules() if isinstance(module, Norm))]
    changed = {id(buffer) for owner in owners if is_trained(owner) for buffer in owner.buffers()}
    for trained, copy in momentum_copies(model):
        if isinstance(copy, nn.Module):
            twins = dict(copy.named_buffers())
            changed |= {id(twins.get(name)) for name, buffer in trained.named_buffers() if id(buffer) in changed}
    return {name: buffer for name, buffer in persistent_buffers(model).items() if id(buffer) in changed}


def parameter_groups(model: nn.Module) -> dict[str, GroupCount]:
    """Tensors and scalars of what is trained, by group (adapters' own, ``heads``, ``backbone``), then ``frozen``."""
    group_of = {id(p): group for group, p in adapter_parameters(model)}
    group_of.update((id(p), "heads") for p in head_parameters(model))
    groups: dict[str, GroupCount] = {}
    frozen = GroupCount(tensors=0, parameters=0)
    for parameter in model.parameters():
        group = frozen
        if parameter.requires_grad:
            group = groups.setdefault(group_of.get(id(parameter), "backbone"), GroupCount(tensors=0, parameters=0))
        group["tensors"] += 1
        group["parameters"] += parameter.numel()
    return {**groups, "frozen": frozen}


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


class Companions(SinglePrecision):
    """Parameters of one group, gates or heads, of all adapters, and the buffers of their modules.

    Those of one adapter stand in the model, under their own names; those of the others wait here. Switching moves
    references and copies no number. An adapter that brings no heads uses the backbone's.

    Args:
        model: the model in which they stand.
        tensors: they themselves, by their full names there.
        label: what the summary calls them.
        owner: the adapter whose tensors stand in the model now.
        single_precision: keep float32 over a backbone in half precision.
        norms: those among the modules, which train as long as the tensors that stand in the model do.
    """

    def __init__(
        self,
        model: nn.Module,
        tensors: dict[str, Tensor],
        label: str,
        owner: str,
        single_precision: bool,
        norms: Sequence[NormMode] = (),
    ) -> None:
        super().__init__()
        self.names = list(tensors)
        # In lists modules are not registered a second time.
        self.places = _places(model, tensors.values())
        self.label = label
        self.owner = owner
        self.single_precision = single_precision
        self.norms = list(norms)
        self.waiting = nn.ModuleDict()

    def __contains__(self, name: str | None) -> bool:
        return name == self.owner or name in self.waiting

    def standing(self) -> dict[str, Tensor]:
        """The parameters and buffers that stand in the model now, by their names there."""
        return {name: getattr(*places[0]) for name, places in zip(self.names, self.places)}

    def tensors_of(self, name: str) -> dict[str, Tensor]:
        """The parameters and buffers of ``name`` by their names in the model; none if it has none of its own."""
        if name not in self:
            return {}
        if name == self.owner:
            return self.standing()
        return {path: getattr(self.waiting[name], str(i)) for i, path in enumerate(self.names)}

    @torch.no_grad()
    def add(self, name: str, values: dict[str, Tensor]) -> None:
        """Let ``name`` have these values, frozen; where it has tensors already, they take the values."""
        if name not in self:
            shelf = self._shelf(name)
            for i, tensor in enumerate(self.standing().values()):
                _put(shelf, str(i), _like(tensor))
        for path, tensor in self.tensors_of(name).items():
            tensor.copy_(values[path])

    def switch(self, name: str | None) -> None:
        """Put the tensors of ``name`` into the model, or the backbone's if it has none (None: the backbone)."""
        target = name if name in self else BASE
        if target == self.owner or target not in self:
            return
        asked = [mode.norm.training if mode.trains else mode.asked for mode in self.norms]
        outgoing, incoming = self._shelf(self.owner), self.waiting[target]
        for i, (places, tensor) in enumerate(zip(self.places, self.standing().values())):
            _put(outgoing, str(i), tensor)
            for module, attribute in places:
                setattr(module, attribute, getattr(incoming, str(i)))
            setattr(incoming, str(i), None)
        self.owner = target
        for mode, one in zip(self.norms, asked):
            mode(one)

    def _shelf(self, name: str) -> nn.Module:
        """Where the tensors of ``name`` wait, by number; made once."""
        if name not in self.waiting:
            self.waiting[name] = nn.Module().train(self.training)
        return self.waiting[name]

    def remove(self, name: str) -> None:
        """Forget the tensors of ``name``, which must not stand in the model."""
        if name in self.waiting:
            del self.waiting[name]

    def adapter_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """(group, parameter) of what waits here and belongs to an adapter."""
        for name, shelf in self.waiting.items():
            if name != BASE:
                yield from ((self.label, parameter) for parameter in shelf.parameters())


def _like(tensor: Tensor) -> Tensor:
    """An empty parameter, frozen, or buffer."""
    empty = torch.empty_like(tensor)
    return nn.Parameter(empty, requires_grad=False) if isinstance(tensor, nn.Parameter) else empty


def _put(shelf: nn.Module, key: str, tensor: Tensor) -> None:
    """Register a parameter or a buffer."""
    if isinstance(tensor, nn.Parameter):
        shelf.register_parameter(key, tensor)
    else:
        shelf.register_buffer(key, tensor)


def _places(model: nn.Module, tensors: Iterable[Tensor]) -> list[list[tuple[nn.Module, str]]]:
    """Module and attribute of every place where each of the tensors stands; tied ones stand in several."""
    found: dict[int, list[tuple[nn.Module, str]]] = {id(tensor): [] for tensor in tensors}
    for module in model.modules():
        for attribute, tensor in (*module._parameters.items(), *module._buffers.items()):
            if id(tensor) in found:
                found[id(tensor)].append((module, attribute))
    return list(found.values())


def bind_companions(model: nn.Module, factors: ModeFactors, train_heads: bool) -> None:
    """Let gates and heads switch with the factors; called once, when both stand in the model.

    Gates are what modules of the model name in ``adapter_parameters``, heads what ``model.heads`` lists.

    Args:
        model: the model around the factors.
        factors: its factors.
        train_heads: the heads are trained with the adapter ``default``: the backbone's own are kept beside them.

    Raises:
        AuroraError: a head holds a weight that the adapter updates, or buffers and no parameter.
    """
    names = {id(tensor): name for name, tensor in (*model.named_parameters(), *model.named_buffers())}
    own = {id(parameter) for parameter in factors.parameters()}
    gates = {names[id(p)]: p for _, p in adapter_parameters(model) if id(p) not in own}
    heads = {names[id(tensor)]: tensor for tensor in (*head_parameters(model), *head_buffers(model))}
    adapted = {id(weight) for _, layer in adapted_layers(model) for weight in layer.adapted_weights().values()}
    both = [names[id(p)] for p in head_parameters(model) if id(p) in adapted]
    if both:
        raise AuroraError(
            f"{both[0]} has an update by mode_approx and cannot be trained itself too; name modules without adapted "
            f"layers in model.modules_to_save, or other layers in model.mode_approx.targets"
        )
    for head in head_modules(model):
        if persistent_buffers(head) and not any(True for _ in head.parameters()):
            name = next(name for name, module in model.named_modules() if module is head)
            raise AuroraError(f"{name} has buffers and no parameter to train; name the module around it as the head")
    if gates:
        factors.companions["gate"] = Companions(model, gates, "gate", "default", single_precision=True)
    if heads:
        norms = [mode for head in head_modules(model) for mode in norms_of(model, head)] if train_heads else []
        group = factors.companions["heads"] = Companions(model, heads, "heads", BASE, False, norms)
        if train_heads:
            group.owner = "default"
            keep_base_heads(factors)
    factors.train(factors.training)


def keep_base_heads(factors: ModeFactors) -> None:
    """Remember the heads that stand in the model as the backbone's; called when its weights have been loaded."""
    if "heads" not in factors.companions:
        return
    group = factors.companions["heads"]
    if group.owner != BASE:
        group.add(BASE, group.tensors_of(group.owner))


def switch_companions(factors: ModeFactors, name: str | None) -> None:
    """Put the gates and heads of an adapter, or of the backbone, into the model."""
    for part in factors.companions.values():
        part.switch(name)


def list_adapters(model: nn.Module) -> list[str]:
    """Names of the adapters that the model holds."""
    return factors_of(model).names


def set_adapter(model: nn.Module, name: str) -> None:
    """Let forwards use the adapter ``name``: its factors, its gates and, if it brought any, its heads.

    No number is copied. What is trained stays the same: an adapter that was loaded beside ``default`` is frozen.

    Raises:
        AuroraError: no such adapter, or another one is merged.
    """
    factors = factors_of(model)
    factors.check_name(name)
    factors.check_switch(name)
    factors.active = name
    switch_companions(factors, name)


@contextmanager
def disable_adapter(model: nn.Module) -> Iterator[None]:
    """Context in which the model is its backbone alone: no update, no gate, the backbone's heads.

    Raises:
        AuroraError: an adapter is merged.
    """
    factors = factors_of(model)
    before = factors.active
    with factors.disabled():
        switch_companions(factors, None)
        try:
            yield
        finally:
            switch_companions(factors, before)


def delete_adapter(model: nn.Module, name: str) -> None:
    """Forget an adapter that is not active.

    Raises:
        AuroraError: no such adapter; it is active, or ``default``, which the model was built with.
    """
    factors = factors_of(model)
    factors.check_name(name)
    if name == "default":
        raise AuroraError("the adapter 'default' belongs to the model and stays; load_adapter replaces its values")
    if name == factors.active or name == factors.merged:
        raise AuroraError(f"the adapter {name!r} is active; set_adapter another one first")
    del factors.sets[name]
    for part in factors.companions.values():
        part.remove(name)
